"""The losses of the indexer against the report's equations 3 and 4, written out here, and what they may move."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.functional import sparse_attention
from dsmini.nn import DSA, dsa, dsa_layers
from dsmini.nn.attention import context_of
from dsmini.nn.dsa import IndexerLoss, indexer_agreement, kl_of_scores, topk_keys
from tests.conftest import SMALL, randomise
from tests.helpers import configs
from tests.helpers.tolerances import FP32_MODEL, FP32_UNIT, FP64_UNIT, relative_error, rounding
from tests.helpers.watching import Operations
from tests.nn.test_dsa import dense_twin
from tests.nn.test_indexer import INDEX
from tests.nn.test_mla import CASES, SIZES

S, TOPK, SCALE = 13, 5, 0.4
SPARSE: dict[str, Any] = SMALL | configs.DSA
EXACT = rounding(FP64_UNIT, terms=S * 8, chained=8)


Index = tuple[Tensor, Tensor, Tensor]


class Main(NamedTuple):
    """The attention of the main model that an indexer learns from."""

    q: Tensor
    k: Tensor
    mask: Callable[[int, int], Tensor]


def compare(index: Index, main: Main, topk_indices: Tensor, stage: Any) -> IndexerLoss:
    kl, mass, found, asked = indexer_agreement(*index, main.q, main.k, SCALE, topk_indices, main.mask, stage)
    queries = main.q.shape[0] * main.q.shape[1]
    return IndexerLoss(kl / queries, found / asked if asked else torch.ones(()), mass / queries)


def problem(s: int = S, topk: int = TOPK, documents: Tensor | None = None) -> tuple[Index, Main, Tensor]:
    """Return queries, keys and head weights of an indexer, the attention to learn from, and the picks."""
    q, k = torch.randn(2, 2, s, 4, 6, dtype=torch.float64).unbind()
    late = torch.ones(s, s, dtype=torch.bool).triu(1)[None]
    mask = late if documents is None else late | (documents[:, :, None] != documents[:, None, :])
    shapes = ((2, s, 3, 8), (2, s, 8), (2, s, 3))
    a, b, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    index = a, b, c
    picks = topk_keys(*index, topk, mask)
    return index, Main(q, k, lambda start, end: mask[:, start:end, :end]), picks


def by_the_report(index: Index, main: Main, picks: Tensor, stage: str) -> IndexerLoss:
    """Equations 3 and 4, recall and mass, from the probabilities of all pairs."""
    q, k, weights = index
    seen = ~main.mask(0, S).expand(2, S, S)
    picked = torch.zeros(2, S, S + 1).scatter(2, picks % (S + 1), 1.0)[..., :S].bool()  # -1 is a column that is cut

    def p_of(keys: Tensor) -> Tensor:
        logits = torch.einsum("bshd,bthd->bhst", main.q, main.k) * SCALE
        e = logits.exp() * keys[:, None]
        total = (e / e.sum(-1, keepdim=True)).sum(1)
        return total / total.sum(-1, keepdim=True)

    compared = picked if stage == "sparse" else seen
    scores = torch.einsum("bsh,bhst->bst", weights, torch.einsum("bshd,btd->bhst", q, k).clamp(min=0))
    log_i = scores - (scores.exp() * compared).sum(-1, keepdim=True).log()
    p = p_of(compared)
    kl = (torch.xlogy(p, p) - p * log_i).sum(-1).mean()
    full = p_of(seen)
    best = torch.zeros_like(full).scatter(2, full.topk(TOPK).indices, 1.0).bool()
    recalls = (best & picked).sum(-1)[seen.sum(-1) > TOPK] / TOPK
    return IndexerLoss(kl, recalls.double().mean(), (full * picked).sum(-1).mean())


@pytest.mark.parametrize("block_bytes", [1, 4 * 2 * 4 * S * 5, 1 << 26])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_losses_and_gradients_follow_the_report(
    stage: str, documents: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", block_bytes)
    of = torch.tensor([[0] * 4 + [1] * 9, [0] * 11 + [1] * 2]) if documents else None
    index, main, picks = problem(documents=of)
    got, want = compare(index, main, picks, stage), by_the_report(index, main, picks, stage)
    assert 0 < want.recall < 1 and 0 < want.mass < 1
    for name in IndexerLoss._fields:
        assert relative_error(getattr(got, name), getattr(want, name)) <= (
            EXACT if name == "kl" else rounding(FP32_UNIT)
        )
    grads = [torch.autograd.grad(fit.kl * 3, index) for fit in (got, want)]
    assert all(relative_error(a, b) <= EXACT for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_gradients_are_finite_differences(stage: str) -> None:
    index, main, picks = problem(s=6, topk=2)

    def run(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return compare((q, k, weights), main, picks, stage).kl

    assert torch.autograd.gradcheck(run, index, eps=1e-6, atol=1e-7, fast_mode=True)


def test_the_gradient_of_a_score_is_softmax_minus_target() -> None:
    scores = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(7, 9, dtype=torch.bool).triu(2)
    target = torch.rand(7, 9).double().masked_fill(hidden, 0.0)
    target /= target.sum(-1, keepdim=True)
    (got,) = torch.autograd.grad(kl_of_scores(target, scores, hidden).sum(), scores)
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) - target
    assert relative_error(got, want) <= EXACT


def test_small_probabilities_count() -> None:
    """An eps inside the logarithm, as others have it, would hide how improbable the indexer finds a key."""
    scores = torch.tensor([[0.0, -200.0]], requires_grad=True)
    target, hidden = torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2, dtype=torch.bool)
    kl = kl_of_scores(target, scores, hidden)
    assert kl.item() == pytest.approx(100 - math.log(2), rel=1e-6)
    assert torch.autograd.grad(kl.sum(), scores)[0].tolist() == [[0.5, -0.5]]
    sure = kl_of_scores(torch.tensor([[1.0, 0.0]]), scores, hidden)
    assert sure.item() == 0 and sure.isfinite().all()


def test_a_perfect_indexer_has_no_loss() -> None:
    """Scores that are the logits of the one head: nothing is missed, and the picks are the best keys."""
    _, main, _ = problem()
    q, k = main.q[:, :, :1].abs(), main.k[:, :, :1].abs()  # no product is cut by the ReLU
    weights = torch.full((2, S, 1), SCALE, dtype=torch.float64)
    picks = topk_keys(q, k[:, :, 0], weights, TOPK, main.mask(0, S))
    for stage in ("warmup", "sparse"):
        fit = compare((q, k[:, :, 0], weights), main._replace(q=q, k=k), picks, stage)
        assert abs(fit.kl.item()) < EXACT and fit.recall == 1 and fit.mass < 1


def test_no_more_than_a_block_of_scores_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    s, heads = 48, 3
    monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", 4 * 2 * heads * s * 3)
    index, main, picks = problem(s, topk=4)
    with Operations() as seen:
        compare(index, main, picks, "warmup").kl.backward()
    # the gradient of all queries is more than three rows of pairs
    assert seen.largest <= 2 * s * heads * 8 < 2 * s * s


# layers and models


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_a_layer_compares_its_own_attention(stage: Any, case: str) -> None:
    """The target is the attention that the layer really computes: it is read out with values that are unit vectors."""
    c: dict[str, Any] = SIZES | CASES[case] | INDEX | {"n_heads": 3, "v_head_dim": 16}
    layer = randomise(DSA(**c)).double()
    layer.stage = stage
    s, seen, read = 16, [], []
    real, wo = dsa.head_sum, layer.wo.forward
    x = torch.randn(1, s, SIZES["dim"], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsa, "head_sum", lambda *args: (seen.append(real(*args)), seen[-1])[1])
        patch.setattr(layer.wkv_b, "forward", _unit_values(layer, s))
        patch.setattr(layer.wo, "forward", lambda y: (read.append(y.unflatten(-1, (3, s))), wo(y))[1])
        _, fit = layer.learn(x, context_of(x, layer.rope))
    assert relative_error(seen[-1], read[0].mean(2)) <= FP32_MODEL
    assert fit.kl > 0 and fit.kl.requires_grad and not fit.recall.requires_grad


def _unit_values(layer: DSA, s: int) -> Any:
    """Return wkv_b's forward with the value of token t of every head replaced by the t-th unit vector."""
    real = layer.wkv_b.forward

    def forward(c_kv: Tensor) -> Tensor:
        heads = real(c_kv).unflatten(-1, (layer.n_heads, -1)).clone()
        heads[..., layer.qk_nope_head_dim :] = torch.eye(s).unsqueeze(1)
        return heads.flatten(-2)

    return forward


def model_of(stage: Any, **changes: Any) -> Transformer:
    model = randomise(Transformer(ModelConfig(**SPARSE | changes)))
    for layer in dsa_layers(model):
        layer.stage = stage
    return model


def gradients(model: Transformer, **options: Any) -> dict[str, Tensor]:
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 25), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    losses = model.losses(tokens[:, :-1], tokens[:, 1:], **options)
    losses.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compressed", [True, False])
def test_each_loss_moves_its_own_parameters(compressed: bool) -> None:
    """The main model gets the gradient that it has without the indexers' loss; they get that of theirs alone."""
    model = model_of("sparse", **({} if compressed else {"q_lora_rank": None}))
    both = gradients(model)
    doubled = gradients(model, balance_alpha=0.0, mtp_weight=0.0)
    for layer in dsa_layers(model):
        layer.stage = None
    alone = gradients(model)
    index = {name for name in both if ".indexer." in name}
    assert len(index) == 5 * len(dsa_layers(model)) == 5 * 4
    assert alone.keys() == both.keys() - index
    assert all(relative_error(both[name], alone[name]) <= FP32_MODEL for name in alone)
    of_blocks = {name for name in index if not name.startswith("mtp")}
    assert all(torch.equal(both[name], doubled[name]) for name in of_blocks)  # whatever the other losses weigh
    assert all(both[name].abs().sum() > 0 for name in index)


def test_warmup_attends_to_all_keys_and_evaluation_to_the_picks() -> None:
    model = model_of("warmup")
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 24))
    twin = dense_twin(model)
    assert relative_error(model(tokens), twin(tokens)) <= FP32_MODEL
    model.eval()
    sparse = model(tokens)
    for layer in dsa_layers(model):
        layer.stage = None
    assert torch.equal(sparse, model(tokens)) and relative_error(sparse, twin(tokens)) > 1e-2


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_recomputation_changes_no_gradient(stage: Any) -> None:
    model = model_of(stage)
    want, got = gradients(model), gradients(model, recompute=True)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_no_loss_is_computed_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("sparse")
    monkeypatch.setattr(DSA, "indexer_loss", None)
    model(torch.randint(0, SMALL["vocab_size"], (2, 24)))
    with pytest.raises(TypeError):
        gradients(model)


def test_losses_name_every_indexer() -> None:
    model, tokens = model_of("sparse"), torch.randint(0, SMALL["vocab_size"], (2, 25))
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    plain = losses.main + 0.3 * losses.mtp + 1e-4 * losses.balance
    assert len(losses.indexers) == 4
    assert relative_error(losses.total - plain, sum(fit.kl for fit in losses.indexers)) <= 1e-5  # pyright: ignore[reportArgumentType]
    for layer in dsa_layers(model):
        layer.stage = None
    assert model.losses(tokens[:, :-1], tokens[:, 1:]).indexers == []


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("changes", [{}, configs.FP8_SIZES, configs.FP8_SIZES | {"indexer_fp8": True}], ids=len)
def test_indexers_learn_in_low_precision(stage: Any, changes: dict[str, Any]) -> None:
    """BF16 and FP8 change the loss by a few of their units, and pass a gradient on to every parameter."""
    model = randomise(Transformer(ModelConfig(**SPARSE | {"n_mtp_layers": 1} | changes), compute_dtype=torch.bfloat16))
    exact = Transformer(dataclasses.replace(model.config, precision="native", indexer_fp8=False))
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 33))
    found = []
    for one in (model, exact):
        for layer in dsa_layers(one):
            layer.stage = stage
        losses = one.losses(tokens[:, :-1], tokens[:, 1:])
        found.append(torch.stack([fit.kl for fit in losses.indexers]))
        losses.total.backward()
        index = [p.grad for name, p in one.named_parameters() if ".indexer." in name]
        assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in index)
    assert found[0].dtype == torch.float32 and relative_error(*found) < 0.2


class Wrapper(torch.nn.Module):
    """A module around another one, as tools put them."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_hooks_and_wrappers_around_attention_keep_the_loss() -> None:
    model, ran = model_of("sparse"), []
    for block in model.layers:
        block.attn.register_forward_hook(lambda *_: ran.append(True))
        block.attn = Wrapper(block.attn)
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 25))
    assert len(model.losses(tokens[:, :-1], tokens[:, 1:]).indexers) == 4 and len(ran) == len(model.layers)
