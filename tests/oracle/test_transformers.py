"""Logits and gradients equal those of transformers."""

from typing import Any

import hf
import pytest
import torch
from torch import Tensor

from dsmini import Transformer

LOGITS = 1e-5
GRADIENTS = 1e-4

CASES: dict[str, dict[str, Any]] = {
    "v3": {},
    "no query compression": {"q_lora_rank": None},
    "yarn": {"rope_parameters": hf.yarn()},
    "yarn, one temperature": {"rope_parameters": hf.yarn(mscale=1.0, mscale_all_dim=1.0), "q_lora_rank": None},
    "yarn, kimi's ramp": {"rope_parameters": hf.yarn(beta_fast=1, rope_theta=50000.0, factor=32.0)},
    "yarn, no temperature": {"rope_parameters": {k: v for k, v in hf.yarn().items() if "mscale" not in k}},
    "all dense": {"first_k_dense_replace": 3},
    "all moe": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "one group, weights as they are": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "grouped products": {"hidden_size": 64, "moe_intermediate_size": 32},
}


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
