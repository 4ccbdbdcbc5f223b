"""DSA and its indexer next to the report, MLA where nothing is left out, and the two ways to read the chosen keys."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.functional import sparse_attention
from dsmini.inference.fused import Decoder
from dsmini.nn import DSA, Context, Indexer, Rope, dsa, dsa_layers
from dsmini.nn.dsa import IndexerLoss, hadamard, index_scores, topk_attention, topk_keys
from dsmini.numerics import quantize
from tests import reference_model as reference
from tests.conftest import SMALL, randomise
from tests.helpers import configs
from tests.helpers.configs import GLM, refusal
from tests.helpers.models import decoded, same_weights, set_stage, tokens_of
from tests.helpers.tolerances import (
    FP32_MODEL,
    FP32_UNIT,
    FP64_UNIT,
    ROPE_TABLE,
    assert_agree,
    relative_error,
    rounding,
)
from tests.helpers.watching import Operations
from tests.nn.test_attention import CASES, INDEX, SIZES

SPARSE: dict[str, Any] = SMALL | configs.DSA


def model_of(stage: Any = None, **changes: Any) -> Transformer:
    return set_stage(randomise(Transformer(ModelConfig(**SPARSE | changes))), stage)


def dense_baseline(model: Transformer) -> Transformer:
    """Return MLA with the same weights."""
    changes = {"attention": "mla", "index_n_heads": None, "index_head_dim": None, "index_topk": None}
    dense = Transformer(model.config, **changes)
    dense.load_state_dict({name: t for name, t in model.state_dict().items() if ".indexer." not in name})
    return dense


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dsa_follows_the_report(monkeypatch: pytest.MonkeyPatch, case: str, interleave: bool) -> None:
    """Queries are scored and attended in three blocks, the last of which is ragged."""
    monkeypatch.setattr(dsa, "BLOCK", 8)
    c = ModelConfig(**SIZES | INDEX | CASES[case], indexer_rope_interleave=interleave)
    layer = randomise(DSA(c)).double()
    x = torch.randn(2, 23, c.dim, dtype=torch.float64, requires_grad=True)
    got = layer(x)
    learnt = torch.autograd.grad(got.sum(), [*layer.indexer.parameters()], allow_unused=True, retain_graph=True)
    assert learnt == (None,) * len(learnt)  # the choice is a constant
    main = [x, *(p for name, p in layer.named_parameters() if "indexer" not in name)]
    assert_agree(got, reference.attention(layer, x, c), main, 8 * ROPE_TABLE)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"original_seq_len": 16}], ids=str)
def test_up_to_k_keys_the_model_is_v3_to_the_bit(changes: dict[str, Any]) -> None:
    """A prompt takes MLA's form too."""
    model, tokens = model_of(**changes), tokens_of(2, 20)
    dense = dense_baseline(model)
    assert torch.equal(model(tokens[:, :8]), dense(tokens[:, :8]))
    for form, sizes in (("auto", 8), ("auto", (3, 4, 1)), ("expanded", (3, 4, 1)), ("absorbed", (3, 4, 1))):
        caches = [each.new_cache(2, 8, form=form) for each in (model, dense)]
        for part in tokens[:, :8].split(sizes, 1):
            sparse, want = (each(part, cache) for each, cache in zip((model, dense), caches, strict=True))
            assert torch.equal(sparse, want)
    assert relative_error(model(tokens), dense(tokens)) > 1e-2
    assert torch.equal(same_weights(model, index_topk=20)(tokens), dense(tokens))


@pytest.mark.parametrize(("b", "s", "t", "k"), [(1, 1, 1, 1), (2, 1, 63, 5), (2, 63, 130, 9), (1, 3, 130, 130)])
def test_mask_and_gather_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, b: int, s: int, t: int, k: int) -> None:
    h, n, r, c, v = 3, 5, 4, 9, 7
    sizes = ((b, s, h, n), (b, s, h, r), (b, t, c + r), (h, n, c), (h, c, v))
    operands: Any = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    chosen = torch.rand(b, s, t).topk(k).indices
    chosen[..., 1:] = chosen[..., 1:].masked_fill(torch.rand(b, s, k - 1) < 0.3, -1)
    for nbytes, order in ((1 << 20, torch.arange(k)), (1, torch.arange(k)), (1, torch.randperm(k))):
        want = topk_attention.reference(*operands, 0.4, chosen)
        monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", nbytes)
        with ops.use("eager"):
            assert_agree(topk_attention(*operands, 0.4, chosen[..., order]), want, operands, 1e-13)


# caches


def test_cached_keys_in_fp8_have_power_of_two_scales() -> None:
    model = model_of(index_head_dim=128)
    cache = model.new_cache(1, 24, "fp8")
    model(tokens_of(1, 20), cache)
    index = cache.stores[0].index
    assert index is not None and index.data.shape[2] == 132
    scales = index.data[0, :20, 128:].clone().view(torch.float32)
    assert torch.equal(scales.log2(), scales.log2().round())


# --- the indexer: equation 1, its gradients, and the keys that it chooses

TOLERANCE = 8 * ROPE_TABLE


def sylvester(d: int) -> Tensor:
    """H[i, j] is -1 where i and j share an odd number of bits."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)], dtype=torch.float64)


def made(case: str = "plain", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a random indexer, its config, random hidden states and query latents, and the table of positions."""
    c = ModelConfig(**SIZES | INDEX | CASES[case] | changes)
    layer = randomise(Indexer(c)).to(dtype)
    x = torch.randn(2, 19, c.dim, dtype=dtype, requires_grad=True)
    rank = c.q_lora_rank
    latent = x if rank is None else torch.randn(2, 19, rank, dtype=dtype, requires_grad=True)
    return layer, c, x, latent, Rope.from_config(c).cos_sin(torch.arange(19))


def scores(layer: Indexer, x: Tensor, latent: Tensor, table: Any) -> Tensor:
    return index_scores(*layer(x, latent, table))


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_follow_the_report(case: str, interleave: bool) -> None:
    layer, c, x, latent, table = made(case, indexer_rope_interleave=interleave)
    want = reference.index_scores(layer, x, latent, c)
    assert_agree(scores(layer, x, latent, table), want, [x, latent, *layer.parameters()], TOLERANCE)


def test_keys_are_cached_after_the_hadamard_transform() -> None:
    layer, c, x, _, table = made()
    k = layer.k_norm(layer.wk(x))
    rotated = torch.cat((reference.rotate(k[..., None, :8], c, halves=True).squeeze(2), k[..., 8:]), -1)
    assert relative_error(layer.keys(x, table), rotated @ sylvester(16) / 4) <= TOLERANCE


@pytest.mark.parametrize("d", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_its_own_inverse(d: int) -> None:
    x = torch.randn(3, d, dtype=torch.float64)
    assert relative_error(hadamard(x), x @ sylvester(d) * d**-0.5) <= 1e-14
    assert relative_error(hadamard(hadamard(x)), x) <= 1e-14
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16


def test_fp8_scores_are_those_of_the_codes() -> None:
    """As the released kernel computes them: relu of products of codes, times the scales of query and key."""
    layer, _, x, latent, table = made(dtype=torch.float32, indexer_fp8=True)
    got = scores(layer, x, latent, table)
    assert all(grad.norm() > 0 for grad in torch.autograd.grad(got.sum(), [x, latent, *layer.parameters()]))
    layer.fp8 = False
    q, k = (quantize(rows.detach()) for rows in (layer.queries(latent, table), layer.keys(x, table)))
    codes = torch.einsum("bshd,btd->bsht", q.codes.float(), k.codes.float()).relu()
    weights = layer.head_weights(x)[..., None] * q.scales
    want = (codes * weights).sum(2) * k.scales.mT
    assert 0 < relative_error(got, scores(layer, x, latent, table)) < 0.1
    assert relative_error(got, want) <= rounding(FP32_UNIT, terms=16 * 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_and_head_weights_stay_fp32(dtype: torch.dtype) -> None:
    layer, _, x, _, _ = made(dtype=torch.float32)
    short = layer.to(dtype)
    fp32 = {name for name, p in short.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {"k_norm.weight", "k_norm.bias", "weights_proj.weight"}
    weights = short.head_weights(x.to(dtype))
    want = x.detach().to(dtype).double() @ short.weights_proj.weight.double().T / (5 * 16) ** 0.5
    assert weights.dtype == torch.float32 and relative_error(weights, want) <= rounding(FP32_UNIT, terms=23)


# the keys that are chosen


def inputs(s: int, t: int, h: int = 3, d: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, weights = torch.randn(2, s, h, d), torch.randn(2, t, d), torch.randn(2, s, h)
    positions = torch.arange(t - s, t)[None, :, None]
    return q, k, weights, torch.arange(t) > positions


def sets(topk_indices: Tensor) -> list[list[set[int]]]:
    return [[set(row.tolist()) - {-1} for row in sequence] for sequence in topk_indices]


@pytest.mark.parametrize(("s", "t"), [(1, 1), (1, 63), (63, 63), (9, 130)])
@pytest.mark.parametrize("topk", [1, 8, 63, 200])
def test_chosen_keys_have_the_largest_scores_that_a_query_sees(s: int, t: int, topk: int) -> None:
    """Any valid set is right: each key is at least as good as each that was left."""
    q, k, weights, mask = inputs(s, t)
    want = index_scores(q, k, weights).masked_fill(mask, -torch.inf)
    for backend in ("reference", "eager"):
        with ops.use(backend):
            indices = topk_keys(q, k, weights, topk, mask)
        assert indices.shape == (2, s, min(topk, t)) and indices.dtype == torch.int64
        for row, chosen in zip(want.flatten(0, 1), indices.flatten(0, 1), strict=True):
            valid = chosen[chosen >= 0]
            assert len(valid.unique()) == len(valid) == min(topk, int(row.isfinite().sum()))
            left = row.index_fill(0, valid, -torch.inf)
            assert row[valid].min() >= left.max() - 1e-5


def test_both_versions_choose_the_earlier_of_equal_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads rectified: most scores are exactly zero."""
    q, k, weights, mask = inputs(40, 70)
    weights = weights.abs()
    q[..., 0] = -20.0
    k[:, :60, 0], k[:, 60:, 0] = 1.0, -1.0
    assert (index_scores(q, k, weights)[..., :60] == 0).all()
    with ops.use("reference"):
        want = topk_keys(q, k, weights, 16, mask)
    for nbytes in (1, 4 * 2 * 3 * 70 * 7, 1 << 20):
        monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", nbytes)
        with ops.use("eager"):
            assert sets(topk_keys(q, k, weights, 16, mask)) == sets(want)
    assert sets(want)[0][0] == set(range(16))  # at position 30


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_score_of_nan_is_chosen_by_those_who_see_it(backend: str) -> None:
    q, k, weights, mask = inputs(40, 40)
    k[:, 5] = torch.nan
    with ops.use(backend):
        found = sets(topk_keys(q, k, weights, 4, mask))
    assert [5 in row for row in found[0]] == [t >= 5 for t in range(40)]
    assert all(len(row) == min(t + 1, 4) for t, row in enumerate(found[0]))


def test_a_context_beyond_128k_is_scored_whole() -> None:
    """A buffer that was too small gave zeros there, and the last tokens won."""
    q, k, weights, mask = inputs(1, 2**17 + 700, h=2, d=4)
    k[:, 2**17 :] *= 3
    want = index_scores(q, k, weights).topk(64).indices
    assert sets(topk_keys(q, k, weights, 64, mask)) == sets(want) and 0 < (want < 2**17).sum() < 128


def test_bf16_queries_choose_by_fp32_scores() -> None:
    q, k, weights, mask = inputs(60, 900, d=64)
    q, k = q.bfloat16(), k.bfloat16()
    want = sets(topk_keys(q.float(), k.float(), weights, 32, mask))
    assert sets(topk_keys(q, k, weights, 32, mask)) == want
    with torch.autocast("cpu", torch.bfloat16):
        assert sets(topk_keys.reference(q, k, weights, 32, mask)) == want
    rounded = torch.einsum("bshd,btd->bsht", q, k).float().relu()
    short = (rounded * weights[..., None]).sum(2).masked_fill(mask, -torch.inf).topk(32).indices
    assert sets(short) != want


# --- the losses of the indexer against the report's equations 3 and 4, written out here, and what they may move

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
    kl, mass, found, asked = dsa.indexer_agreement(
        *index, main.q, main.k, SCALE, topk_indices, main.mask, stage, **more
    )
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
    (got,) = torch.autograd.grad(dsa.kl_of_scores(target, scores, mask).sum(), scores)
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


# --- layers that take the keys which another layer chose, and the two objectives of the indexer that chose them

SHARING: dict[str, Any] = SMALL | GLM | {"n_mtp_layers": 1, "indexer_types": ("full", "shared", "shared", "full")}
T = 24


def sharing(stage: Any = None, **changes: Any) -> Transformer:
    return set_stage(randomise(Transformer(ModelConfig(**SHARING | changes))), stage)


def test_a_shared_layer_has_no_indexer_and_stores_no_key_of_one() -> None:
    model = sharing()
    assert [layer.attn.indexer is None for layer in model.layers] == [False, True, True, False]
    assert len(dsa_layers(model)) == 3  # MTP's block has one of its own
    assert [store.index is None for store in model.new_cache(1, 8).stores] == [False, True, True, False]


def test_shared_layers_read_the_keys_that_their_source_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pass, and with a cache in chunks: a layer that chose for itself would not."""
    model, tokens, read = sharing(), tokens_of(2, T), []
    real = dsa.topk_mask
    monkeypatch.setattr(dsa, "topk_mask", lambda indices, t: (read.append(indices), real(indices, t))[1])
    want = model(tokens)
    first, second, third, last = read
    assert first is second is third or all(torch.equal(first, other) for other in (second, third))
    assert not torch.equal(first, last)
    assert relative_error(decoded(model, tokens, (3, 7, 1, 1, 12), T), want) <= FP32_MODEL


def test_another_sequence_in_between_changes_no_choice() -> None:
    """Choices belong to a call, not to the layers."""
    model, tokens, others = sharing(), tokens_of(2, T), tokens_of(2, T)
    caches = [model.new_cache(2, T) for _ in range(2)]
    parts: list[Tensor] = []
    for part, other in zip(tokens.split(6, 1), others.split(6, 1), strict=True):
        parts.append(model(part, caches[0]))
        model(other, caches[1])
    assert torch.equal(torch.cat(parts, 1), decoded(model, tokens, 6, T))


def test_a_shared_layer_without_its_source_is_refused() -> None:
    layer = DSA(ModelConfig(**SHARING), layer=2)
    said = refusal(layer, torch.randn(1, T, SMALL["dim"]))
    assert said == (
        "a shared layer takes the keys that layer 0 chose, and this call has none; run that layer before it, with the "
        "same Context"
    )


def test_the_fused_decoder_leaves_shared_layers_to_their_modules() -> None:
    decoder = Decoder(sharing().eval())
    assert decoder.why in (
        "layers.1: attn takes the keys that layer 0 chose",
        "no kernels of decoding steps run here, or in this dtype",
    )
    assert decoder.blocks[1] is decoder.blocks[2] is None


def agreement_by_hand(model: Transformer, tokens: Tensor, stage: str, served: bool) -> Tensor:
    """Return the sum over indexers of KL(mean of the layers' attention || softmax of the scores), mean over queries."""
    p: list[Tensor] = []
    chosen: list[Tensor] = []
    index: list[Any] = []
    head_sum, real = dsa.head_sum, DSA.choose
    seen = torch.ones(T, T, dtype=torch.bool).tril()[None]

    def choose(layer: DSA, context: Context, inputs: Any) -> Any:
        choice = real(layer, context, inputs)
        assert choice.topk_indices is not None
        columns = torch.zeros(2, T, T + 1).scatter(2, choice.topk_indices % (T + 1), 1.0)[..., :T].bool()
        chosen.append(columns if stage == "sparse" else seen.expand(2, T, T))
        if layer.indexer is not None:
            x, latent = inputs
            index.append(layer.indexer(x.detach(), latent.detach(), context.cos_sin(layer.rope)))
        return choice._replace(index=index[-1])  # every layer compares, so that each one's attention is seen

    def seen_sum(logits: Tensor, mask: Tensor, *more: Any) -> Tensor:
        p.append(logits.masked_fill(~chosen[-1][:, None], -torch.inf).softmax(-1).mean(1))
        return head_sum(logits, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSA, "choose", choose)
        patch.setattr(dsa, "head_sum", seen_sum)
        patch.setattr(dsa, "indexer_agreement", dsa.indexer_agreement.reference)
        model.states(tokens, train_indexers=True)
    every = p[:: len(p) // len(model.layers)]  # one of each layer; the sparse stage sums twice
    total = torch.zeros((), dtype=torch.float64)
    for i, layers in enumerate(((0, 1, 2), (3,))):
        q, k, weights = index[i]
        scores = torch.einsum("bsh,bhst->bst", weights, torch.einsum("bshd,btd->bhst", q, k).clamp(min=0))
        log_q = scores.masked_fill(~chosen[layers[0]], -torch.inf).log_softmax(-1)
        target = torch.stack([every[j] for j in (layers if served else layers[:1])]).mean(0).detach()
        total = total + (torch.xlogy(target, target) - target * log_q.masked_fill(~chosen[layers[0]], 0.0)).sum() / (
            2 * T
        )
    return total


@pytest.mark.parametrize("target", ["own", "served"])
@STAGES
def test_the_sum_of_divergences_has_the_gradient_of_that_to_the_mean(stage: Any, target: str) -> None:
    """The second definition is written out here. The two values differ by a constant where layers share."""
    model = sharing(stage, indexer_target=target, n_mtp_layers=0).double()
    tokens = tokens_of(2, T)
    index = {name: p for name, p in model.named_parameters() if ".indexer." in name}
    losses = model.losses(tokens, tokens)
    by_hand = agreement_by_hand(model, tokens, stage, target == "served")
    got, want = (torch.autograd.grad(loss, [*index.values()]) for loss in (sum(x.kl for x in losses.indexers), by_hand))
    assert len(losses.indexers) == 2
    assert all(
        relative_error(a, b) <= rounding(FP64_UNIT, terms=T * 64, chained=16) for a, b in zip(got, want, strict=True)
    )
    kl = float(sum(x.kl.detach() for x in losses.indexers))
    assert (
        (kl > float(by_hand.detach()) + 1e-6)
        if target == "served"
        else kl == pytest.approx(float(by_hand.detach()), rel=1e-6)
    )
