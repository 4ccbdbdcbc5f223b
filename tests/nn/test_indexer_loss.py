"""The losses of the indexer against the report's equations 3 and 4, written out here, and what they may move."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.functional import sparse_attention
from dsmini.nn import DSA, Context, dsa, dsa_layers
from dsmini.nn.dsa import IndexerLoss, indexer_agreement, kl_of_scores, topk_keys
from tests.conftest import SMALL, randomise
from tests.helpers import configs
from tests.helpers.models import same_weights, set_stage, tokens_of
from tests.helpers.tolerances import FP32_MODEL, FP32_UNIT, FP64_UNIT, relative_error, rounding
from tests.helpers.watching import Operations
from tests.nn.test_dsa import SPARSE, dense_baseline, model_of
from tests.nn.test_mla import CASES, INDEX, SIZES

S, TOPK, SCALE = 13, 5, 0.4
EXACT = rounding(FP64_UNIT, terms=S * 8, chained=8)
STAGES = pytest.mark.parametrize("stage", ["warmup", "sparse"])
Index = tuple[Tensor, Tensor, Tensor]


class Main(NamedTuple):
    """The attention of the main model that an indexer learns from."""

    q: Tensor
    k: Tensor
    mask: Callable[[int, int], Tensor]


def compare(index: Index, main: Main, topk_indices: Tensor, stage: Any, other_lse: Tensor | None = None) -> IndexerLoss:
    more = {} if other_lse is None else {"other_lse": other_lse}
    kl, mass, found, asked = indexer_agreement(*index, main.q, main.k, SCALE, topk_indices, main.mask, stage, **more)
    queries = main.q.shape[0] * main.q.shape[1]
    return IndexerLoss(kl / queries, found / asked, mass / queries)


def problem(s: int = S, topk: int = TOPK, documents: Tensor | None = None) -> tuple[Index, Main, Tensor]:
    """Return queries, keys and head weights of an indexer, the attention to learn from, and the chosen keys."""
    q, k = torch.randn(2, 2, s, 4, 6, dtype=torch.float64).unbind()
    late = torch.ones(s, s, dtype=torch.bool).triu(1)[None]
    mask = late if documents is None else late | (documents[:, :, None] != documents[:, None, :])
    shapes = ((2, s, 3, 8), (2, s, 8), (2, s, 3))
    a, b, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    index = a, b, c
    return index, Main(q, k, lambda start, end: mask[:, start:end, :end]), topk_keys(*index, topk, mask)


def by_the_report(
    index: Index, main: Main, topk_indices: Tensor, stage: str, other_lse: Tensor | None = None
) -> IndexerLoss:
    """Equations 3 and 4, recall and mass, from the probabilities of all pairs.

    Other keys are in the denominator of each head, before all heads' sum is normalised.
    """
    others = 0.0 if other_lse is None else other_lse.exp()[..., None]
    q, k, weights = index
    seen = ~main.mask(0, S).expand(2, S, S)
    # -1 is a column that is cut
    chosen = torch.zeros(2, S, S + 1).scatter(2, topk_indices % (S + 1), 1.0)[..., :S].bool()

    def p_of(keys: Tensor) -> Tensor:
        logits = torch.einsum("bshd,bthd->bhst", main.q, main.k) * SCALE
        e = logits.exp() * keys[:, None]
        total = (e / (e.sum(-1, keepdim=True) + others)).sum(1)
        return total / total.sum(-1, keepdim=True)

    compared = chosen if stage == "sparse" else seen
    scores = torch.einsum("bsh,bhst->bst", weights, torch.einsum("bshd,btd->bhst", q, k).clamp(min=0))
    log_i = scores - (scores.exp() * compared).sum(-1, keepdim=True).log()
    p = p_of(compared)
    kl = (torch.xlogy(p, p) - p * log_i).sum(-1).mean()
    full = p_of(seen)
    best = torch.zeros_like(full).scatter(2, full.topk(TOPK).indices, 1.0).bool()
    recalls = (best & chosen).sum(-1)[seen.sum(-1) > TOPK] / TOPK
    return IndexerLoss(kl, recalls.double().mean(), (full * chosen).sum(-1).mean())


@pytest.mark.parametrize("block_bytes", [1, 4 * 2 * 4 * S * 5, 1 << 26])
@pytest.mark.parametrize("case", ["", "documents", "other keys"])
@STAGES
def test_losses_and_gradients_follow_the_report(
    stage: str, case: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", block_bytes)
    of = torch.tensor([[0] * 4 + [1] * 9, [0] * 11 + [1] * 2]) if case == "documents" else None
    index, main, chosen = problem(documents=of)
    others = 3 * torch.randn(2, 4, S, dtype=torch.float64) if case == "other keys" else None
    got, want = compare(index, main, chosen, stage, others), by_the_report(index, main, chosen, stage, others)
    assert 0 < want.recall < 1 and 0 < want.mass < 1
    for name, a, b in zip(IndexerLoss._fields, got, want, strict=True):
        assert relative_error(a, b) <= (EXACT if name == "kl" else rounding(FP32_UNIT))
    grads = [torch.autograd.grad(loss.kl * 3, index) for loss in (got, want)]
    assert all(relative_error(a, b) <= EXACT for a, b in zip(*grads, strict=True))


def test_the_gradient_of_a_score_is_softmax_minus_target() -> None:
    """Also where the indexer finds a key so improbable that an eps inside the logarithm would hide it."""
    scores = torch.randn(7, 9, dtype=torch.float64)
    scores[0, 0] = -200.0
    scores.requires_grad_()
    mask = torch.ones(7, 9, dtype=torch.bool).triu(2)
    target = torch.rand(7, 9).double().masked_fill(mask, 0.0)
    target /= target.sum(-1, keepdim=True)
    (got,) = torch.autograd.grad(kl_of_scores(target, scores, mask).sum(), scores)
    want = scores.masked_fill(mask, -torch.inf).softmax(-1) - target
    assert relative_error(got, want) <= EXACT


def test_no_more_than_a_block_of_scores_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    s, heads = 48, 3
    monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", 4 * 2 * heads * s * 3)
    index, main, chosen = problem(s, topk=4)
    with Operations() as seen:
        compare(index, main, chosen, "warmup").kl.backward()
    # the gradient of all queries is more than three rows of pairs
    assert seen.largest <= 2 * s * heads * 8 < 2 * s * s


# layers and models


@pytest.mark.parametrize("case", CASES)
@STAGES
def test_a_layer_compares_its_own_attention(stage: Any, case: str) -> None:
    """The target is the attention that the layer really computes: it is read out with values that are unit vectors."""
    c: dict[str, Any] = SIZES | CASES[case] | INDEX | {"n_heads": 3, "v_head_dim": 16}
    layer = randomise(DSA(**c)).double()
    s, seen, read = 16, [], []
    head_sum, wo, wkv_b = dsa.head_sum, layer.wo.forward, layer.wkv_b.forward

    def unit_values(c_kv: Tensor) -> Tensor:
        heads = wkv_b(c_kv).unflatten(-1, (layer.n_heads, -1)).clone()
        heads[..., layer.qk_nope_head_dim :] = torch.eye(s).unsqueeze(1)
        return heads.flatten(-2)

    x = torch.randn(1, s, SIZES["dim"], dtype=torch.float64)
    context = Context(positions=torch.arange(s)[None], stage=stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsa, "head_sum", lambda *args: (seen.append(head_sum(*args)), seen[-1])[1])
        patch.setattr(layer.wkv_b, "forward", unit_values)
        patch.setattr(layer.wo, "forward", lambda y: (read.append(y.unflatten(-1, (3, s))), wo(y))[1])
        _, loss = layer(x, context)
    assert relative_error(seen[-1], read[0].mean(2)) <= FP32_MODEL
    assert loss.kl > 0 and loss.kl.requires_grad and not loss.recall.requires_grad


def gradients(model: Transformer, **options: Any) -> dict[str, Tensor]:
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 25), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model.losses(tokens[:, :-1], tokens[:, 1:], **options).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compressed", [True, False])
def test_each_loss_moves_its_own_parameters(compressed: bool) -> None:
    """The main model gets the gradient that it has without the indexers' loss; they get that of theirs alone."""
    model = model_of("sparse", **({} if compressed else {"q_lora_rank": None}))
    both = gradients(model)
    doubled = gradients(model, balance_alpha=0.0, mtp_weight=0.0)
    set_stage(model, None)
    alone = gradients(model)
    index = {name for name in both if ".indexer." in name}
    assert len(index) == 5 * len(dsa_layers(model)) == 5 * 4
    assert alone.keys() == both.keys() - index
    assert all(relative_error(both[name], alone[name]) <= FP32_MODEL for name in alone)
    of_blocks = {name for name in index if not name.startswith("mtp")}
    assert all(torch.equal(both[name], doubled[name]) for name in of_blocks)  # whatever the other losses weigh
    assert all(both[name].abs().sum() > 0 for name in index)


def test_warmup_attends_to_all_keys_and_evaluation_to_the_chosen() -> None:
    model, tokens = model_of("warmup"), tokens_of(2, 24)
    dense = dense_baseline(model)
    assert relative_error(model(tokens), dense(tokens)) <= FP32_MODEL
    model.eval()
    sparse = model(tokens)
    set_stage(model, None)
    assert torch.equal(sparse, model(tokens)) and relative_error(sparse, dense(tokens)) > 1e-2


class Wrapper(torch.nn.Module):
    """A module around another one, as tools put them."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_losses_name_every_indexer_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under hooks and wrappers; and no loss is computed where none is asked for."""
    model, tokens, ran = model_of("sparse"), tokens_of(2, 25), []
    for block in model.layers:
        block.attn.register_forward_hook(lambda *_: ran.append(True))
        block.attn = Wrapper(block.attn)
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    plain = losses.main + 0.3 * losses.mtp + 1e-4 * losses.balance
    assert len(losses.indexers) == 4 and len(ran) == len(model.layers)
    assert relative_error(losses.total - plain, torch.stack([loss.kl for loss in losses.indexers]).sum()) <= 1e-5
    monkeypatch.setattr(dsa, "indexer_agreement", None)
    model(tokens)
    with pytest.raises(TypeError):
        gradients(model)
    set_stage(model, None)
    assert model.losses(tokens[:, :-1], tokens[:, 1:]).indexers == []


@STAGES
@pytest.mark.parametrize("changes", [{}, configs.FP8_SIZES, configs.FP8_SIZES | {"indexer_fp8": True}], ids=len)
def test_indexers_learn_in_low_precision(stage: Any, changes: dict[str, Any]) -> None:
    """BF16 and FP8 change the loss by a few of their units, and pass a gradient on to every parameter."""
    model = randomise(Transformer(ModelConfig(**SPARSE | {"n_mtp_layers": 1} | changes), compute_dtype=torch.bfloat16))
    exact = same_weights(model, precision="native", indexer_fp8=False)
    tokens, found = tokens_of(2, 33), []
    for one in (model, exact):
        set_stage(one, stage)
        losses = one.losses(tokens[:, :-1], tokens[:, 1:])
        found.append(torch.stack([loss.kl for loss in losses.indexers]))
        losses.total.backward()
        index = [p.grad for name, p in one.named_parameters() if ".indexer." in name]
        assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in index)
    assert found[0].dtype == torch.float32 and relative_error(*found) < 0.2
