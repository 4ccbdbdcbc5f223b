"""The habits of docs/pytorch-habits.md, which names a test for each: those that have none elsewhere.

The second half replaces children of a model by wrappers, peft's LoRA, nn.Linear and subclasses: all readers of weights
see them.
"""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import dsmini
from dsmini import MoE, Transformer, ops
from dsmini.nn import FP8Linear, Linear
from dsmini.nn.fp8 import QuantizedLinear, hold_all_fp8, hold_fp8
from dsmini.nn.layers import is_plain
from tests.conftest import SMALL, randomise
from tests.helpers.configs import DSA, V4, V4_MODEL, refusal
from tests.helpers.models import decoded, gradients, same_weights, tokens_of
from tests.helpers.tolerances import BF16_UNIT, FP32_MODEL, relative_error, rounding

Build = Callable[..., Transformer]


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


# --- children of a model replaced by others


class Added(nn.Module):
    """A wrapper, as LoRA has it: base(x) + x D^T."""

    def __init__(self, base: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Parameter(delta)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.delta.T


class AddedLinear(Linear):
    """The same as a subclass."""

    delta: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.delta.T


class Shifted(nn.Module):
    """The same as a parametrization of the weight."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


def subclass(base: Any, delta: Tensor) -> nn.Module:
    layer = AddedLinear(base.in_features, base.out_features)
    layer.weight, layer.delta = base.weight, nn.Parameter(delta)
    return layer


def hook(base: Any, delta: Tensor) -> nn.Module:
    base.register_forward_hook(lambda _, inputs, out: out + inputs[0] @ delta.T)
    return base


def torch_linear(base: Any, delta: Tensor) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter((base.weight + delta).detach())
    return layer


KINDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "wrapper": Added,
    "subclass": subclass,
    "parametrization": lambda base, delta: parametrize.register_parametrization(base, "weight", Shifted(delta)),
    "hook": hook,
    "nn.Linear": torch_linear,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mla": {},
    "without q_lora": {"q_lora_rank": None},
    "gqa": {"attention": "gqa", "n_kv_heads": 1},
    "V4": V4 | {"n_dense_layers": 1},
}
SLOW = [
    (kind, config) for kind in KINDS for config in CONFIGS if kind != "wrapper" and config in ("without q_lora", "gqa")
]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *((kind, "mla") for kind in KINDS),
        *(("wrapper", "without q_lora"), ("wrapper", "gqa"), ("wrapper", "V4")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_replaced_linears_are_seen_by_all_that_reads_weights(kind: str, config: str) -> None:
    """Every Linear is replaced, the head included, and compared with a model of merged weights."""
    model = randomise(Transformer(**SMALL | CONFIGS[config]))
    want = same_weights(model)
    for name in [name for name, module in model.named_modules() if isinstance(module, Linear)]:
        base: Any = model.get_submodule(name)
        delta = torch.randn_like(base.weight) * base.weight.shape[1] ** -0.5
        want.get_submodule(name).weight = nn.Parameter((base.weight + delta).detach())
        model.set_submodule(name, KINDS[kind](base, delta))
    assert not is_plain(model.head) and not is_plain(model.layers[0].ffn.w2)
    tokens = tokens_of(2, 13)
    expected = want(tokens)
    assert relative_error(model(tokens), expected) < FP32_MODEL
    got = decoded(model, tokens, (7, 1, 5))
    assert relative_error(got, expected) < FP32_MODEL
    got, losses = (m.losses(tokens[:, :-1], tokens[:, 1:]) for m in (model, want))
    assert torch.allclose(got.total, losses.total, rtol=FP32_MODEL)
    texts = [dsmini.generate(m, [[1, 2, 3], [4]], 6, speculative=True).tokens for m in (model, want)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_head_and_embedding_learn_and_decode(dtype: torch.dtype) -> None:
    model: Any = randomise(Transformer(**SMALL)).to(dtype)
    want = same_weights(model).to(dtype)
    model.head, model.embed = nn.Sequential(nn.Linear(24, 61, bias=False)), nn.Sequential(nn.Embedding(61, 24))
    model.head[0].weight, model.embed[0].weight = want.head.weight, want.embed.weight
    assert model.new_cache(1).nbytes == want.new_cache(1).nbytes and model.device == want.device
    if dtype == torch.float32:
        tokens, leaves = tokens_of(2, 13), [want.head.weight, want.embed.weight]
        totals = [m.losses(tokens[:, :-1], tokens[:, 1:]).total for m in (model, want)]
        grads = [torch.autograd.grad(total, leaves) for total in totals]
        assert all(relative_error(a, b) < FP32_MODEL for a, b in zip(*grads, strict=True))
    for head in (model.head, want.head):
        model.head = head
        for speculative in (False, True):
            texts = [dsmini.generate(m, [[5, 3, 8], [1]], 8, speculative=speculative).tokens for m in (model, want)]
            # another head in BF16 gets states in BF16, and may find another token the likeliest
            assert texts[0].shape == texts[1].shape
            assert torch.equal(*texts) or (head is not want.head and dtype == torch.bfloat16)


def test_a_linear_that_holds_codes_keeps_sizes_and_hooks() -> None:
    plain, heard = Linear(130, 3), []
    layers = nn.ModuleList([plain])
    plain.register_forward_hook(lambda *_: heard.append("hook"))
    hold_fp8(layers, "0.weight", torch.zeros(3, 130).to(torch.float8_e4m3fn), torch.ones(1, 2))
    layer: Any = layers[0]
    assert type(layer) is QuantizedLinear and (layer.in_features, layer.out_features) == (130, 3)
    assert plain.weight.dtype == torch.float32 and layer.weight.dtype == torch.float8_e4m3fn
    layer(torch.zeros(1, 130))
    assert heard == ["hook"]


def test_a_layer_with_a_bias_is_expanded_and_absorbed_refuses_it() -> None:
    model = randomise(Transformer(**SMALL))
    model.layers[0].attn.wkv_b = nn.Linear(10, 33)
    tokens = torch.randint(0, 61, (1, 9))
    assert relative_error(decoded(model, tokens, (7, 1, 1)), model(tokens)) < FP32_MODEL
    said = refusal(model, tokens, model.new_cache(1, form="absorbed"))
    assert said == "form='absorbed' reads the weight of wkv_b, here a Linear; use form='expanded' or 'auto'"


class Reads(nn.Module):
    """Computes with what its base reads, as LoRA does, and changes nothing."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(1.0 * x)


@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_replaced_fp8_linears_quantize_on_their_own(q_lora_rank: int | None) -> None:
    """A wrapper that adds nothing changes no bit, wherever it stands."""
    sizes: dict[str, Any] = SMALL | {"n_mtp_layers": 0, "q_lora_rank": q_lora_rank}
    model = randomise(Transformer(**sizes, precision="fp8"))
    tokens = torch.randint(0, 61, (2, 9))
    want = model.losses(tokens[:, :-1], tokens[:, 1:])
    linears = [name for name, module in model.named_modules() if type(module) is FP8Linear]
    assert len(linears) == 14 + (q_lora_rank is not None) * 2
    for name in linears:
        base = model.get_submodule(name)
        model.set_submodule(name, Reads(base))
        assert torch.equal(model.losses(tokens[:, :-1], tokens[:, 1:]).total, want.total), name
        model.set_submodule(name, base)


@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_backward_hook_of_a_linear_is_called(precision: str) -> None:
    model, tokens = Transformer(**SMALL, precision=precision), tokens_of(2, 12)
    names, seen = ("head", "layers.0.attn.wkv_b", "layers.0.ffn.w2"), set[str]()
    for name in names:
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.add(name))
    model.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert seen == set(names)


# --- tools for nn.Linear find the layers that hold numbers, and no layer that holds FP8 codes


def test_linear_is_torchs_and_layers_in_fp8_are_not() -> None:
    linear = dsmini.Linear(5, 3)
    assert isinstance(linear, nn.Linear) and linear.bias is None and [*linear.state_dict()] == ["weight"]
    assert not isinstance(FP8Linear(5, 3), nn.Linear) and not isinstance(QuantizedLinear(5, 3), nn.Linear)
    assert all(map(is_plain, (linear, FP8Linear(5, 3), QuantizedLinear(5, 3))))
    (held,) = hold_all_fp8(nn.Sequential(linear))
    assert not isinstance(held, nn.Linear) and isinstance(held, QuantizedLinear) and held.holds_fp8


ATTENTION = r".*\.attn\.w\w+"
"""The recipe of docs/pytorch-habits.md: matrices of attention itself, not of an indexer or a compressor in it."""


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"attention": "gqa", "n_kv_heads": 1}, DSA, V4_MODEL],
    ids=["mla", "direct query", "gqa", "dsa", "V4"],
)
def test_one_recipe_of_lora_fits_every_attention(small_model: Build, changes: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft library")
    model, tokens = small_model(**changes).eval(), torch.randint(0, 61, (2, 12))
    want = [name for name, _ in model.named_modules() if re.fullmatch(ATTENTION, name)]
    attentions = [*model.layers, *(depth.block for depth in model.mtp)]
    assert len(want) == sum(isinstance(part, nn.Linear) for block in attentions for part in block.attn.children())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
    adapted.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(grads) == 2 * len(want) and all(grad is not None and grad.any() for grad in grads)
    trained, rows = adapted(tokens), dsmini.generate(model, tokens, 6).tokens
    merged = adapted.merge_and_unload()
    assert relative_error(merged(tokens), trained) < 1e-5 and torch.equal(
        dsmini.generate(merged, tokens, 6).tokens, rows
    )


def test_peft_refuses_layers_in_fp8(small_model: Build) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft library")
    with pytest.raises(ValueError, match=r"FP8Linear.*is not supported"):
        peft.get_peft_model(small_model(precision="fp8"), peft.LoraConfig(target_modules=["wkv_b"]))
