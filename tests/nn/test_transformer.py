"""The whole model: equations, causality, losses, dtypes, documents, MTP, and that no model or run disturbs another."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsmini import MLA, MTP, Attention, Block, Experts, FeedForward, Gate, ModelConfig, MoE, RMSNorm, Transformer, ops
from dsmini.nn import Embedding, Linear, Rope, linear_cross_entropy
from dsmini.nn.layers import FP32Linear
from dsmini.nn.transformer import IGNORE
from tests import reference_model as reference
from tests.conftest import SMALL, randomise
from tests.helpers import tolerances
from tests.helpers.configs import DSA, FP8_SIZES, GLM, V4_MODEL, refusal
from tests.helpers.models import gradients, same_weights, set_stage, tokens_of
from tests.helpers.strategies import model_configs
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, FP64_UNIT, MOVED, UNMOVED, relative_error, rounding
from tests.helpers.watching import Operations, saved_for_backward
from tests.nn.test_engram import CONFIGS as ENGRAMS

B, S, VOCAB = 2, 17, 61
Model = Callable[..., Transformer]
YARN: dict[str, Any] = {"original_seq_len": 8, "rope_factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3}


def batch() -> tuple[Tensor, Tensor]:
    stream = torch.randint(0, VOCAB, (B, S + 1))
    return stream[:, :-1], stream[:, 1:]


# the equations


def check_model(c: ModelConfig, s: int, documents: bool) -> None:
    """Compare routing, logits of all depths, losses and gradients with the reference, in FP64."""
    model = randomise(Transformer(c)).double()
    tokens, targets = torch.randint(0, c.vocab_size, (2, 2, s)).unbind()
    of = torch.randint(0, 2, (2, s)).cumsum(1) if documents else torch.zeros(2, s, dtype=torch.int64)
    seen = (of[:, :, None] == of[:, None, :]) & torch.ones(s, s).tril().bool()
    logits, routing = reference.model(model, tokens, c, seen)
    got = model.losses(tokens, targets, mtp_weight=0.5, balance_alpha=0.0, documents=of if documents else None)
    for mine, (indices, weights, scores) in zip(got.routing, routing, strict=True):
        assert torch.equal(mine.indices, indices)
        assert relative_error(mine.weights, weights) < UNMOVED and relative_error(mine.scores, scores) < UNMOVED
    if not documents:
        out = model.run(tokens, mtp=True)
        assert torch.equal(model.head(out.hidden), out.logits)
        assert all(relative_error(a, b) < UNMOVED for a, b in zip([out.logits, *out.mtp_logits], logits, strict=True))

    sums = [F.cross_entropy(x.mT, targets[:, k:], reduction="sum") / (2 * s) for k, x in enumerate(logits)]
    want = sums[0] + 0.5 * sum(sums[1:]) / max(len(sums) - 1, 1)
    assert relative_error(got.total, want) < UNMOVED
    grads, expected = gradients(model, got.total), gradients(model, want)
    largest = max(grad.norm().item() for grad in expected.values())
    assert all((grads[name] - grad).norm() <= UNMOVED * largest for name, grad in expected.items())


@pytest.mark.parametrize("examples", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_random_models_follow_the_reports(monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """The tables of RoPE are FP32. Here they are made in FP64, so that no near tie is decided otherwise."""
    frequencies = Rope.frequencies

    @settings(max_examples=examples, phases=[Phase.generate])  # to shrink an example takes minutes
    @given(model_configs(), st.integers(3, 18), st.booleans())
    def check(c: ModelConfig, s: int, documents: bool) -> None:
        c = dataclasses.replace(c, indexer_fp8=False)
        exact = reference.frequencies(c)
        assert relative_error(frequencies(Rope.from_config(c)), exact) < rounding(FP32_UNIT, terms=2)
        monkeypatch.setattr(Rope, "frequencies", lambda *_: exact)
        check_model(c, min(s, c.max_seq_len), documents)

    check()


@pytest.mark.parametrize("t", [0, 1, 2, 6, S - 1])
@pytest.mark.parametrize("changes", [{}, YARN, {"attention": "gqa", "n_kv_heads": 1}], ids=["mla", "yarn", "gqa"])
def test_a_changed_token_moves_nothing_before_it(small_model: Model, changes: dict[str, Any], t: int) -> None:
    """At depth k of multi-token prediction, position i sees the tokens up to i + k."""
    model = small_model(**changes).double()
    tokens = torch.stack([torch.randperm(VOCAB)[:S] for _ in range(B)])  # no token twice in a row
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % VOCAB
    before, after = ([out.logits, *out.mtp_logits] for out in (model.run(x, mtp=True) for x in (tokens, changed)))
    assert [logits.shape for logits in before] == [(B, S - k, VOCAB) for k in range(3)]
    for k, (a, b) in enumerate(zip(after, before, strict=True)):
        first = max(t - k, 0)
        assert relative_error(a[:, :first], b[:, :first]) < UNMOVED
        assert relative_error(a[1], b[1]) < UNMOVED
        for i in range(first, S - k):
            assert relative_error(a[0, i], b[0, i]) > MOVED, f"depth {k} at position {i} is blind to token {t}"


# losses


def test_total_is_main_and_the_weighted_others(small_model: Model) -> None:
    model = small_model()
    tokens, targets = batch()
    losses = model.losses(tokens, targets, mtp_weight=0.7, balance_alpha=0.3)
    assert losses.mtp > 1 and losses.balance > 1
    want = losses.main + 0.7 * losses.mtp + 0.3 * losses.balance
    assert relative_error(losses.total, want) <= rounding(FP32_UNIT, terms=3)
    assert torch.equal(model.losses(tokens, targets, mtp_weight=0.0, balance_alpha=0.0).total, losses.main)
    alone = small_model(n_dense_layers=2, n_mtp_layers=0).losses(tokens, targets)
    assert alone.routing == [] and alone.balance == alone.mtp == 0 and torch.equal(alone.total, alone.main)


RECOMPUTED: dict[str, tuple[dict[str, Any], Any, float]] = {
    "plain": ({}, None, 4),
    "streams": ({"hc_mult": 2}, None, 2),  # which are kept
    "fp8": (FP8_SIZES, None, 4),
    "warm-up of indexers": (DSA, "warmup", 4),
    "indexers": (DSA, "sparse", 4),
    # a source is computed again after the layers that it serves
    **{
        f"choices that are shared, {target}, {stage}": (GLM | {"indexer_target": target}, stage, 4)
        for target, stage in itertools.product(("own", "served"), ("warmup", "sparse"))
    },
}
"""Changes of a model, the stage of its indexers, and how many times less is saved."""


@pytest.mark.parametrize("case", RECOMPUTED)
def test_recomputation_changes_memory_and_not_one_bit(small_model: Model, case: str) -> None:
    changes, stage, less = RECOMPUTED[case]
    model = set_stage(small_model(**changes), stage)
    tokens, targets = batch()
    with saved_for_backward() as many:
        kept = model.losses(tokens, targets)
    with saved_for_backward() as few:
        again = model.losses(tokens, targets, recompute=True)
    assert sum(t.nbytes for t in few) < sum(t.nbytes for t in many) / less
    assert all(torch.equal(a, b) for a, b in zip(kept[:4], again[:4], strict=True))
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(kept.routing, again.routing, strict=True))
    a, b = gradients(model, kept.total), gradients(model, again.total)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_recomputation_draws_the_same_noise(small_model: Model) -> None:
    model = small_model()
    model.layers[0].attn.wo = nn.Sequential(model.layers[0].attn.wo, nn.Dropout(0.3))
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        found.append(gradients(model, model.losses(*batch(), recompute=recompute).total))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# dtypes


def test_compute_dtype_changes_activations_not_parameters(small_model: Model) -> None:
    model = small_model(n_dense_layers=4)
    short = same_weights(model, compute_dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    for block in short.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    tokens, targets = batch()
    losses = short.losses(tokens, targets)
    assert seen == [torch.bfloat16, torch.bfloat16]
    grads = gradients(short, losses.total)
    assert all(p.dtype == grads[n].dtype == torch.float32 for n, p in short.named_parameters())
    # some ten roundings to BF16 in each of a model's three blocks in a row
    assert relative_error(short(tokens), model(tokens)) <= rounding(BF16_UNIT, chained=30)
    want = gradients(model, model.losses(tokens, targets).total)
    assert all(relative_error(grads[n], want[n]) <= 2 * rounding(BF16_UNIT, chained=30) for n in want)


# building and calling


LAYERS: list[type[nn.Module]] = [Attention, Block, Experts, FeedForward, Gate, MLA, MTP, MoE, Transformer]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layer_is_built_from_a_config_or_from_plain_arguments(layer: Any) -> None:
    arguments = {"dim": 20, "n_heads": 2, "moe_inter_dim": 6, "inter_dim": 14}
    if layer is Attention:
        arguments |= {"attention": "mha"}
    built = [layer(ModelConfig(**arguments)), layer(**arguments), layer(ModelConfig(dim=20), **arguments)]
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in built]
    assert shapes[0] == shapes[1] == shapes[2]
    assert any(20 in shape for shape in shapes[0].values())
    assert "unknown key 'n_head' in the arguments; did you mean 'n_heads'" in refusal(layer, n_head=2)


def test_layers_show_their_sizes() -> None:
    routed = "Gate(192, 4 of 16 experts, 2 of 4 groups, sigmoid) Experts(192, 128, 16 experts)"
    layers = (Gate(), Experts(), Embedding(7, 4), Linear(5, 3), FP32Linear(5, 3))
    assert " ".join(map(str, layers)) == f"{routed} Embedding(7, 4) Linear(5, 3) FP32Linear(5, 3)"


def test_layers_run_alone() -> None:
    x = torch.randn(2, 9, 192)
    assert MLA()(x).shape == Attention()(x).shape == FeedForward()(x).shape == RMSNorm(192)(x).shape == x.shape
    assert MoE()(x)[0].shape == Block(layer=0)(x)[0].shape == MTP()(x, x)[0].shape == x.shape
    assert Gate()(x[0]).indices.shape == (9, 4)
    config = ModelConfig(original_seq_len=64, qk_rope_head_dim=8)
    assert Rope(dim=8, original_seq_len=64) == Rope.from_config(config), "the same defaults, written twice"


@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_a_model_cannot_read_is_refused(small_model: Model, backend: str | None) -> None:
    model, tokens = small_model(), torch.zeros(2, 33, dtype=torch.int64)
    assert model(tokens[:, :32]).shape == (2, 32, VOCAB)
    losses: Any = inspect.unwrap(type(model).losses)  # without the type checks of these tests
    with ops.use(backend):
        assert "33 tokens is longer than max_seq_len=32; shorten it" in refusal(model, tokens)
        want = "targets are (2, 9), tokens (2, 8); want a token or more, and a target for each"
        assert want in refusal(losses, model, tokens[:, :8], tokens[:, :9])
        assert "tokens (0, 8); want a token or more" in refusal(losses, model, tokens[:0, :8], tokens[:0, :8])
        for token in (VOCAB, -1, 10**6):
            tokens[1, 3] = token
            want = f"token id {token} is outside the vocabulary; want 0 to 60"
            assert want in refusal(model, tokens[:, :9])
            assert want in refusal(model.losses, tokens[:, :9], tokens[:, :9].clamp(0, 60))
            want = f"target id {token} is outside the vocabulary; want 0 to 60"
            assert want in refusal(model.losses, tokens[:, :9].clamp(0, 60), tokens[:, :9])


def test_routing_bias_is_saved_and_never_optimised(small_model: Model) -> None:
    model = small_model()
    biases = {name for name in model.state_dict() if name.endswith("gate.bias")}
    assert biases == {f"{block}.ffn.gate.bias" for block in ("layers.1", "mtp.0.block", "mtp.1.block")}
    assert set(model.state_dict()) == biases | {name for name, _ in model.named_parameters()}
    assert not biases & {name for name, _ in model.named_parameters()}


# --- documents packed into a row: logits as of separate sequences, and what is refused

LENGTHS = [9, 3, 4, 17, 7]
ERROR = 1e-6
"""Between packed and separate sequences in FP32, whose rotary angles are of other positions."""
MODELS = {"v3": {}, "v3.2": DSA | {"indexer_fp8": False}, "v4": V4_MODEL, **ENGRAMS}


def documents_of(lengths: list[int], rows: int = 2) -> Any:
    return torch.repeat_interleave(torch.tensor(lengths)).expand(rows, -1)


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_equal_those_of_separate_sequences(name: str) -> None:
    """All heads of multi-token prediction too, at the positions whose later tokens are of the same document."""
    model = randomise(Transformer(**SMALL | MODELS[name] | {"n_mtp_layers": 2, "max_seq_len": 64}))
    tokens, documents = tokens_of(2, sum(LENGTHS)), documents_of(LENGTHS)
    out = model.run(tokens, documents=documents, mtp=True)
    assert torch.equal(model(tokens, documents=documents), out.logits)
    assert relative_error(model(tokens), out.logits) > 1e-2
    start = 0
    for part in tokens.split(LENGTHS, 1):
        want = model.run(part, mtp=True)
        columns = slice(start, start + part.shape[1])
        assert relative_error(out.logits[:, columns], want.logits) < ERROR
        assert relative_error(out.hidden[:, columns], want.hidden) < ERROR
        for got, alone in zip(out.mtp_logits, want.mtp_logits, strict=True):
            assert relative_error(got[:, start : start + alone.shape[1]], alone) < ERROR
        start += part.shape[1]


def test_documents_in_forward_reach_the_losses() -> None:
    """A wrapper calls forward alone."""
    model = randomise(Transformer(**SMALL))
    tokens, documents = tokens_of(2, 12), documents_of([5, 7])
    assert torch.equal(
        model(tokens, targets=tokens, documents=documents).total,
        model.losses(tokens, tokens, documents=documents).total,
    )


def test_documents_that_are_none_are_refused_in_a_sentence() -> None:
    model, tokens = Transformer(**SMALL), tokens_of(2, 12)
    good = documents_of([5, 7])
    unchecked: Any = functools.partial(inspect.unwrap(Transformer.states), model)  # without type checks
    for wrong, got in (
        (good[:, :11], "torch.int64 [2, 11]"),
        (good[:1], "torch.int64 [1, 12]"),
        (good[0], "torch.int64 [12]"),
        (good.float(), "torch.float32 [2, 12]"),
        (good > 0, "torch.bool [2, 12]"),
        (good.tolist(), "list"),
    ):
        want = f"documents are {got}; want int64 [2, 12], the number of each token's document"
        assert refusal(unchecked, tokens, documents=wrong) == want
    back = good.clone()
    back[1, 9:] = 0
    want = (
        "documents go back from 1 to 0 at position 9 of row 1; a document is a run of equal numbers, and the next has "
        "a larger one: number them 0, 1, 2, ..."
    )
    for call in (model, model.run, functools.partial(model.losses, targets=tokens)):
        assert refusal(call, tokens, documents=back) == want
    assert model(tokens, documents=(3 * good - 1).int()).shape == (2, 12, SMALL["vocab_size"])
    assert "documents do not go with a cache" in refusal(model, tokens, model.new_cache(2), documents=good)


# --- multi-token prediction: what each depth is scored on


@pytest.mark.parametrize("ignored", [0, 4])
def test_mtp_loss_divides_by_the_count_of_the_main_loss(small_model: Model, ignored: int) -> None:
    """Report, equation 24: depth k is scored on token i + k + 1 at s - k positions, and divided by all s."""
    model = small_model().double()
    stream = torch.randint(0, VOCAB, (B, S + 1))
    tokens, targets = stream[:, :-1], stream[:, 1:].clone()
    targets.view(-1)[:ignored] = IGNORE
    want = 0.0
    for k, logits in enumerate(model.run(tokens, mtp=True).mtp_logits, 1):
        for i in range(S - k):
            want += F.cross_entropy(logits[:, i], targets[:, i + k], ignore_index=IGNORE, reduction="sum").item()
    got = model.losses(tokens, targets).mtp.item()
    assert got == pytest.approx(want / 2 / (B * S - ignored), rel=rounding(FP64_UNIT, terms=B * S * VOCAB))


def test_sequence_too_short_for_mtp_depth_raises(small_model: Model) -> None:
    model = small_model()
    assert len(model.run(torch.zeros(1, 3, dtype=torch.int64), mtp=True).mtp_logits) == 2
    with pytest.raises(ValueError, match="a sequence of 2 tokens is too short for MTP depth 2; want 3"):
        model.run(torch.zeros(1, 2, dtype=torch.int64), mtp=True)


# --- the chunked cross-entropy is torch's own, and no [n, vocab] tensor is made or kept

N, M, IDS = 23, 15, 1000


def problem(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a weight and targets, some of them ignored, the last id among them."""
    targets = torch.randint(0, IDS, (n,))
    targets[[0, 7, 8, n - 1]] = IGNORE
    targets[5] = IDS - 1
    hidden, weight = torch.randn(n, M, dtype=dtype), torch.randn(IDS, M, dtype=dtype) / M**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def torchs_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")


def products(seen: Operations) -> int:
    return sum(result.operation == "mm" for result in seen.results)


@pytest.fixture(params=[0, 7, N, 1000])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of rows of logits that exist at a time: one where less than a row fits."""
    monkeypatch.setattr("dsmini.functional.cross_entropy.CHUNK", request.param * IDS)
    return max(1, request.param)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_those_of_torchs_cross_entropy(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(dtype)
    got, want = linear_cross_entropy(hidden, weight, targets), torchs_own(hidden, weight, targets)
    assert got.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else rounding(FP32_UNIT, terms=IDS)
    tolerances.assert_agree(got, want, [hidden, weight], tolerance)


def test_bf16_weights_sum_the_gradients_of_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.functional.cross_entropy.CHUNK", IDS)  # one row at a time
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 8, generator=draw).bfloat16()
    weight = torch.randn(IDS, 8, generator=draw).bfloat16().requires_grad_()
    targets = torch.randint(IDS, (1024,), generator=draw)
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    exact = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(torchs_own(hidden.double(), exact, targets), exact)
    assert got.dtype == torch.bfloat16 and relative_error(got, want) <= rounding(BF16_UNIT)


def test_ignored_targets_count_nothing(small_model: Model) -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss == 0 and not any(g.any() for g in grads)
    tokens = torch.randint(0, 61, (2, 9))
    losses = small_model().losses(tokens, torch.full_like(tokens, IGNORE))
    assert losses.main == losses.mtp == 0


def test_loss_of_a_single_target_is_its_own(small_model: Model) -> None:
    model, tokens = small_model(n_mtp_layers=0), torch.randint(0, 61, (2, 9))
    targets = torch.full_like(tokens, IGNORE)
    targets[1, 3] = 7
    want = F.cross_entropy(model(tokens)[1, 3], targets[1, 3])
    torch.testing.assert_close(model.losses(tokens, targets).main, want)


def test_no_more_than_a_chunk_of_logits_exists(
    small_model: Model, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = problem(n=130)
    with Operations() as seen:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [hidden, weight])
    assert seen.largest == max(min(130, chunk_rows) * IDS, IDS * M)
    model, (tokens, labels) = small_model(vocab_size=IDS), torch.randint(0, IDS, (2, 4, 25)).unbind()
    for head in (model.head, nn.Sequential(model.head)):  # a wrapper, too
        model.head = head
        monkeypatch.setattr("dsmini.nn.transformer.CHUNK", chunk_rows * IDS)
        with Operations() as seen:
            model.losses(tokens, labels).total.backward()
        assert seen.largest == max(IDS * 24, min(100, chunk_rows) * IDS)


def test_nothing_of_logits_is_kept_for_backward() -> None:
    with saved_for_backward() as saved:
        linear_cross_entropy(*problem(n=130))
    assert sorted(t.numel() for t in saved) == [130 * M, IDS * M]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_what_is_frozen_is_not_made(frozen: str, chunk_rows: int) -> None:
    hidden, weight, targets = problem()
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [hidden, weight])
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    with Operations() as seen:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert products(seen) == 2 * -(-N // chunk_rows)
    other = weight if frozen == "hidden" else hidden
    assert torch.equal(torch.autograd.grad(loss, other)[0], want[frozen == "hidden"])
