"""precision="fp8": what is rounded and what stays out, that all ways through agree, and layers that hold codes."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini import Transformer, ops
from dsmini.nn import Experts, Linear, MoE, Projection
from dsmini.nn.fp8 import FP8Experts, FP8Linear, QuantizedLinear, hold_fp8
from dsmini.numerics import WEIGHT_TILE, QuantizedTensor, quantize, round_tiles
from dsmini.numerics.dispatch import dispatch_quantized, sort_by_expert
from tests.conftest import randomise
from tests.helpers.configs import DSA, refusal
from tests.helpers.configs import FP8_SIZES as SIZES
from tests.helpers.models import decoded
from tests.helpers.tolerances import E4M3_UNIT, relative_error, rounding

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


def test_sparse_model_in_fp8_trains_and_decodes(small_model: Build) -> None:
    """Queries and keys of the indexer read rounded inputs; the same keys are chosen with a cache."""
    model, tokens = small_model(**DSA, precision="fp8", indexer_fp8=True, n_mtp_layers=0), torch.randint(0, 61, (1, 20))
    model.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".indexer." not in name)
    got = decoded(model, tokens, (7, 12, 1), form="expanded")
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


@pytest.mark.parametrize(
    ("precision", "linears"), [("fp8", (FP8Linear, FP8Linear)), ("native", (QuantizedLinear, Linear))]
)
@pytest.mark.parametrize("n", [1, 2, 50])
def test_gradients_pass_what_holds_fp8_as_if_its_values_were_frozen(n: int, precision: Any, linears: Any) -> None:
    experts = {"n_routed_experts": 8, "n_activated_experts": 3, "n_expert_groups": 1, "n_limited_groups": 1}
    moe, (linear, frozen) = randomise(MoE(**SIZES | {"precision": precision}, **experts)), (k(128, 8) for k in linears)
    want: Any = copy.deepcopy(moe)
    for name in ("w1", "w2", "w3"):
        getattr(want.experts, name).data = hold(moe, f"experts.{name}").dequantize()
    frozen.weight.data = hold(linear).dequantize()
    for held, dense, m in ((moe, want, SIZES["dim"]), (linear, frozen, 128)):
        x = torch.randn(n, m, requires_grad=True)
        ys = [y[0] if isinstance(y, tuple) else y for y in (held(x), dense(x))]
        got, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in ys)
        assert expected.norm() > 0 and relative_error(got, expected) < 1e-5
    assert "codes that cannot be drawn" in refusal(linear.reset_parameters)


def test_layers_that_hold_codes_multiply_them_and_are_plain_before() -> None:
    x = torch.randn(5, 200)
    linear, quantized, plain = randomise(FP8Linear(200, 130)), randomise(QuantizedLinear(200, 130)), Linear(200, 130)
    want, q = linear(x), hold(linear)
    assert torch.equal(linear(x), want)  # the codes are those that it multiplied before
    assert torch.equal(linear.dense(torch.float32), q.dequantize())
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
