"""precision="fp8": what is rounded and what stays out, that all ways through agree, and layers that hold codes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini import Transformer, ops
from dsmini.nn import Experts, Linear, Projection
from dsmini.nn.fp8 import FP8Experts, FP8Linear, QuantizedLinear, hold_fp8
from dsmini.numerics import WEIGHT_TILE, QuantizedTensor, quantize, round_tiles
from dsmini.numerics.dispatch import dispatch_quantized, sort_by_expert
from tests.conftest import randomise
from tests.helpers.configs import DSA, V4, refusal
from tests.helpers.configs import FP8_SIZES as SIZES
from tests.helpers.models import decoded, same_weights
from tests.helpers.tolerances import E4M3_UNIT, relative_error
from tests.helpers.watching import Operations

Build = Callable[..., Transformer]


def hold(model: Any, name: str = "weight") -> QuantizedTensor:
    """Let a parameter be FP8 codes, and return them."""
    q = quantize(model.get_parameter(name).detach(), WEIGHT_TILE)
    hold_fp8(model, name, q.codes, q.scales)
    return q


def test_only_attention_and_feed_forwards_are_rounded(small_model: Build) -> None:
    for changes in ({}, {"attention": "mha"}, DSA):
        model = small_model(precision="fp8", **changes)
        rounded = {name for name, m in model.named_modules() if isinstance(m, FP8Linear | FP8Experts)}
        plain = {name for name, m in model.named_modules() if type(m) is Linear}
        assert plain == {"head", "mtp.0.eh_proj", "mtp.1.eh_proj"}
        assert rounded == {n for n, m in model.named_modules() if isinstance(m, Projection | Experts)} - plain
        assert all(".attn." in f".{name}." or ".ffn." in f".{name}." for name in rounded)
        after_attention = {name for name, m in model.named_modules() if getattr(m, "saved_format", "") == "e5m6"}
        assert after_attention == {name for name in rounded if name.endswith(".wo")}


def test_no_layer_of_v4_reads_what_attention_gave(small_model: Build) -> None:
    """wo_a lies between attention and wo_b, so that no input is saved in 12 bits."""
    model = small_model(precision="fp8", **V4)
    assert {m.saved_format for m in model.modules() if isinstance(m, FP8Linear)} == {"e4m3"}


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_dense_model_equals_rounded_weights_and_inputs(small_model: Build, attention: str) -> None:
    """The native model whose weights are rounded once, and whose Linears get rounded inputs."""
    model = small_model(**SIZES, attention=attention, n_dense_layers=4)
    native = same_weights(model, precision="native")

    def round_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (round_tiles(inputs[0].detach(), (1, 128), "ue8m0", "e4m3", 1e-4, torch.float32),)

    for name, module in native.named_modules():
        if isinstance(module, Projection) and not name.endswith(("head", "eh_proj")):
            with torch.no_grad():
                module.weight.copy_(round_tiles(module.weight, WEIGHT_TILE, "ue8m0", "e4m3", 1e-4, torch.float32))
            module.register_forward_pre_hook(round_input)
    tokens = torch.randint(0, 61, (2, 16))
    got, want = model.run(tokens, mtp=True), native.run(tokens, mtp=True)
    # the same numbers but for the order of sums; where that moves a code to its neighbour, one of many terms moves
    for a, b in zip([got.logits, *got.mtp_logits], [want.logits, *want.mtp_logits], strict=True):
        assert relative_error(a, b) < E4M3_UNIT * 0.1


@pytest.mark.parametrize("align", [1, 64])
def test_dispatched_rows_are_the_tokens_and_padding_is_zero(align: int) -> None:
    x = torch.randn(100, 200)
    x[0] = torch.nan  # which a copy of a token in padding would spread
    x.requires_grad_()
    indices = torch.randint(0, 4, (100, 2))
    slots = sort_by_expert(indices, 4, align)
    q = quantize(x)
    values, all_rows = dispatch_quantized(q, slots).dequantize(), dataclasses.replace(q, source=None).dequantize()
    assert torch.equal(values[slots.slot.flatten()].nan_to_num(7), all_rows.repeat_interleave(2, 0).nan_to_num(7))
    padding = torch.ones(len(slots.token), dtype=torch.bool).index_fill(0, slots.slot.flatten(), False)
    assert padding.any() == (align > 1)
    assert (values[padding] == 0).all()
    direction = torch.randn_like(values)
    (grad,) = torch.autograd.grad(values, x, direction)
    assert torch.allclose(grad, direction[slots.slot].sum(1), atol=1e-6)


SPARSE = DSA | {"precision": "fp8", "indexer_fp8": True}


@pytest.mark.parametrize(
    ("changes", "form", "near"),
    [(SIZES, "expanded", 0.02), (SIZES, "absorbed", 4), (SPARSE, "expanded", 0.1)],
    ids=["expanded", "absorbed", "sparse"],
)
def test_cached_equals_uncached(small_model: Build, changes: dict[str, Any], form: str, near: float) -> None:
    """Tiles lie along a token's own width, so that it is rounded alike in any company. Absorbed, the up-projection's
    input is not rounded: it is made into no product of its own. An indexer chooses the same keys."""
    model, tokens = small_model(**changes, n_dense_layers=2, n_mtp_layers=0), torch.randint(0, 61, (2, 24))
    got = decoded(model, tokens, (9, 1, 1, 5, 8), form=form)
    assert relative_error(got, model(tokens)) < near * E4M3_UNIT


def test_layers_that_hold_codes_multiply_them_and_are_plain_before() -> None:
    x = torch.randn(5, 200)
    linear, quantized, plain = randomise(FP8Linear(200, 130)), randomise(QuantizedLinear(200, 130)), Linear(200, 130)
    want, q = linear(x), hold(linear)
    assert torch.equal(linear(x), want)  # the codes are those that it multiplied before
    assert torch.equal(linear.dense(torch.float32), q.dequantize())
    assert "codes that cannot be drawn" in refusal(linear.reset_parameters)
    plain.load_state_dict(quantized.state_dict())
    assert torch.equal(quantized.to(torch.float32).train()(x), plain(x))
    q = hold(quantized)
    with ops.use("eager"):  # a kernel adds in another order
        assert torch.equal(quantized.eval()(x), torch.nn.functional.linear(x, q.dequantize()))


def test_fp4_experts_convert_the_scales_of_the_chosen_alone() -> None:
    chosen, block, c = 2, 32, {"dim": 64, "moe_inter_dim": 96, "n_routed_experts": 16}
    model = nn.Sequential(Experts(**c))
    for name in ("w1", "w2", "w3"):
        weight = model.get_parameter(f"0.{name}").detach()
        q = quantize(weight, (1, block), "ue8m0", "e2m1")
        scales = q.scales.to(torch.float8_e8m0fnu)
        hold_fp8(model, f"0.{name}", q.codes, scales, tile=(1, block), format="e2m1")
    x, indices = torch.randn(1, c["dim"]), torch.tensor([[3, 11]])
    with torch.no_grad(), Operations() as watched:
        model[0](x, indices, torch.ones(1, chosen))
    of_a_matrix = c["dim"] * c["moe_inter_dim"]
    converted = [r for r in watched.results if r.operation == "_to_copy" and r.numel < of_a_matrix]
    # their scales, and their codes, two in a byte
    assert sum(r.numel for r in converted) == 3 * chosen * (of_a_matrix // block + of_a_matrix // 2)


def test_holding_fp8_keeps_a_subclass_from_losing_its_forward() -> None:
    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class OtherExperts(Experts):
        pass

    said = refusal(hold, nn.Sequential(Doubled(200, 130)), "0.weight")
    assert said.startswith("a Doubled has a forward of its own;") and said.endswith("derive it from QuantizedLinear")
    said = refusal(hold, nn.Sequential(OtherExperts()), "0.w1")
    assert said.startswith("a OtherExperts has") and said.endswith("derive it from QuantizedExperts")


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_recomputation_runs_on_the_backend_of_forward(small_model: Build, backend: str) -> None:
    """Backward may come when another backend is in force."""
    model = small_model()
    tokens = torch.randint(0, 61, (2, 20))
    with ops.use(backend):
        loss = model.losses(tokens[:, :-1], tokens[:, 1:], recompute=True).total
    with ops.use("eager" if backend == "reference" else "reference"):
        got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with ops.use(backend):
        total = model.losses(tokens[:, :-1], tokens[:, 1:]).total
        want = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
