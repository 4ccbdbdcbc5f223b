"""Logits and gradients equal those of transformers."""

from typing import Any

import hf
import pytest
import torch
from torch import Tensor

import dsmini
from dsmini import Transformer

LOGITS = 1e-5
GRADIENTS = 1e-4

CASES = hf.cases("v3")


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Check and print the relative error over the whole tensor; pytest -rP shows it."""
    error = ((got - want).norm() / want.norm()).item()
    print(f"{error:.1e} {what}")
    assert error < tolerance, what


def assert_equals_theirs(model: Transformer, theirs: Any) -> None:
    """Compare logits, and the gradients of a random projection of them; indexers have none."""
    tokens = tokens_for(theirs)
    want, got = theirs(tokens).logits, model(tokens)
    assert_close(got, want, LOGITS, "logits")
    target = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    (want * target).sum().backward()
    (got * target).sum().backward()
    grads = hf.gradients(theirs)
    for name, parameter in model.named_parameters():
        if grads[name].norm() > 0:
            assert parameter.grad is not None, name
            assert_close(parameter.grad, grads[name], GRADIENTS, f"gradient of {name}")
        else:
            assert parameter.grad is None or parameter.grad.norm() == 0, name


def tokens_for(model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 61), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str) -> None:
    theirs = hf.v3(3, **CASES[case])
    assert_equals_theirs(hf.ours(theirs), theirs)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_v2_softmax_routing(method: str) -> None:
    groups = {"n_group": 1, "topk_group": 1} if method == "greedy" else {}
    theirs = hf.v2(4, topk_method=method, norm_topk_prob=False, routed_scaling_factor=16.0, **groups)
    assert_equals_theirs(hf.ours(theirs), theirs)


# --- greedy generation from the cache equals transformers token for token

V2 = {"norm_topk_prob": False}
PROMPTS = [[3, 14, 15, 92, 65, 35], [8], [9, 79, 32, 38] * 6]


# the number of new tokens, the maker of transformers' model, and changes of it
MODELS: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "forty of v3": (40, hf.v3, {}),
    "sixty of v3.2": (60, hf.v32, hf.cases("v32")["v3.2"]),
    **{f"v3, {case}": (200, hf.v3, CASES[case]) for case in ("v3", "no query compression", "yarn")},
    "v3, one group": (200, hf.v3, CASES["one group, weights as they are"]),
    "v2, greedy": (200, hf.v2, V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "v2, groups": (200, hf.v2, V2 | {"topk_method": "group_limited_greedy"}),
    "v3.2, yarn": (60, hf.v32, hf.cases("v32")["yarn"]),
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
