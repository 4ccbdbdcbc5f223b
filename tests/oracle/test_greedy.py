"""Greedy generation from the cache equals transformers token for token."""

from typing import Any

import hf
import pytest
import torch
from test_sparse_attention import CASES as SPARSE
from test_transformers import CASES

import dsmini

V2 = {"norm_topk_prob": False}
PROMPTS = [[3, 14, 15, 92, 65, 35], [8], [9, 79, 32, 38] * 6]


# the number of new tokens, the maker of transformers' model, and changes of it
MODELS: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "forty of v3": (40, hf.v3, {}),
    "sixty of v3.2": (60, hf.v32, SPARSE["v3.2"]),
    **{f"v3, {case}": (200, hf.v3, CASES[case]) for case in ("v3", "no query compression", "yarn")},
    "v3, one group": (200, hf.v3, CASES["one group, weights as they are"]),
    "v2, greedy": (200, hf.v2, V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "v2, groups": (200, hf.v2, V2 | {"topk_method": "group_limited_greedy"}),
    "v3.2, yarn": (60, hf.v32, SPARSE["yarn"]),
}
QUICK, SLOW = [*MODELS][:2], [*MODELS][2:]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_tokens_are_those_of_transformers(name: str) -> None:
    new, make, changes = MODELS[name]
    theirs = make(3, max_position_embeddings=256, **changes)
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
