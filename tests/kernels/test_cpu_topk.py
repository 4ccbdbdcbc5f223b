"""The keys that an indexer chooses, and attention to them agree with their references, for any number of queries."""

from typing import Any

import pytest
import torch

from dsmini import ops
from dsmini.nn.dsa import index_scores, topk_attention, topk_keys
from dsmini_kernels import Unserved, cpu
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.helpers.watching import Operations
from tests.kernels.conftest import assert_threads_change_no_bit

pytestmark = pytest.mark.usefixtures("library", "poisoned_memory", "without_gradients")
DTYPES = (torch.float32, torch.bfloat16)
SCORED = (
    (1, 1, 1, 1, 1, 1),
    (1, 3, 130, 3, 16, 9),
    (2, 21, 301, 8, 64, 40),
    (2, 5, 97, 5, 18, 97),
    (1, 2, 2500, 1, 7, 2048),
)
"""b, s, t, heads, width and topk: no multiple of a vector, all keys, and less than an item."""
ATTENDED = (
    *((1, 1, 1, 1, 1, 2, 3, 4, 1), (1, 2, 130, 3, 8, 6, 37, 9, 20), (2, 3, 300, 16, 64, 32, 256, 64, 130)),
    *((1, 2, 70, 130, 9, 4, 32, 5, 33), (1, 2, 90, 20, 9, 4, 96, 5, 64), (2, 1, 90, 2, 4, 5, 64, 5, 63)),
)
"""b, s, t, heads, n, r, c, v and k: also more heads than a panel has, and a row of an odd width."""


def scored(b: int, s: int, t: int, heads: int, width: int, topk: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments of topk_keys. Keys are the first of a longer cache, and some are masked."""
    q, k = torch.randn(b, s, heads, width).to(dtype), torch.randn(b, t + 3, width).to(dtype)[:, :t]
    mask = torch.rand(b, s, t) < 0.3
    mask[..., 0] = False
    return q, k, torch.randn(b, s, heads), topk, mask


def attended(
    b: int, s: int, t: int, h: int, n: int, r: int, c: int, v: int, k: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Return the arguments of topk_attention. Some indices are none."""
    shapes = ((b, s, h, n), (b, s, h, r), (b, t + 2, c + r), (h, n, c), (h, c, v))
    q_nope, q_rope, rows, w_uk, w_uv = (torch.randn(shape) for shape in shapes)
    operands = (q_nope, q_rope, rows, w_uk / n**0.5, w_uv / c**0.5)
    q_nope, q_rope, rows, w_uk, w_uv = (x.to(dtype) for x in operands)
    chosen = torch.rand(b, s, t).topk(k).indices
    chosen[..., 1:] = chosen[..., 1:].masked_fill(torch.rand(b, s, k - 1) < 0.3, -1)
    return q_nope, q_rope, rows[:, :t], w_uk, w_uv, (c + r) ** -0.5, chosen


def test_picks_are_the_keys_with_the_largest_scores(isa: str) -> None:
    for shape in SCORED:
        for dtype in DTYPES:
            q, k, weights, topk, mask = scored(*shape, dtype)
            got = cpu.topk_keys(q, k, weights, topk, mask)
            with ops.use("reference"):
                scores = index_scores(q.double(), k.double(), weights.double()).masked_fill(mask, -torch.inf)
            assert got.shape == (*shape[:2], topk) and got.dtype == torch.int64
            # terms of a score cancel, so its error is a share of what they would be together
            size = index_scores(q.double().abs(), k.double().abs(), weights.double().abs())
            error = rounding(FP32_UNIT, terms=shape[3] * shape[4]) * size.max()
            for chosen, row in zip(got.flatten(0, 1).tolist(), scores.flatten(0, 1), strict=True):
                places = [p for p in chosen if p >= 0]
                wanted = min(topk, int(row.isfinite().sum()))
                assert len(places) == len(set(places)) == wanted and chosen == sorted(places) + [-1] * (topk - wanted)
                rest = row.clone()
                rest[places] = -torch.inf
                assert row[places].isfinite().all() and row[places].min() >= rest.max() - error


def test_of_equal_scores_the_first_keys_are_picked(isa: str) -> None:
    q, k, weights, topk, mask = scored(2, 9, 301, 4, 8, 16, torch.float32)
    weights = weights.abs()
    q[..., 0], k[:, :250, 0], k[:, 250:, 0] = -20.0, 1.0, 0.9  # all heads are rectified
    for order in (slice(None), slice(None, None, 2)):
        with ops.use("eager"):
            want = topk_keys(q[:, order], k, weights[:, order], topk, mask[:, order])
        assert torch.equal(cpu.topk_keys(q[:, order], k, weights[:, order], topk, mask[:, order]), want)


def test_a_score_of_nan_is_picked_and_no_hidden_key_is(isa: str) -> None:
    q, k, weights, topk, mask = scored(1, 4, 200, 3, 16, 5, torch.bfloat16)
    k[0, 7], mask[:, :2, 7], mask[:, 2:, 7] = torch.nan, True, False
    got = cpu.topk_keys(q, k, weights, topk, mask)[0]
    assert [7 in row for row in got.tolist()] == [False, False, True, True]
    assert not cpu.topk_keys(q, k, weights, topk, torch.ones_like(mask)).ge(0).any()


def test_attention_to_picked_rows_agrees(isa: str) -> None:
    for shape in ATTENDED:
        for dtype in DTYPES:
            call = attended(*shape, dtype)
            got = cpu.topk_attention(*call)
            with ops.use("reference"):
                want = topk_attention(*(x.double() for x in call[:5]), *call[5:])
            # sums over a head's numbers, a row's, the keys and the latent's; in BF16 the operands of three are rounded
            unit, terms = (FP32_UNIT, max(shape[4:])) if dtype == torch.float32 else (BF16_UNIT, 1)
            assert got.dtype == dtype and got.shape == want.shape
            for a, b in zip(got.flatten(0, 1), want.flatten(0, 1), strict=True):
                assert relative_error(a, b) < rounding(unit, terms=terms, chained=4), (shape, dtype)


def test_large_logits_choose_one_row(isa: str) -> None:
    """Rounding logits of 1e10 moves each by hundreds: the largest must still have weight 1."""
    for dtype in DTYPES:
        q_nope, q_rope, rows, w_uk, w_uv, _, chosen = attended(1, 4, 300, 16, 64, 32, 256, 64, 130, dtype)
        call = (1e10 * q_nope, 1e10 * q_rope, rows, w_uk, w_uv, 0.3, chosen)
        got = cpu.topk_attention(*call)
        with ops.use("reference"):
            want = topk_attention(*(x.double() for x in call[:5]), *call[5:])
        assert got.isfinite().all()
        # two logits may tie after the rounding of W_UK q: few rows of heads may differ
        near = (got - want).flatten(0, 1).unflatten(-1, (16, 64)).norm(dim=-1) < 0.05 * want.norm() / (4 * 16) ** 0.5
        assert near.double().mean() > 0.9


@pytest.mark.parametrize("units", [True, False])
def test_heads_are_multiplied_in_bf16_only_where_a_cpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    monkeypatch.setattr("dsmini_kernels.cpu.topk.has_bf16_units", lambda: units)
    with Operations() as seen:
        assert cpu.topk_attention(*attended(*ATTENDED[1], torch.bfloat16)).dtype == torch.bfloat16
    products = {result.dtype for result in seen.results if "bmm" in result.operation}
    assert products == {torch.bfloat16 if units else torch.float32}


def test_the_order_of_picks_and_rows_not_picked_do_not_matter(isa: str) -> None:
    for dtype in DTYPES:
        *operands, scale, chosen = attended(1, 3, 200, 5, 16, 8, 64, 16, 70, dtype)
        want = cpu.topk_attention(*operands, scale, chosen)
        tolerance = rounding(FP32_UNIT, terms=70) + (dtype == torch.bfloat16) * rounding(BF16_UNIT)
        assert relative_error(cpu.topk_attention(*operands, scale, chosen.flip(-1)), want) < tolerance
        unseen = set(range(200)) - set(chosen[0, 1].tolist())
        operands[2][0, sorted(unseen)] = torch.nan
        got = cpu.topk_attention(*operands, scale, chosen)
        assert torch.equal(got[0, 1], want[0, 1]) and got[0, 0].isnan().all()


def test_threads_compute_the_same_bits(isa: str) -> None:
    index = scored(2, 40, 300, 4, 32, 50, torch.bfloat16)
    assert_threads_change_no_bit(lambda: [cpu.topk_keys(*index)])
    # one head, sums whose numbers are apart, and few rows: torch's products depend on threads there
    for shape in (
        (2, 21, 300, 8, 16, 8, 64, 16, 50),
        (1, 129, 300, 1, 128, 8, 37, 64, 50),
        (1, 2, 300, 2, 64, 8, 130, 37, 50),
    ):
        for dtype in DTYPES:
            q_nope, q_rope, rows, w_uk, w_uv, *rest = attended(*shape, dtype)
            spread = (w.permute(1, 2, 0).contiguous().permute(2, 0, 1) for w in (w_uk, w_uv))
            for w in ((w_uk, w_uv), tuple(spread)):
                call = (q_nope, q_rope, rows, *w, *rest)
                assert_threads_change_no_bit(lambda call=call: [cpu.topk_attention(*call)])


def changed(call: tuple[Any, ...], place: int, value: Any) -> list[Any]:
    return [value if i == place else argument for i, argument in enumerate(call)]


def test_calls_that_are_not_served_say_why() -> None:
    index = scored(1, 2, 30, 2, 8, 5, torch.float32)
    main = attended(1, 2, 30, 2, 8, 4, 32, 8, 5, torch.float32)
    with pytest.raises(Unserved, match="tensors in torch"):
        cpu.topk_keys(*changed(index, 1, index[1].bfloat16()))
    with pytest.raises(Unserved, match=r"weights of torch\.bfloat16"):
        cpu.topk_keys(*changed(index, 2, index[2].bfloat16()))
    with pytest.raises(Unserved, match="tensors in torch"):
        cpu.topk_attention(*changed(main, 2, main[2].double()))
    with torch.enable_grad(), pytest.raises(Unserved, match="no gradients"):
        cpu.topk_attention(*changed(main, 2, main[2].clone().requires_grad_()))
    with torch.enable_grad():  # indices have none, so these are
        wanting = changed(index, 0, index[0].clone().requires_grad_())
        assert torch.equal(cpu.topk_keys(*wanting), cpu.topk_keys(*index))


def test_picks_outside_the_rows_are_refused() -> None:
    main = attended(1, 2, 30, 2, 8, 4, 32, 8, 5, torch.float32)
    for pick in (30, -2, 1 << 40):
        indices = main[6].index_put((torch.tensor(0), torch.tensor(1), torch.tensor(2)), torch.tensor(pick))
        with pytest.raises(RuntimeError, match="beyond their memory"):
            cpu.topk_attention(*changed(main, 6, indices))


def test_a_query_without_picks_is_nan_everywhere(isa: str) -> None:
    """As in all attention of the package, a query that sees no key has NaN."""
    for dtype in DTYPES:
        main = attended(1, 2, 30, 2, 8, 4, 32, 8, 5, dtype)
        call = changed(main, 6, main[6].clone().index_fill_(1, torch.tensor(1), -1))
        for backend in ("cpu", "eager", "reference"):
            with ops.use(backend):
                got = topk_attention(*call)
            assert got[0, 1].isnan().all() and not got[0, 0].isnan().any(), backend
