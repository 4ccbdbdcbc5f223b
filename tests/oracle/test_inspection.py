"""The check of a folder runs transformers' blocks, names the layer that differs, and says what it does not know."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini.checkpoint.inspection import Inspection
from dsmini.checkpoint.vectors import GENERATIONS, config_of
from dsmini.nn.layers import RMSNorm
from tests.helpers.folders import inspected


@pytest.mark.parametrize("generation", GENERATIONS)
def test_each_block_equals_transformers(tmp_path: Path, generation: str) -> None:
    checked = list(Inspection(inspected(tmp_path / "a", generation)))
    assert not [fault for layer in checked for fault in layer.faults]
    errors = [layer.error for layer in checked if layer.name.startswith("layers")]
    assert len(errors) == config_of(generation).n_layers and all(
        error is not None and error < 1e-5 for error in errors
    ), errors


@pytest.mark.parametrize("generation", GENERATIONS)
def test_other_choices_of_single_tokens_in_bf16_are_no_fault(tmp_path: Path, generation: str) -> None:
    checked = list(Inspection(inspected(tmp_path / "a", generation), torch.bfloat16))
    assert not [fault for layer in checked for fault in layer.faults]


def test_a_block_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, forward = inspected(tmp_path / "a", "v3"), RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda of, x: forward(of, x) * 1.001)
    faults = [fault for layer in Inspection(folder) for fault in layer.faults]
    assert faults and all("transformers' block differs by 0.0" in fault for fault in faults), faults


def test_a_model_that_transformers_does_not_know_says_so(tmp_path: Path) -> None:
    folder = inspected(tmp_path / "a", "v3")
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "kimi_k2"}))
    inspection = Inspection(folder)
    assert inspection.why_not.startswith("transformers has no such model")
    assert [layer.error for layer in inspection] == [None] * 5
