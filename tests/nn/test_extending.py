"""A researcher's change stays local: each is made here in under 25 lines, trained for a step, and decoded."""

import copy
import dataclasses
import functools
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import dsmini
from dsmini import MLA, Attention, Block, Gate, Linear, ModelConfig, MoE, Transformer
from dsmini.inference.fused import Decoder
from dsmini.nn import Aux, CompressedAttention, Context, LayerCache, Routing, dsa_layers, route
from dsmini.nn.fp8 import FP8FeedForward
from dsmini.nn.gate import HashGate
from tests import reference_model as reference
from tests.conftest import SMALL, randomise
from tests.helpers.configs import DSA, V4, V4_MODEL, refusal
from tests.helpers.models import decoded, same_weights, set_stage, tokens_of
from tests.helpers.tolerances import FP32_MODEL, relative_error

WINDOW = 6
ALL_LAYERS = SMALL["n_layers"] + SMALL["n_mtp_layers"]


class ScaledResidual(Block):
    """A block whose additions are weighed by a learned number for each, as in ReZero (Bachlechner et al. 2020)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Aux]:
        read, mix = self.hc_attn.read(x)
        y, indexer_loss = self.attend(self.attn_norm(read), context)
        x = self.hc_attn.write(x, self.alpha[0] * y, mix)
        read, mix = self.hc_ffn.read(x)
        y, routing = self.feed_forward(self.ffn_norm(read), context)
        return self.hc_ffn.write(x, self.alpha[1] * y, mix), Aux(routing, indexer_loss)


class OneStream(Block):
    """A block that knows one residual stream."""

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Aux]:
        x = x + self.attend(self.attn_norm(x), context)[0]
        return x + self.feed_forward(self.ffn_norm(x), context)[0], Aux()


class Collapsing(Block):
    """A block that gives one of the streams that it gets."""

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Aux]:
        x, aux = super().forward(x, context)
        return x[:, :, 0], aux


class WithoutOrder(Block):
    """A block that takes all tokens to be at position 0."""

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Aux]:
        assert context is not None
        return super().forward(x, dataclasses.replace(context, positions=context.positions * 0))


class WithoutAux(Block):
    """A block that forgets what it found."""

    def forward(self, x: Tensor, context: Context | None = None) -> Any:
        return super().forward(x, context)[0]


class TupleGate(Gate):
    """A gate that returns a plain tuple."""

    def forward(self, x: Tensor) -> Any:
        return tuple(super().forward(x))


class AttentionWithoutPositions(nn.Module):
    """Multi-query attention without rotary embedding (NoPE, Kazemnejad et al. 2023)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.d, self.v = c.n_heads, c.qk_nope_head_dim, c.v_head_dim
        self.wq, self.wkv = Linear(c.dim, c.n_heads * self.d), Linear(c.dim, self.d + self.v)
        self.wo = Linear(c.n_heads * self.v, c.dim)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        q = self.wq(x).unflatten(-1, (self.n_heads, self.d)).transpose(1, 2)
        rows, mask = self.wkv(x), torch.ones(x.shape[1], x.shape[1]).tril().bool()
        if context is not None and (cache := context.cache) is not None:
            cache.append((rows,))
            rows = cache.store.read(cache.at.n_keys, x.dtype)
            mask = cache.at.positions[:, None, :, None] >= torch.arange(cache.at.n_keys)
        k, v = rows.unsqueeze(1).split((self.d, self.v), -1)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.wo(y.transpose(1, 2).flatten(2))

    def new_cache(self, b: int, t: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        return LayerCache(b, t, self.d + self.v, dtype, device)


def sliding(queries: Tensor, keys: Tensor) -> Tensor:
    """Hide the keys more than WINDOW - 1 tokens before a query."""
    return queries - keys >= WINDOW


class SoftplusGate(Gate):
    """A gate that scores experts by sqrt(softplus(logit)), as DeepSeek-V4's do."""

    def forward(self, x: Tensor) -> Routing:
        logits = F.linear(x.float(), self.weight)
        return route(logits, self.bias, **self.options | {"score_func": lambda logits: F.softplus(logits).sqrt()})


def check_training_and_decoding(model: Transformer, changed: str, layers: int = ALL_LAYERS) -> None:
    """One step lowers the loss and moves the parameters of that name; a cache answers as the whole sequence does."""
    tokens = tokens_of(2, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if changed in name}
    losses = []
    for _ in range(2):
        losses.append(model.losses(tokens[:, :-1], tokens[:, 1:]).total)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert len(before) >= layers
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert relative_error(decoded(model, tokens, (7, 1, 12)), model(tokens)) < FP32_MODEL


@pytest.mark.parametrize("parts", [{}, V4_MODEL], ids=["one stream", "V4"])
def test_another_residual_rule_is_a_subclass_of_block(parts: dict[str, Any]) -> None:
    model = randomise(Transformer(**SMALL | parts, make_block=ScaledResidual))
    check_training_and_decoding(model, "alpha")
    plain = Transformer(**SMALL | parts)
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("alpha")}
    plain.load_state_dict(state)
    tokens = tokens_of(1, 9)
    assert not torch.equal(plain(tokens), model(tokens))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("alpha"):
                p.fill_(1.0)
    assert torch.equal(plain(tokens), model(tokens))


def test_another_residual_rule_trains_the_indexers_too() -> None:
    """Its block gets a pair from attention, whether the indexer learns or not."""
    tokens, model = tokens_of(2, 20), randomise(Transformer(**SMALL | DSA, make_block=ScaledResidual))
    for stage, layers in (("warmup", ALL_LAYERS), ("sparse", ALL_LAYERS), (None, 0)):
        indexers = set_stage(model, stage).losses(tokens[:, :-1], tokens[:, 1:]).indexers
        assert len(indexers) == layers and all(loss.kl > 0 for loss in indexers)
    layer = dsa_layers(set_stage(model, "sparse"))[0]
    assert isinstance(layer(torch.randn(1, 20, SMALL["dim"])), Tensor), "a loss that nobody asks for"


def test_a_rope_of_ones_own_is_that_of_its_layer() -> None:
    """Layers may turn by different angles, as V4's do, in training and in every way to decode."""
    model, tokens = randomise(Transformer(**SMALL)), tokens_of(2, 20)
    before = model(tokens)
    layer: Any = model.layers[1].attn
    layer.rope = dataclasses.replace(layer.rope, rope_theta=50.0)
    want, cache = model(tokens), model.new_cache(2)
    assert relative_error(want, before) > FP32_MODEL
    states = [Decoder(model).states(part, cache).normed for part in tokens.split((17, 1, 2), 1)]
    assert relative_error(model.head(torch.cat(states, 1)), want) < FP32_MODEL


def test_another_attention_class_is_handed_to_transformer() -> None:
    make_block = functools.partial(Block, attention_class=AttentionWithoutPositions)
    model = randomise(Transformer(**SMALL, make_block=make_block))
    assert all(isinstance(block.attn, AttentionWithoutPositions) for block in model.layers)
    assert all(isinstance(mtp.block.attn, AttentionWithoutPositions) for mtp in model.mtp)
    check_training_and_decoding(model, "attn.wkv")
    width = model.layers[0].attn.wkv.out_features
    assert model.new_cache(2, 16, torch.float32).nbytes_per_token == 4 * SMALL["n_layers"] * width
    model.layers[1].attn = nn.Identity()
    assert "Identity makes no cache; give it new_cache(" in refusal(model.new_cache)


def masked_model(layer: Any = MLA, /, **changes: Any) -> Transformer:
    """Return a random model whose layers are given the mask."""
    make_block = functools.partial(Block, attention_class=functools.partial(layer, mask=sliding))
    return randomise(Transformer(**SMALL | changes, make_block=make_block))


@pytest.mark.parametrize(("attention", "form"), [("mla", "expanded"), ("mla", "absorbed"), ("gqa", "auto")])
def test_mask_hides_keys_with_and_without_a_cache(attention: str, form: Any) -> None:
    gqa = {"attention": "gqa", "n_kv_heads": 1}
    model = masked_model() if attention == "mla" else masked_model(Attention, **gqa)
    check_training_and_decoding(model, "attn.wo")
    tokens = tokens_of(2, 23)
    distance = torch.arange(23)[:, None] - torch.arange(23)
    seen = ((distance >= 0) & (distance < WINDOW))[None]
    (want, *ahead), _ = reference.model(copy.deepcopy(model).double(), tokens, model.config, seen)
    cache = model.new_cache(2, form=form, mtp=True)
    parts = [model.run(part, cache, mtp=True) for part in tokens.split((9, 1, 13), 1)]
    for got in (torch.cat([p.logits for p in parts], 1), model(tokens)):
        assert relative_error(got, want) < FP32_MODEL
    assert relative_error(torch.cat([p.mtp_logits[0] for p in parts], 1)[:, 1:-1], ahead[0][:, :-1]) < FP32_MODEL
    # rows of different lengths: padding, here after the end of the cache, sees no key and must not spread NaN
    cache = model.new_cache(2, 16, form=form)
    padded = model(tokens[:, :10], cache, torch.tensor([4, 10]))
    again = model(tokens[:, 9:21], cache, torch.tensor([12, 1]))
    assert padded.isfinite().all() and again.isfinite().all()
    row = torch.cat((tokens[:1, :4], tokens[:1, 9:21]), 1)
    assert relative_error(again[:1], model(row)[:, 4:]) < FP32_MODEL
    both = model.states(tokens[:1], documents=(torch.arange(23) >= 8).long()[None]).normed
    alone = torch.cat([model.states(part).normed for part in tokens[:1].split((8, 15), 1)], 1)
    assert relative_error(both, alone) < FP32_MODEL


def test_bad_mask_is_refused_in_a_sentence() -> None:
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    attention = functools.partial(MLA, mask=lambda q, k: (q - k >= 2) | (q == k))
    model = Transformer(**SMALL, make_block=functools.partial(Block, attention_class=attention))
    for cache in (None, model.new_cache(1, form="expanded"), model.new_cache(1, form="absorbed")):
        assert refusal(model, tokens, cache).startswith("mask hides all keys from the query at position 0")
    # each of a mask and documents lets every query see one key, both together not all of them
    layer = MLA(**SMALL, mask=lambda q, k: (q == k) & (q > 0))
    context = Context(positions=torch.arange(6)[None], documents=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    want = "mask hides all keys from the query at position 3; let each query see itself"
    assert refusal(layer, torch.randn(1, 6, SMALL["dim"]), context) == want
    wrong: Any = lambda q, k: (q - k >= 2).float()  # noqa: E731
    said = refusal(MLA(**SMALL, mask=wrong), torch.randn(1, 6, SMALL["dim"]))
    assert said == "mask returned torch.float32; want bool, True for keys that a query may not see"
    for kind in (MLA, Attention):
        unchecked: Any = inspect.unwrap(kind.__init__)  # without the type checks of these tests
        said = refusal(unchecked, kind.__new__(kind), mask=torch.ones(3, 3))
        assert said.startswith("mask is a Tensor, want a function") and "use lambda q, k: hidden[q, k]" in said


def model_with_gate(gate_class: Any) -> Transformer:
    moe_class = functools.partial(MoE, gate_class=gate_class)
    return Transformer(**SMALL, make_block=functools.partial(Block, moe_class=moe_class))


def test_another_gate_is_handed_to_transformer() -> None:
    model = randomise(model_with_gate(SoftplusGate))
    assert len(model.gates()) == ALL_LAYERS - SMALL["n_dense_layers"]
    check_training_and_decoding(model, "gate.weight", ALL_LAYERS - SMALL["n_dense_layers"])
    routing = model.run(tokens_of(1, 9)).routing
    assert all((r.scores > 0).all() and (r.scores.max() > 1) for r in routing)  # beyond what a sigmoid gives
    by_config = same_weights(model, score_func=lambda logits: F.softplus(logits).sqrt())
    tokens = tokens_of(1, 9)
    assert torch.equal(by_config(tokens), model(tokens))


class Dropping(FP8FeedForward):
    def forward(self, x: Any, *more: Any) -> Any:
        return super().forward(F.dropout(x, 0.1, self.training), *more)


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def test_fp8_layers_take_a_shared_expert_of_ones_own_and_computed_weights() -> None:
    model, tokens = Transformer(n_layers=2, n_mtp_layers=0, precision="fp8"), torch.arange(8)[None]
    model.layers[1].ffn.shared_experts = Dropping(model.config)
    before = model(tokens)
    register_parametrization(model.layers[0].attn.wo, "weight", Scaled())
    model(tokens).sum().backward()
    assert not torch.equal(model(tokens), before)
    assert model.layers[0].attn.wo.parametrizations.weight.original.grad.abs().sum() > 0


def test_a_block_that_two_layers_share_has_one_gate_for_both() -> None:
    model, tokens = Transformer(n_layers=4, n_mtp_layers=0), torch.arange(8)[None]
    model.layers[2] = model.layers[1]
    gates = model.gates()
    assert len(gates) == len(model.losses(tokens, tokens).routing) == 3 and gates[0] is gates[1] is not gates[2]


def model_of_v4(make_block: Any) -> Transformer:
    return Transformer(**SMALL | V4_MODEL, make_block=make_block)


def test_a_block_of_v4_alone_begins_equal_streams() -> None:
    c = ModelConfig(**SMALL | V4_MODEL)
    block, x = randomise(Block(c, layer=1)), torch.randn(2, 9, c.dim)
    y, aux = block(x)
    assert aux.routing is not None and torch.equal(y, block(x[:, :, None].expand(-1, -1, c.hc_mult, -1))[0])


def test_wrong_parts_are_refused_in_a_sentence() -> None:
    unchecked: Any = inspect.unwrap  # a function without the type checks of these tests
    of_moe, of_gate, shapes = unchecked(MoE.forward), unchecked(Gate.logits), ((2, 5, 24), (5, 23), (24,))
    model, moe, gate = Transformer(**SMALL, make_block=WithoutAux), MoE(**SMALL, gate_class=TupleGate), Gate(**SMALL)
    for words, call, *arguments in (
        ("WithoutAux.forward returned a Tensor; a block returns the pair (x, Aux", model, tokens_of(2, 9)),
        ("TupleGate.forward returned a tuple; a gate returns a Routing of", of_moe, moe, torch.zeros(1, 9, 24)),
        ("gate_class is Linear, want Gate, a class derived from it, or a function", model_with_gate, nn.Linear),
        ("attend got [2, 9, 4, 24], residual streams; want [b, s, m]", model_of_v4(OneStream), tokens_of(2, 9)),
        (
            "Collapsing.forward returned hidden states [2, 9, 24] for [2, 9, 4, 24]",
            model_of_v4(Collapsing),
            tokens_of(2, 9),
        ),
        ("make_block is MLA, want Block, a class derived from it, or", functools.partial(Transformer, make_block=MLA)),
        *(("want [n, 24], a row for each token", of_gate, gate, torch.zeros(shape)) for shape in shapes),
    ):
        assert words in refusal(call, *arguments)


@pytest.mark.parametrize("change", [ScaledResidual, AttentionWithoutPositions, SoftplusGate, sliding])
def test_each_change_takes_under_25_lines(change: Any) -> None:
    assert len(inspect.getsource(change).splitlines()) < 25


@pytest.mark.parametrize("changed", [0, 1])
def test_a_block_may_have_positions_of_its_own(changed: int) -> None:
    """And leaves those of the other blocks, before and after it, as they are."""

    def make_block(c: ModelConfig, layer: int) -> Block:
        return (WithoutOrder if layer == changed else Block)(c, layer=layer)

    plain = randomise(Transformer(**SMALL))
    other = same_weights(plain, make_block=make_block)
    tokens = tokens_of(1, 9)
    x, context = plain.embed(tokens), Context(positions=torch.arange(9)[None], tokens=tokens)
    for i, block in enumerate(plain.layers):
        at = context.positions * 0 if i == changed else context.positions
        x = block(x, Context(positions=at, tokens=tokens))[0]
    assert relative_error(other(tokens), plain.head(plain.norm(x))) <= FP32_MODEL
    assert relative_error(other(tokens), plain(tokens)) > 1e-3


class Counted(CompressedAttention):
    """V4's attention in a class of its own."""


def test_a_class_of_compressed_attention_gets_the_ratio_of_its_layer() -> None:
    c = ModelConfig(**(SMALL | V4))
    for kind in (Counted, functools.partial(Counted)):
        model = Transformer(c, make_block=functools.partial(Block, attention_class=kind))
        assert [type(block.attn) for block in model.layers] == [Counted] * c.n_layers
        assert [block.attn.m for block in model.layers] == [block.attn.m for block in Transformer(c).layers]


def test_multi_token_prediction_with_a_cache_gives_gates_their_ids() -> None:
    moe = functools.partial(MoE, gate_class=HashGate)
    c = ModelConfig(**SMALL)
    model = Transformer(c, make_block=functools.partial(Block, moe_class=moe)).eval()
    tokens = tokens_of(2, 9)
    for gate in model.gates():
        gate.make_table(torch.ones(c.vocab_size, dtype=torch.int64))
    want, cache = model.run(tokens, mtp=True), model.new_cache(2, mtp=True)
    parts = [model.run(part, cache, mtp=True) for part in tokens.split((4, 1, 4), 1)]
    for k in range(c.n_mtp_layers):
        got = torch.cat([part.mtp_logits[k] for part in parts], 1)[:, k + 1 :]
        assert relative_error(got, want.mtp_logits[k]) <= FP32_MODEL
    out = dsmini.generate(model, tokens, max_new_tokens=12, speculative=True)
    assert torch.equal(out.tokens, dsmini.generate(model, tokens, max_new_tokens=12).tokens)
