"""Greedy generation from the cache equals transformers token for token."""

import hf
import pytest
import torch
from test_sparse_attention import CASES as SPARSE
from test_transformers import CASES

import dsmini

PROMPTS = [[3, 14, 15, 92, 65, 35], [8], [9, 79, 32, 38] * 6]


def assert_same_tokens(theirs: torch.nn.Module, new: int = 200) -> None:
    model = hf.ours(theirs).eval()
    alone = [dsmini.generate(model, [torch.tensor(prompt)], new).tokens[0].tolist() for prompt in PROMPTS]
    for prompt, got in zip(PROMPTS, alone, strict=True):
        want = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert got == want[0].tolist()
    together = dsmini.generate(model, [torch.tensor(prompt) for prompt in PROMPTS], new)
    rows = zip(together.tokens.tolist(), together.lengths.tolist(), strict=True)
    assert [row[:length] for row, length in rows] == alone


def test_forty_tokens() -> None:
    assert_same_tokens(hf.v3(3, max_position_embeddings=256), new=40)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["v3", "no query compression", "yarn", "one group, weights as they are"])
def test_v3(case: str) -> None:
    assert_same_tokens(hf.v3(3, max_position_embeddings=256, **CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_v2(method: str) -> None:
    groups = {"n_group": 1, "topk_group": 1} if method == "greedy" else {}
    assert_same_tokens(hf.v2(4, max_position_embeddings=256, topk_method=method, norm_topk_prob=False, **groups))


@pytest.mark.parametrize(
    "case", ["v3.2", *(pytest.param(case, marks=pytest.mark.slow) for case in ("yarn", "no query compression"))]
)
def test_v32(case: str) -> None:
    assert_same_tokens(hf.v32(4, max_position_embeddings=256, **SPARSE[case]), new=60)
