"""An FP8 layer saves codes for backward once, whatever the number of Linears that read them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini.nn import MLA, Attention, Experts, MoE, Projection
from dsmini.nn.fp8 import FP8FeedForward
from tests.conftest import randomise
from tests.helpers.configs import FP8_SIZES as SIZES
from tests.helpers.watching import saved_for_backward, storage_bytes


def codes_of(module: nn.Module, x: Tensor) -> list[int]:
    """Return the bytes of each storage of codes that a forward saves. Rounded twice, x would be saved twice."""
    with saved_for_backward() as saved:
        module(x)
    return storage_bytes([t for t in saved if t.dtype in (torch.float8_e4m3fn, torch.uint8)])


def weights(module: nn.Module) -> list[int]:
    """Bytes of the codes of every rounded matrix."""
    rounded = (m for m in module.modules() if isinstance(m, Projection | Experts))
    return [p.numel() for m in rounded for p in m.parameters(recurse=False)]


def an_input() -> Tensor:
    return torch.randn(2, 35, SIZES["dim"], dtype=torch.bfloat16, requires_grad=True)


N, DIM = 70, SIZES["dim"]  # tokens of an_input


WO = N * SIZES["n_heads"] * SIZES["v_head_dim"] * 12 // 8
"""Bytes of the input of wo, at 12 bits a number."""
LAYERS: dict[str, tuple[Any, dict[str, Any], list[int]]] = {
    # x for both projections, and what the norms make of them
    "mla": (MLA, {}, [N * DIM, N * SIZES["q_lora_rank"], N * SIZES["kv_lora_rank"], WO]),
    "mla, full query": (MLA, {"q_lora_rank": None}, [N * DIM, N * SIZES["kv_lora_rank"], WO]),
    "mha": (Attention, {"attention": "mha"}, [N * DIM, WO]),
    "gqa": (Attention, {"attention": "gqa", "n_kv_heads": 2}, [N * DIM, WO]),
    # x, and gate and up, from which the rest is computed again
    "feed-forward": (FP8FeedForward, {}, [N * DIM, *[N * SIZES["inter_dim"]] * 2]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_keeps_its_input_once(name: str) -> None:
    layer, changes, want = LAYERS[name]
    module = randomise(layer(**SIZES | changes))
    assert codes_of(module, an_input()) == sorted([*want, *weights(module)])


@pytest.mark.parametrize("k", [1, 3])
def test_a_moe_quantises_its_input_once_for_all_experts(k: int) -> None:
    moe = randomise(MoE(**SIZES, n_routed_experts=4, n_activated_experts=k, n_expert_groups=1, n_limited_groups=1))
    kept = codes_of(moe, an_input().float())  # in FP32 no rows are padding
    assert moe.shared_experts is not None
    hidden, shared = SIZES["moe_inter_dim"], moe.shared_experts.w1.weight.shape[0]
    routed = [N * k * DIM, *[N * k * hidden] * 2]
    assert kept == sorted([*routed, N * DIM, *[N * shared] * 2, *weights(moe)])
