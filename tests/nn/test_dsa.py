"""DSA and its indexer next to the report, MLA where nothing is left out, and the two ways to read the chosen keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.functional import sparse_attention
from dsmini.nn import DSA, Indexer, Rope, dsa
from dsmini.nn.dsa import hadamard, index_scores, topk_attention, topk_keys
from dsmini.numerics import quantize
from tests import reference_model as reference
from tests.conftest import SMALL, randomise
from tests.helpers import configs
from tests.helpers.models import same_weights, set_stage, tokens_of
from tests.helpers.tolerances import FP32_UNIT, ROPE_TABLE, assert_agree, relative_error, rounding
from tests.nn.test_mla import CASES, INDEX, SIZES

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
