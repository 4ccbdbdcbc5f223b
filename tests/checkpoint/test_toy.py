"""The model that dsmini comes with, which every later version has to load.

toy_logits.json has its logits in FP32. They were recorded once: a change that moves them is a defect.
"""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

import dsmini
from dsmini.checkpoint.run_folder import TOY, find_model

RECORDED = json.loads(Path(__file__).with_name("toy_logits.json").read_text())
TOLERANCE = 1e-4
"""Largest relative difference of logits in FP32, whose sums are in another order on another CPU."""


@pytest.mark.parametrize(
    ("backend", "fp8"), [("reference", "dequantize"), ("eager", "keep"), (None, "dequantize"), (None, "keep")]
)
def test_toy_has_the_logits_that_were_recorded(backend: str | None, fp8: Literal["dequantize", "keep"]) -> None:
    tokens, wanted = torch.tensor([list(RECORDED["prompt"].encode())]), torch.tensor(RECORDED["logits"])
    with dsmini.ops.use(backend), torch.no_grad():
        model = dsmini.load_pretrained("toy", torch.float32, fp8)
        logits = model(tokens)[0]
        cache = model.new_cache(max_seq_len=tokens.shape[1])
        parts = tokens.split([tokens.shape[1] - 4, 1, 1, 1, 1], 1)
        steps = torch.cat([model(part, cache=cache)[0] for part in parts])
    for got in (logits, steps):
        got = got[RECORDED["positions"]][:, RECORDED["bytes"]]
        assert ((got - wanted).norm() / wanted.norm()).item() < TOLERANCE
    assert bytes(logits.argmax(-1).tolist()).decode() == RECORDED["guesses"]


def test_toy_is_small_and_a_folder_of_its_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(file.stat().st_size for file in TOY.iterdir()) < 7_000_000
    monkeypatch.chdir(tmp_path)
    assert find_model(Path("toy")) == TOY
    (tmp_path / "toy").mkdir()
    assert find_model(Path("toy")) == Path("toy")
