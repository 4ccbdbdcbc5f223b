"""Logits, chosen keys and gradients of DSA equal those of transformers' DeepSeek-V3.2, and of its GLM-5."""

from typing import Any

import hf
import pytest
from test_transformers import assert_equals_theirs
from torch import Tensor

from dsmini.nn import DSA

CASES, GLM_CASES = hf.cases("v32"), hf.cases("glm")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets the chosen keys of each of our layers."""
    seen: list[Tensor] = []
    real = DSA.select_topk
    monkeypatch.setattr(DSA, "select_topk", lambda *args: (seen.append(real(*args)), seen[-1])[1])
    return seen


@pytest.mark.parametrize("case", CASES)
def test_logits_chosen_keys_and_gradients(chosen: list[Tensor], case: str) -> None:
    equal_theirs(hf.v32(3, **CASES[case]), 3, chosen)


@pytest.mark.parametrize("case", GLM_CASES)
def test_layers_share_the_choice_of_keys(chosen: list[Tensor], case: str) -> None:
    types = GLM_CASES[case]["types"]
    equal_theirs(hf.glm(3, **GLM_CASES[case]), types.count("F"), chosen)


def test_small_keys_show_the_epsilon_of_their_norm(chosen: list[Tensor]) -> None:
    theirs = hf.glm(3)
    for layer in theirs.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.wk.weight.data.mul_(1e-3)
    equal_theirs(theirs, 3, chosen)


def equal_theirs(theirs: Any, indexers: int, chosen: list[Tensor]) -> None:
    """Compare logits and gradients, and the chosen keys of each indexer as sets."""
    their_chosen: list[Tensor] = []
    for layer in theirs.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.register_forward_hook(lambda *args: their_chosen.append(args[2]))
    assert_equals_theirs(hf.ours(theirs), theirs)
    assert len(chosen) == (0 if theirs.config.index_topk >= 61 else indexers)
    for mine, other in zip(chosen, their_chosen, strict=False):
        for t in range(61):
            for a, b in zip(mine[:, t].tolist(), other[:, t].tolist(), strict=True):
                assert set(a) - {-1} == {s for s in b if s <= t}  # theirs are filled with keys that the mask hides
