"""Logits, chosen keys and gradients of DSA equal those of transformers' DeepSeek-V3.2."""

from typing import Any

import hf
import pytest
from test_transformers import assert_equals_theirs
from torch import Tensor

from dsmini.nn import DSA

CASES: dict[str, dict[str, Any]] = {
    "v3.2": {},
    "yarn": {"rope_parameters": hf.yarn()},
    "one key": {"index_topk": 1},
    "one less than all keys": {"index_topk": 60},
    "all keys": {"index_topk": 61},
    "the head all rotary": {"index_head_dim": 8},
    "all dense": {"first_k_dense_replace": 3, "index_n_heads": 64},
}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets the chosen keys of each of our layers."""
    seen: list[Tensor] = []
    real = DSA.select_topk
    monkeypatch.setattr(DSA, "select_topk", lambda *args: (seen.append(real(*args)), seen[-1])[1])
    return seen


@pytest.mark.parametrize("case", CASES)
def test_logits_chosen_keys_and_gradients(chosen: list[Tensor], case: str) -> None:
    theirs, their_chosen = hf.v32(3, **CASES[case]), []
    for layer in theirs.model.layers:
        layer.self_attn.indexer.register_forward_hook(lambda *args: their_chosen.append(args[2]))
    assert_equals_theirs(hf.ours(theirs), theirs)
    assert len(chosen) == (0 if theirs.config.index_topk >= 61 else 3)
    for mine, other in zip(chosen, their_chosen, strict=False):
        for t in range(61):
            for a, b in zip(mine[:, t].tolist(), other[:, t].tolist(), strict=True):
                assert set(a) - {-1} == {s for s in b if s <= t}  # theirs are filled with keys that the mask hides
