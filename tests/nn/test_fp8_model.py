"""precision="fp8": what is rounded and what stays out, and that all ways through agree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini import Transformer, ops
from dsmini.nn import Experts, Linear, MoE, Projection
from dsmini.nn.fp8 import FP8Experts, FP8Linear, QuantizedLinear, hold_fp8
from dsmini.numerics import (
    AMAX_MIN,
    WEIGHT_TILE,
    QuantizedTensor,
    fp8_matmul,
    fp8_swiglu_matmul,
    quantize,
    round_tiles,
)
from dsmini.numerics.dispatch import dispatch_quantized, sort_by_expert
from tests.conftest import randomise
from tests.helpers.configs import DSA, refusal
from tests.helpers.configs import FP8_SIZES as SIZES
from tests.helpers.tolerances import BF16_UNIT, E4M3_UNIT, FP32_UNIT, relative_error, rounding

Build = Callable[..., Transformer]
EXPERTS = {"n_routed_experts": 8, "n_activated_experts": 3, "n_expert_groups": 1, "n_limited_groups": 1}


def hold(model: Any, name: str = "weight", scale: Any = "ue8m0") -> QuantizedTensor:
    """Let a parameter be FP8 codes, and return them."""
    q = quantize(model.get_parameter(name).detach(), WEIGHT_TILE, scale)
    hold_fp8(model, name, q.codes, q.scales)
    return q


def test_only_attention_and_feed_forwards_are_rounded(small_model: Build) -> None:
    for changes in ({}, {"attention": "mha"}, DSA):
        model = small_model(precision="fp8", **changes)
        rounded = {name for name, m in model.named_modules() if isinstance(m, FP8Linear | FP8Experts)}
        plain = {name for name, m in model.named_modules() if type(m) is Linear}
        inside = {".attn.", ".ffn."}
        assert plain == {"head", "mtp.0.eh_proj", "mtp.1.eh_proj"}
        linears = {name for name, m in model.named_modules() if isinstance(m, Projection | Experts)} - plain
        assert rounded == linears
        assert all(any(part in f".{name}." for part in inside) for name in rounded)
        after_attention = {name for name, m in model.named_modules() if getattr(m, "saved_format", "") == "e5m6"}
        assert after_attention == {name for name in rounded if name.endswith(".wo")}


def test_sparse_model_in_fp8_trains_and_decodes(small_model: Build) -> None:
    """Queries and keys of the indexer read rounded inputs; the same picks serve a cache."""
    model, tokens = small_model(**DSA, precision="fp8", indexer_fp8=True, n_mtp_layers=0), torch.randint(0, 61, (1, 20))
    model.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".indexer." not in name)
    cache = model.new_cache(1, form="expanded")
    got = torch.cat([model(part, cache) for part in tokens.split((7, 12, 1), 1)], 1)
    assert relative_error(got, model(tokens)) < E4M3_UNIT * 0.1


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_dense_model_equals_rounded_weights_and_inputs(small_config: Any, attention: str) -> None:
    """The native model whose weights are rounded once, and whose Linears get rounded inputs."""
    config = small_config(**SIZES, attention=attention, n_dense_layers=4)
    model = randomise(Transformer(config))
    native = Transformer(dataclasses.replace(config, precision="native"))
    native.load_state_dict(model.state_dict())

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [7, 300])
def test_experts_equal_one_feed_forward_each(n: int, dtype: torch.dtype) -> None:
    moe = randomise(MoE(**SIZES, **EXPERTS))
    assert moe.shared_experts is not None
    x = torch.randn(n, 256, dtype=dtype, requires_grad=True)
    y, routing = moe(x)
    dy = torch.randn_like(y)
    named = dict(moe.named_parameters())
    got = torch.autograd.grad(y, [x, *named.values()], dy)

    shared = moe.shared_experts
    total = shared(x)
    weights = moe.gate(x).weights
    for j in range(8):
        token, choice = (routing.indices == j).nonzero(as_tuple=True)
        rows = x[token]
        gate, up = fp8_matmul(rows, moe.experts.w1[j]), fp8_matmul(rows, moe.experts.w3[j])
        out = fp8_swiglu_matmul(gate, up, moe.experts.w2[j])
        total = total.index_add(0, token, (out * weights[token, choice, None]).to(dtype))
    want = torch.autograd.grad(total, [x, *named.values()], dy)
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    tolerance = rounding(unit, chained=6) + rounding(FP32_UNIT, terms=300)
    assert relative_error(y, total) < tolerance
    for name, a, b in zip(["x", *named], got, want, strict=True):
        # a gradient of another rounding moves some codes of the next product to their neighbours
        assert relative_error(a, b) < tolerance + E4M3_UNIT * 0.1, name


@pytest.mark.parametrize("align", [1, 64])
def test_dispatched_rows_are_the_tokens_and_padding_is_zero(align: int) -> None:
    x = torch.randn(100, 200, requires_grad=True)
    indices = torch.randint(0, 4, (100, 2))
    counts = indices.flatten().bincount(minlength=4)
    slots = sort_by_expert(indices, counts, align)
    q = quantize(x)
    rows = dispatch_quantized(q, slots)
    values, all_rows = rows.dequantize(), q.detach().dequantize()
    assert torch.equal(values[slots.slot.flatten()], all_rows.repeat_interleave(2, 0))
    padding = torch.ones(len(slots.token), dtype=torch.bool).index_fill(0, slots.slot.flatten(), False)
    assert padding.any() == (align > 1)
    assert (values[padding] == 0).all()
    direction = torch.randn_like(values)
    (grad,) = torch.autograd.grad(values, x, direction)
    assert torch.allclose(grad, direction[slots.slot].sum(1), atol=1e-6)


def test_nan_of_one_token_stays_out_of_padding() -> None:
    x = torch.randn(200, 128)
    x[0] = torch.nan
    indices = torch.tensor([[0], *[[1]] * 199])
    slots = sort_by_expert(indices, indices.flatten().bincount(minlength=2), 64)
    rows = dispatch_quantized(quantize(x), slots).dequantize()
    assert rows.isnan().any(1).sum() == 1


def test_recomputation_and_repetition_change_no_bit() -> None:
    model = randomise(Transformer(**SIZES, n_layers=2, compute_dtype=torch.bfloat16))
    tokens, targets = torch.randint(0, 256, (2, 2, 64)).unbind()

    def gradients(**options: Any) -> list[Tensor]:
        total = model.losses(tokens, targets, **options).total
        return [total, *torch.autograd.grad(total, list(model.parameters()), allow_unused=True)]

    first = gradients()
    for again in (gradients(), gradients(recompute=True)):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_cached_equals_uncached(form: Any) -> None:
    """Tiles lie along a token's own width, so that it is rounded alike in any company. Absorbed, the up-projection's
    input is not rounded: it is made into no product of its own."""
    model = randomise(Transformer(**SIZES, n_layers=2, n_dense_layers=2, n_mtp_layers=0)).eval()
    tokens = torch.randint(0, 256, (2, 24))
    with torch.no_grad():
        want = model(tokens)
        cache = model.new_cache(2, 32, form=form)
        parts = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 5, 8], 1)]
    error = relative_error(torch.cat(parts, 1), want)
    assert error < (E4M3_UNIT * 0.02 if form == "expanded" else rounding(E4M3_UNIT))


def test_an_fp8_linear_multiplies_codes_it_holds() -> None:
    linear, x = randomise(FP8Linear(200, 130)), torch.randn(5, 200)
    want = linear(x)
    q = hold(linear)
    assert torch.equal(linear(x), want)
    assert torch.equal(linear.dense(torch.float32), q.dequantize())


@pytest.mark.parametrize("n", [1, 2, 50])
def test_what_holds_fp8_refuses_a_gradient(n: int) -> None:
    moe, linear = randomise(MoE(**SIZES, **EXPERTS)), FP8Linear(128, 8)
    for name in ("w1", "w2", "w3"):
        hold(moe, f"experts.{name}")
    hold(linear)
    x = torch.randn(n, 128, requires_grad=True)
    for y in (moe(torch.randn(n, 256, requires_grad=True))[0], linear(x), linear(quantize(x))):
        assert "codes that no gradient can move" in refusal(y.sum().backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_weight_is_the_one_that_is_multiplied(dtype: torch.dtype) -> None:
    linear, experts = randomise(FP8Linear(200, 130)), randomise(FP8Experts(**SIZES, **EXPERTS))
    for weight, got in ((linear.weight, linear.dense(dtype)), (experts.w1[1], experts.expert(1, dtype)[0])):
        assert torch.equal(got, round_tiles(weight.detach(), WEIGHT_TILE, "ue8m0", "e4m3", AMAX_MIN, dtype))


def test_codes_held_with_fp32_scales_are_not_rounded_to_bf16() -> None:
    linear, x = randomise(FP8Linear(200, 130)).eval(), torch.randn(50, 200).bfloat16()
    q = hold(linear, scale="fp32")
    assert torch.equal(linear(x), fp8_matmul(x, q, out_dtype=torch.float32).bfloat16())


@pytest.mark.parametrize("saved_format", ["e4m3", "e5m6"])
def test_a_linear_keeps_its_input_in_the_saved_format(saved_format: Any) -> None:
    linear = randomise(FP8Linear(200, 130, saved_format=saved_format))
    x, dy = torch.randn(150, 200), torch.randn(150, 130)
    grads = {
        format: torch.autograd.grad(fp8_matmul(x, linear.weight, saved_format=format), linear.weight, dy)[0]
        for format in ("e4m3", "e5m6")
    }
    (got,) = torch.autograd.grad(linear(x), linear.weight, dy)
    assert torch.equal(got, grads[saved_format])
    assert not torch.equal(grads["e4m3"], grads["e5m6"])


def test_quantized_layers_are_built_and_used_like_plain_ones() -> None:
    """Before they hold codes they are Linear and Experts; they move, train and deepcopy."""
    quantized, plain, x = randomise(QuantizedLinear(200, 130)), Linear(200, 130), torch.randn(5, 200)
    plain.load_state_dict(quantized.state_dict())
    assert torch.equal(quantized.to(torch.float32).train()(x), plain(x))
    q = hold(quantized)
    with ops.use("eager"):  # a kernel adds in another order
        assert torch.equal(quantized.eval()(x), torch.nn.functional.linear(x, q.dequantize()))


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
