"""The habits of docs/pytorch-habits.md, which names a test for each: those that have none elsewhere."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from dsmini import MoE, Transformer, ops
from dsmini.nn.fp8 import hold_all_fp8
from tests.conftest import SMALL, randomise
from tests.helpers.configs import DSA, V4_MODEL
from tests.helpers.models import decoded, gradients, same_weights, tokens_of
from tests.helpers.tolerances import BF16_UNIT, FP32_MODEL, relative_error, rounding


def settled(**changes: Any) -> Transformer:
    """Return a model with no scores so close that another rounding picks another expert."""
    model = randomise(Transformer(**(SMALL | changes)))
    for gate in model.gates():
        if gate.bias is not None:
            gate.bias.copy_(2.0 * torch.randperm(8))
    return model


@pytest.fixture
def model() -> Transformer:
    return settled()


@pytest.fixture
def tokens() -> Tensor:
    return tokens_of(2, 13)


Parameters = dict[str, Tensor]


def stateless(model: Transformer) -> tuple[Parameters, Callable[[Parameters, Tensor], Tensor]]:
    """Return the parameters, and the loss of one row of tokens as a function of them."""
    buffers = dict(model.named_buffers())

    def loss(parameters: Parameters, row: Tensor) -> Tensor:
        options = {"targets": row[None, 1:], "balance_alpha": 0.1}
        return functional_call(model, (parameters, buffers), (row[None, :-1],), options).total

    return {name: p.detach() for name, p in model.named_parameters()}, loss


@pytest.mark.parametrize("changes", [{}, DSA, V4_MODEL], ids=["mla", "dsa", "V4"])
def test_vmap_of_grad_gives_a_gradient_per_sample(changes: dict[str, Any]) -> None:
    model, tokens = settled(**changes), tokens_of(2, 23)
    parameters, loss = stateless(model)
    got = vmap(grad(loss), (None, 0))(parameters, tokens)
    for i, row in enumerate(tokens):
        want = gradients(model, model.losses(row[None, :-1], row[None, 1:], balance_alpha=0.1).total)
        large = [name for name in want if "hc_" not in name]  # gradients of streams are sums that nearly cancel
        assert all(relative_error(got[name][i], want[name]) < FP32_MODEL for name in large)
        every = [torch.cat([g.flatten() for g in side]) for side in ([got[name][i] for name in want], want.values())]
        assert relative_error(*every) < FP32_MODEL


def test_jvp_is_the_gradient_times_the_direction(model: Transformer, tokens: Tensor) -> None:
    parameters, loss = stateless(model)
    direction = {name: torch.randn_like(p) * p.abs() for name, p in parameters.items()}
    _, slope = jvp(lambda p: loss(p, tokens[0]), (parameters,), (direction,))
    slopes = grad(loss)(parameters, tokens[0])
    parts = torch.stack([(slopes[name] * direction[name]).sum() for name in slopes])
    assert abs(slope - parts.sum()) < FP32_MODEL * parts.norm()


def test_fp8_in_torch_func_is_refused(tokens: Tensor) -> None:
    parameters, loss = stateless(Transformer(**SMALL, precision="fp8"))
    for transform in (grad(loss), lambda p, row: vmap(loss, (None, 0))(p, row[None])):
        with pytest.raises(RuntimeError, match=r"override the setup_context|Batching rule not"):  # torch's words
            transform(parameters, tokens[0])


def test_second_derivatives_run_on_the_reference(model: Transformer, tokens: Tensor) -> None:
    """A Hessian times a vector, next to the difference of two gradients in FP64."""
    model = model.double()
    weight = model.layers[1].ffn.experts.w1

    def slope() -> Tensor:
        return torch.autograd.grad(model.losses(tokens[:, :-1], tokens[:, 1:]).total, weight, create_graph=True)[0]

    def shifted(shift: float) -> Tensor:
        with torch.no_grad():
            weight.add_(shift)
        return slope().detach()

    with pytest.raises(ValueError, match=r"create_graph=True wants second derivatives, .*ops.use"):
        slope()
    with ops.use("reference"):
        (got,) = torch.autograd.grad(slope().sum(), weight)
        want = (shifted(1e-5) - shifted(-2e-5)) / 2e-5
    assert relative_error(got, want) < 1e-5  # the difference leaves out terms of 1e-10, and rounding of 1e-16 / 1e-5


@pytest.mark.slow
def test_export_with_any_length(model: Transformer, tokens: Tensor) -> None:
    length = torch.export.Dim("length", min=2, max=SMALL["max_seq_len"])
    exported = torch.export.export(model, (tokens,), dynamic_shapes=({1: length},)).module()
    for s in (5, 13):
        assert relative_error(exported(tokens[:, :s]), model(tokens[:, :s])) < FP32_MODEL


@pytest.mark.slow
def test_export_of_v4_with_the_length_of_the_example() -> None:
    model, tokens = settled(**V4_MODEL), tokens_of(2, 23)
    exported = torch.export.export(model, (tokens,)).module()
    assert relative_error(exported(tokens), model(tokens)) < FP32_MODEL


@pytest.mark.parametrize("held", [False, True])
def test_export_of_fp8_experts_is_refused(held: bool) -> None:
    model = hold_all_fp8(MoE(**SMALL).eval()) if held else MoE(**SMALL, precision="fp8")
    with pytest.raises(Exception, match=r"no version for torch.func and torch.export; use a model without FP8"):
        torch.export.export(model, (torch.zeros(2, 3, 24),))


def test_autocast_changes_nothing_but_the_products(model: Transformer, tokens: Tensor) -> None:
    want = model.losses(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        got = model.losses(tokens[:, :-1], tokens[:, 1:])
    assert got.total.dtype == torch.float32 and all(r.weights.dtype == torch.float32 for r in got.routing)
    assert abs(got.total - want.total) < rounding(BF16_UNIT, chained=30) * want.total
    got.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("cast", "unit"), [("half", 2.0**-11), ("bfloat16", BF16_UNIT)])
def test_short_models_keep_norms_and_gates_in_fp32(model: Transformer, tokens: Tensor, cast: str, unit: float) -> None:
    want, before = model(tokens), model.state_dict()
    short = getattr(copy.deepcopy(model), cast)()
    kept = {name: t for name, t in short.state_dict().items() if t.dtype == torch.float32}
    assert kept.keys() == {name for name in before if "norm" in name or "gate." in name}
    assert all(torch.equal(t, before[name]) for name, t in kept.items())
    losses = short.losses(tokens[:, :-1], tokens[:, 1:])
    assert losses.total.dtype == torch.float32 and losses.total.isfinite()
    assert relative_error(short(tokens), want) < rounding(unit, chained=30)
    parts = decoded(short, tokens, (7, 1, 5))
    assert relative_error(parts, want) < rounding(unit, chained=30)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_shortened_double_models_keep_norms_and_gates_in_fp32(cast: str) -> None:
    model = getattr(Transformer(n_layers=2, hc_mult=2, n_mtp_layers=0).double(), cast)()
    assert model.norm.weight.dtype == torch.float32
    model(torch.arange(8)[None])


def test_copies_are_equal_and_independent(model: Transformer, tokens: Tensor) -> None:
    want = model(tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), same_weights(model)):
        assert torch.equal(other(tokens), want)
        with torch.no_grad():
            other.head.weight.zero_()
    assert torch.equal(model(tokens), want)


def test_checkpointing_changes_no_gradient(model: Transformer, tokens: Tensor) -> None:
    want = gradients(model, model.losses(tokens[:, :-1], tokens[:, 1:]).total)
    forwards = [(block, block.forward) for block in model.layers]
    for block, forward in forwards:
        block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
    theirs = gradients(model, model.losses(tokens[:, :-1], tokens[:, 1:]).total)
    ours = gradients(model, model.losses(tokens[:, :-1], tokens[:, 1:], recompute=True).total)
    for grads in (ours, theirs):
        assert all(torch.equal(grads[name], want[name]) for name in want)


def test_options_of_losses_need_targets(model: Transformer, tokens: Tensor) -> None:
    want = model.losses(tokens[:, :-1], tokens[:, 1:], mtp_weight=0.1)
    got = model(tokens[:, :-1], targets=tokens[:, 1:], mtp_weight=0.1)
    assert torch.equal(got.total, want.total)
    with pytest.raises(ValueError, match="mtp_weight: these are options of the losses; give targets too"):
        model(tokens, mtp_weight=0.1)
    with pytest.raises(ValueError, match="takes no attention_mask; it takes tokens, cache, lengths and documents"):
        model(tokens, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="targets do not go with a cache or lengths"):
        model(tokens, model.new_cache(2), targets=tokens)
