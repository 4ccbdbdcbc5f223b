"""The indexer against the report's equation 1, written out here, its gradients, its picks, and the bugs of others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.functional import sparse_attention
from dsmini.functional.hadamard import hadamard
from dsmini.functional.rope import apply_rope, apply_rope_to_halves
from dsmini.functional.sparse_attention import index_scores, pick_keys
from dsmini.nn import Indexer, Rope
from dsmini.nn.linear import FP32Linear
from dsmini.numerics import quantize
from tests.conftest import randomise
from tests.helpers.configs import refusal
from tests.helpers.tolerances import FP32_UNIT, ROPE_TABLE, relative_error, rounding
from tests.nn.test_mla import CASES, SIZES, frequencies, temperature

INDEX: dict[str, Any] = {"index_n_heads": 5, "index_head_dim": 16, "index_topk": 7}
TOLERANCE = 8 * ROPE_TABLE


def sylvester(d: int) -> Tensor:
    """H[i, j] is -1 where i and j share an odd number of bits."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)], dtype=torch.float64)


def turned(x: Tensor, c: dict[str, Any]) -> Tensor:
    """Turn the first qk_rope_head_dim numbers of x [b, s, d] by their positions, in halves or interleaved."""
    r = c["qk_rope_head_dim"]
    first, rest = x[..., :r], x[..., r:]
    yarn = "original_seq_len" in c
    size = temperature(c["mscale"], c) / temperature(c["mscale_all_dim"], c) if yarn else 1.0
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), torch.tensor(frequencies(c)).double())
    interleaved = c.get("indexer_rope_interleave", False)
    a, b = (first[..., ::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    new_a, new_b = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    both = torch.stack((new_a, new_b), -1).flatten(-2) if interleaved else torch.cat((new_a, new_b), -1)
    return torch.cat((size * both, rest), -1)


def scores_by_the_report(w: dict[str, Tensor], x: Tensor, latent: Tensor, c: dict[str, Any]) -> Tensor:
    h, d = c["index_n_heads"], c["index_head_dim"]
    raw = x @ w["wk.weight"].T
    centred = raw - raw.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    k = turned(normed * w["k_norm.weight"] + w["k_norm.bias"], c)
    q, weights = latent @ w["wq_b.weight"].T, x @ w["weights_proj.weight"].T
    total = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype)
    for j in range(h):
        products = turned(q[..., j * d : (j + 1) * d], c) @ k.mT
        total = total + weights[..., j, None] * products.clamp(min=0)
    return total * h**-0.5 * d**-0.5


def made(case: str = "plain", s: int = 19, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a random indexer, its sizes, and random inputs: hidden states and query latents."""
    c = SIZES | INDEX | CASES[case] | changes
    layer = randomise(Indexer(**c)).to(dtype)
    x = torch.randn(2, s, c["dim"], dtype=dtype, requires_grad=True)
    rank = c["q_lora_rank"]
    latent = x if rank is None else torch.randn(2, s, rank, dtype=dtype, requires_grad=True)
    return layer, c, x, latent


def scores(layer: Indexer, c: dict[str, Any], x: Tensor, latent: Tensor) -> Tensor:
    table = rope_of(c).table(torch.arange(x.shape[1]))
    return layer(x, latent, table, layer.keys(x, table))


def rope_of(c: dict[str, Any]) -> Rope:
    names = {"theta": "rope_theta", "factor": "rope_factor"}
    yarn = ("original_seq_len", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "theta")
    given = {name: c[names.get(name, name)] for name in yarn if names.get(name, name) in c}
    return Rope(dim=c["qk_rope_head_dim"], **given)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_follow_the_report(case: str, interleave: bool) -> None:
    layer, c, x, latent = made(case, indexer_rope_interleave=interleave)
    got, want = scores(layer, c, x, latent), scores_by_the_report(dict(layer.named_parameters()), x, latent, c)
    assert relative_error(got, want) <= TOLERANCE
    direction, wrt = torch.randn_like(got), [x, latent, *layer.parameters()]
    grads = [torch.autograd.grad((y * direction).sum(), wrt) for y in (got, want)]
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(*grads, strict=True))


def test_gradients_are_finite_differences() -> None:
    layer, c, x, latent = made(s=6, dim=9, q_lora_rank=5, index_n_heads=2, index_head_dim=8)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, latent: Tensor, *values: Tensor) -> Tensor:
        table = rope_of(c).table(torch.arange(6))
        weights = dict(zip(names, values, strict=True))
        call = torch.func.functional_call
        keys = call(_Keys(layer), {f"layer.{name}": value for name, value in weights.items()}, (x, table))
        return call(layer, weights, (x, latent, table, keys))

    with ops.use("reference"):
        assert torch.autograd.gradcheck(run, (x, latent, *values), eps=1e-6, atol=1e-5)


class _Keys(torch.nn.Module):
    """An indexer that is called for its keys."""

    def __init__(self, layer: Indexer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Tensor:
        return self.layer.keys(*inputs)


def test_keys_are_cached_after_the_hadamard_transform() -> None:
    layer, c, x, _ = made()
    table = rope_of(c).table(torch.arange(19))
    w = dict(layer.named_parameters())
    raw = torch.nn.functional.layer_norm(x @ w["wk.weight"].T, (16,), w["k_norm.weight"], w["k_norm.bias"], 1e-6)
    assert relative_error(layer.keys(x, table), turned(raw, c) @ sylvester(16) / 4) <= TOLERANCE


@pytest.mark.parametrize("d", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_its_own_inverse(d: int) -> None:
    x = torch.randn(3, d, dtype=torch.float64)
    assert relative_error(hadamard(x), x @ sylvester(d) * d**-0.5) <= 1e-14
    assert relative_error(hadamard(hadamard(x)), x) <= 1e-14
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16
    assert "(3, 12); the Hadamard transform wants a power of two" in refusal(hadamard, torch.zeros(3, 12))


def test_fp8_scores_are_those_of_the_codes() -> None:
    """As the released kernel computes them: relu of products of codes, times the scales of query and key."""
    layer, c, x, latent = made(dtype=torch.float32, indexer_fp8=True)
    got = scores(layer, c, x, latent)
    layer.fp8 = False
    table = rope_of(c).table(torch.arange(19))
    q, k = (quantize(rows.detach()) for rows in (layer.queries(latent, table), layer.keys(x, table)))
    codes = torch.einsum("bshd,btd->bsht", q.codes.float(), k.codes.float()).relu()
    weights = layer.head_weights(x)[..., None] * q.scales
    want = (codes * weights).sum(2) * k.scales.mT
    assert 0 < relative_error(got, scores(layer, c, x, latent)) < 0.1
    assert relative_error(got, want) <= rounding(FP32_UNIT, terms=16 * 5)


def test_fp8_passes_gradients_straight_through() -> None:
    layer, c, x, latent = made(dtype=torch.float32, indexer_fp8=True)
    grads = torch.autograd.grad(scores(layer, c, x, latent).sum(), [x, latent, *layer.parameters()])
    assert all(grad.norm() > 0 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_and_head_weights_stay_fp32(dtype: torch.dtype) -> None:
    layer, _, x, _ = made(dtype=torch.float32)
    short = layer.to(dtype)
    assert {n for n, p in short.named_parameters() if p.dtype == torch.float32} == {
        *("k_norm.weight", "k_norm.bias", "weights_proj.weight")
    }
    weights = short.head_weights(x.to(dtype))
    want = x.detach().to(dtype).double() @ short.weights_proj.weight.double().T / (5 * 16) ** 0.5
    assert weights.dtype == torch.float32 and relative_error(weights, want) <= rounding(FP32_UNIT, terms=23)


def test_a_layer_that_is_not_sparse_has_no_indexer() -> None:
    assert refusal(Indexer, attention="mla") == "attention='mla' has no indexer; use attention='dsa'"


# what others got wrong, each seen by the tests above


def last_numbers_turned(layer: Indexer, x: Tensor, table: Any) -> Tensor:
    nope, rope = x.tensor_split((x.shape[-1] - 2 * table[0].shape[-1],), -1)
    return hadamard(torch.cat((nope, apply_rope_to_halves(rope, table)), -1))


def in_bf16(layer: FP32Linear, x: Tensor) -> Tensor:
    return (x.bfloat16() @ layer.weight.bfloat16().T).to(x.dtype)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "interleaved pairs": (sparse_attention, "apply_rope_to_halves", apply_rope),
    "the last numbers turned": (Indexer, "_turned", last_numbers_turned),
    "hadamard of queries alone": (sparse_attention, "hadamard", lambda x: hadamard(x) if x.shape[2] > 1 else x),
    "no relu": (Tensor, "relu", lambda x: x),
    "weights_proj in BF16": (FP32Linear, "forward", in_bf16),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_known_bugs_of_others_are_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    layer, c, x, latent = made()
    want = scores_by_the_report(dict(layer.named_parameters()), x, latent, c)
    assert relative_error(scores(layer, c, x, latent), want) > 50 * TOLERANCE


# picks


def inputs(s: int, t: int, h: int = 3, d: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, weights = torch.randn(2, s, h, d), torch.randn(2, t, d), torch.randn(2, s, h)
    positions = torch.arange(t - s, t)[None, :, None]
    return q, k, weights, torch.arange(t) > positions


def sets(picks: Tensor) -> list[list[set[int]]]:
    return [[set(row.tolist()) - {-1} for row in sequence] for sequence in picks]


@pytest.mark.parametrize(("s", "t"), [(1, 1), (1, 63), (63, 63), (9, 130)])
@pytest.mark.parametrize("topk", [1, 8, 63, 200])
def test_picks_are_the_largest_scores_that_a_query_sees(s: int, t: int, topk: int) -> None:
    """Any valid set is right: each pick is at least as good as each key that was left."""
    q, k, weights, hidden = inputs(s, t)
    want = index_scores(q, k, weights).masked_fill(hidden, -torch.inf)
    for backend in ("reference", "eager"):
        with ops.use(backend):
            picks = pick_keys(q, k, weights, topk, hidden)
        assert picks.shape == (2, s, min(topk, t)) and picks.dtype == torch.int64
        for row, chosen in zip(want.flatten(0, 1), picks.flatten(0, 1), strict=True):
            valid = chosen[chosen >= 0]
            assert len(valid.unique()) == len(valid) == min(topk, int(row.isfinite().sum()))
            left = row.index_fill(0, valid, -torch.inf)
            assert row[valid].min() >= left.max() - 1e-5


def test_both_versions_pick_the_earlier_of_equal_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads rectified: most scores are exactly zero."""
    q, k, weights, hidden = inputs(40, 70)
    weights = weights.abs()
    q[..., 0] = -20.0
    k[:, :60, 0], k[:, 60:, 0] = 1.0, -1.0
    assert (index_scores(q, k, weights)[..., :60] == 0).all()
    with ops.use("reference"):
        want = pick_keys(q, k, weights, 16, hidden)
    for nbytes in (1, 4 * 2 * 3 * 70 * 7, 1 << 20):
        monkeypatch.setattr(sparse_attention, "BLOCK_BYTES", nbytes)
        with ops.use("eager"):
            assert sets(pick_keys(q, k, weights, 16, hidden)) == sets(want)
    assert sets(want)[0][0] == set(range(16))  # at position 30


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_score_of_nan_is_picked_by_those_who_see_it(backend: str) -> None:
    q, k, weights, hidden = inputs(40, 40)
    k[:, 5] = torch.nan
    with ops.use(backend):
        found = sets(pick_keys(q, k, weights, 4, hidden))
    assert [5 in row for row in found[0]] == [t >= 5 for t in range(40)]
    assert all(len(row) == min(t + 1, 4) for t, row in enumerate(found[0]))


def test_picks_do_not_depend_on_how_a_sequence_was_cut() -> None:
    q, k, weights, hidden = inputs(50, 50)
    weights, q[..., 0] = weights.abs(), -3.0
    whole = sets(pick_keys(q, k, weights, 12, hidden))
    for t in (13, 30, 50):
        alone = sets(pick_keys(q[:, t - 1 : t], k[:, :t], weights[:, t - 1 : t], 12, hidden[:, t - 1 : t, :t]))
        assert [row[0] for row in alone] == [row[t - 1] for row in whole]


def test_a_context_beyond_128k_is_scored_whole() -> None:
    """A buffer that was too small gave zeros there, and the last tokens won."""
    q, k, weights, hidden = inputs(1, 2**17 + 700, h=2, d=4)
    k[:, 2**17 :] *= 3
    want = index_scores(q, k, weights).topk(64).indices
    assert sets(pick_keys(q, k, weights, 64, hidden)) == sets(want) and 0 < (want < 2**17).sum() < 128


def test_products_of_all_heads_with_a_long_context_never_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, weights, hidden = inputs(48, 20_000, h=8, d=4)
    rows: list[int] = []

    def watched(part: Tensor, *rest: Tensor) -> Tensor:
        rows.append(part.shape[1])
        return index_scores(part, *rest)

    monkeypatch.setattr(sparse_attention, "index_scores", watched)
    with ops.use("eager"):
        pick_keys(q, k, weights, 16, hidden)
    most = max(rows) * 2 * 8 * 20_000 * 4
    assert sum(rows) == 48 and most <= sparse_attention.BLOCK_BYTES < 2 * most


def test_picks_of_bf16_are_those_of_fp32_products() -> None:
    q, k, weights, hidden = inputs(60, 900, d=64)
    q, k = q.bfloat16(), k.bfloat16()
    want = sets(pick_keys(q.float(), k.float(), weights, 32, hidden))
    assert sets(pick_keys(q, k, weights, 32, hidden)) == want
    rounded = torch.einsum("bshd,btd->bsht", q, k).float().relu()
    short = (rounded * weights[..., None]).sum(2).masked_fill(hidden, -torch.inf).topk(32).indices
    assert sets(short) != want


def test_halves_are_turned_as_pairs_are() -> None:
    rope, x = Rope(dim=6, theta=100.0), torch.randn(1, 5, 2, 6)
    table = rope.table(torch.arange(5))
    order = [0, 3, 1, 4, 2, 5]
    assert torch.equal(apply_rope_to_halves(x, table)[..., order], apply_rope(x[..., order], table))
    assert (apply_rope_to_halves(x, table) - apply_rope(x, table)).abs().max() > 0.1
