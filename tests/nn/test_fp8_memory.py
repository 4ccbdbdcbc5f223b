"""An FP8 layer saves codes for backward once, whatever the number of Linears that read them."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini import Transformer, ops
from dsmini.measure.memory import saved_for_backward
from dsmini.nn import MLA, Attention, Experts, FeedForward, Linear, MoE
from dsmini.numerics import quantization
from tests.conftest import randomise
from tests.helpers.configs import FP8_SIZES as SIZES
from tests.helpers.configs import released


class Codes:
    """The codes that a forward saves: bytes of every storage, and the shapes that were quantized."""

    def __init__(self, module: nn.Module, *inputs: Tensor) -> None:
        self.made: list[tuple[int, ...]] = []
        kept: dict[int, Tensor] = {}
        reference = quantization.quantize_tiles

        def make(x: Tensor, *arguments: Any, **options: Any) -> Any:
            self.made.append(tuple(x.shape))
            return reference(x, *arguments, **options)

        def keep(t: Tensor) -> Tensor:
            t = t.detach()  # a graph that is held from within itself is never freed
            if t.dtype in (torch.float8_e4m3fn, torch.uint8):
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantization, "quantize_tiles", make)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                module(*inputs)
        self.kept = sorted(t.untyped_storage().nbytes() for t in kept.values())


def weights(module: nn.Module) -> list[int]:
    """Bytes of the codes of every rounded matrix."""
    rounded = (m for m in module.modules() if isinstance(m, Linear | Experts))
    return [p.numel() for m in rounded for p in m.parameters(recurse=False)]


def an_input() -> Tensor:
    return torch.randn(2, 35, SIZES["dim"], dtype=torch.bfloat16, requires_grad=True)


N, DIM = 70, SIZES["dim"]  # tokens of an_input


@pytest.mark.parametrize(
    ("q_lora_rank", "after"), [(SIZES["q_lora_rank"], [SIZES["q_lora_rank"]]), (None, [])], ids=["low_rank", "full"]
)
def test_mla_keeps_its_input_once(q_lora_rank: int | None, after: list[int]) -> None:
    mla = randomise(MLA(**(SIZES | {"q_lora_rank": q_lora_rank})))
    codes = Codes(mla, an_input())
    # x for both projections, what the norms make of them, and the input of wo at 12 bits a number
    widths = [DIM, *after, SIZES["kv_lora_rank"]]
    wo = N * SIZES["n_heads"] * SIZES["v_head_dim"] * 12 // 8
    assert codes.kept == sorted([*[N * w for w in widths], wo, *weights(mla)])
    assert codes.made.count((2, 35, DIM)) == 1


@pytest.mark.parametrize("attention", ["mha", "gqa"])
def test_attention_keeps_its_input_once(attention: Any) -> None:
    kv = {"n_kv_heads": 2} if attention == "gqa" else {}
    baseline = randomise(Attention(**SIZES, attention=attention, **kv))
    codes = Codes(baseline, an_input())
    wo = N * SIZES["n_heads"] * SIZES["v_head_dim"] * 12 // 8
    assert codes.kept == sorted([N * DIM, wo, *weights(baseline)])
    assert codes.made.count((2, 35, DIM)) == 1


def test_a_feed_forward_keeps_its_input_once() -> None:
    dense = randomise(FeedForward(**SIZES))
    codes = Codes(dense, an_input())
    # x, and gate and up, from which the rest is computed again
    assert codes.kept == sorted([N * DIM, *[N * SIZES["inter_dim"]] * 2, *weights(dense)])
    assert codes.made.count((2, 35, DIM)) == 1


@pytest.mark.parametrize("k", [1, 3])
def test_a_moe_quantises_its_input_once_for_all_experts(k: int) -> None:
    moe = randomise(MoE(**SIZES, n_routed_experts=4, n_activated_experts=k, n_expert_groups=1, n_limited_groups=1))
    codes = Codes(moe, an_input().float())  # in FP32 no rows are padding
    assert moe.shared_experts is not None
    hidden, shared = SIZES["moe_inter_dim"], moe.shared_experts.w1.weight.shape[0]
    routed = [N * k * DIM, *[N * k * hidden] * 2]
    assert codes.kept == sorted([*routed, N * DIM, *[N * shared] * 2, *weights(moe)])
    assert codes.made.count((N, DIM)) == 1


def test_fp8_linears_save_at_most_0_6_of_bf16_bytes() -> None:
    config = released("fp8")
    tokens = torch.randint(0, 256, (5, 257))
    kept = {}
    for precision in ("native", "fp8"):
        model = Transformer(dataclasses.replace(config, precision=precision), compute_dtype=torch.bfloat16)
        with ops.use("eager"):  # kernels save less of BF16 experts
            kept[precision] = saved_for_backward(model, tokens)
    share, whole = (fp8 / bf16 for fp8, bf16 in zip(kept["fp8"], kept["native"], strict=True))
    assert 0.25 < share < 0.6, kept
    assert whole < 0.75, kept
