"""Counts are those of machines that multiply BF16. On a CPU that does not, plain PyTorch keeps some FP32 copies."""

import pytest


@pytest.fixture(autouse=True)
def _multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda: True)
