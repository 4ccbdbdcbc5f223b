"""Every layer's gradient against finite differences, in FP64, with respect to its inputs and all its parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from dsmini import MLA, MTP, Attention, FeedForward, ModelConfig, MoE, RMSNorm, Transformer
from dsmini.nn import DSA, Rope, apply_rope
from dsmini.nn.layers import rms_norm
from dsmini.nn.transformer import IGNORE
from tests.conftest import MODELS, randomise

TINY = MODELS["finite_differences"]
YARN: dict[str, Any] = {"original_seq_len": 8, "rope_factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3}
INDEX = {"index_n_heads": 2, "index_head_dim": 4, "index_topk": 3}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Layer(NamedTuple):
    """A layer, the sizes of its inputs, the part of its output that is checked, and whether all entries are."""

    make: Callable[[], nn.Module]
    inputs: Sequence[Sequence[int]]
    output: Callable[[Any], Any] = lambda y: y
    fast: bool = True


def tiny(kind: Any, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: kind(**TINY | changes)


def moe(**changes: Any) -> Layer:
    return Layer(tiny(MoE, **changes), [(1, 5, 5)], lambda out: (out[0], out[1].weights, out[1].scores))


LAYERS = {
    "rms_norm": Layer(lambda: RMSNorm(7), [(3, 7)], fast=False),
    "mla": Layer(tiny(MLA), [(2, 5, 5)]),
    "mla direct query": Layer(tiny(MLA, q_lora_rank=None), [(2, 5, 5)]),
    "mla yarn": Layer(tiny(MLA, **YARN), [(2, 5, 5)]),
    # no choice moves within a step; the indexer has no gradient of the output
    "dsa": Layer(tiny(DSA, **INDEX), [(2, 6, 5)]),
    "dsa direct query": Layer(tiny(DSA, **INDEX, q_lora_rank=None), [(2, 6, 5)]),
    "mha": Layer(tiny(Attention, attention="mha"), [(2, 5, 5)]),
    "gqa": Layer(tiny(Attention, attention="gqa", n_kv_heads=2), [(2, 5, 5)]),
    "mqa": Layer(tiny(Attention, attention="mqa"), [(2, 5, 5)]),
    "feed-forward": Layer(tiny(FeedForward), [(3, 5)], fast=False),
    "moe v3": moe(),
    "moe, weights as they are": moe(norm_topk_prob=False),
    "moe v2": moe(score_func="softmax", topk_method="group_limited_greedy"),
    "mtp": Layer(tiny(MTP), [(1, 5, 5), (1, 5, 5)], lambda out: out[0]),
}


def check(module: nn.Module, inputs: Sequence[Any], output: Any, only: Sequence[str], fast: bool = True) -> None:
    """gradcheck of output(module(*inputs)) with respect to the inputs and the parameters `only`."""
    parameters = {name: p for name, p in module.double().named_parameters() if name in only}
    assert len(parameters) == len(only)

    def run(*values: Any) -> Any:
        given, rest = values[: len(parameters)], values[len(parameters) :]
        return output(functional_call(module, dict(zip(parameters, given, strict=True)), rest))

    assert gradcheck(run, (*parameters.values(), *inputs), fast_mode=fast)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_layer(name: str) -> None:
    layer = LAYERS[name]
    module = randomise(layer.make())
    only = [name for name, _ in module.named_parameters() if not name.startswith("indexer.")]
    check(module, [rand(*size) for size in layer.inputs], layer.output, only, layer.fast)


def test_gradients_of_the_total_loss_of_a_whole_model() -> None:
    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = randomise(Transformer(ModelConfig(**TINY | YARN)))

        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return self.model.losses(tokens, targets, balance_alpha=0.5, recompute=True).total

    tokens, targets = torch.randint(0, 13, (2, 2, 5)).unbind()
    targets[0, 1] = IGNORE
    names = (
        *("embed.weight", "head.weight", "norm.weight", "layers.0.attn.wkv_b.weight", "layers.1.ffn.gate.weight"),
        *("layers.1.ffn.experts.w2", "layers.1.ffn_norm.weight", "mtp.0.eh_proj.weight", "mtp.0.block.ffn.gate.weight"),
    )
    check(Total(), [tokens, targets], lambda y: y, [f"model.{name}" for name in names])


def test_norms_and_rotations_of_bf16_round_only_their_result() -> None:
    """Computed in FP32 they are the exact result rounded, but for the few that lie halfway between two BF16 numbers."""
    norm, x = randomise(RMSNorm(64)), torch.randn(1, 130, 1, 64).bfloat16()
    cos, sin = Rope(dim=64).cos_sin(torch.arange(130))
    exact = [rms_norm(x.double(), norm.weight.double(), norm.eps), apply_rope(x.double(), (cos.double(), sin.double()))]
    for got, want in zip([norm(x), apply_rope(x, (cos, sin))], exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got != want.bfloat16()).double().mean() < 2**-9
