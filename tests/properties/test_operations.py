"""Operations at random shapes, strides and sizes of values, from denormal numbers to 1e15, next to equations in FP64.

A sum of k terms x_i y_i, rounded to a unit u, is off by at most about u sqrt(k) sum |x_i y_i|, whatever its own
size: so a bound is made of absolute values. Units of products for BF16 take numbers below FLUSHED for zero, which moves
a sum by up to FLUSHED times the other operand, or FLUSHED itself.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmini import ops
from dsmini.nn.dsa import index_scores, topk_attention
from dsmini.nn.hyper_connections import read_streams, sinkhorn, write_streams
from dsmini.nn.layers import linear, rms_norm
from dsmini.nn.mla import absorbed_attention
from dsmini.nn.moe import experts
from dsmini.nn.transformer import IGNORE, linear_cross_entropy
from dsmini.numerics.dispatch import sort_by_expert
from tests.helpers.operations import expert_case, routed, run
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, SAFETY
from tests.helpers.watching import Operations

BACKENDS = ("reference", "eager", "cpu")
FLUSHED = 2.0**-126
SIZES = st.integers(1, 70)
POWERS = st.integers(-140, 50)
"""Values are near 2 to this power: 1e15, or denormal numbers of FP32 and BF16."""
MODERATE = st.integers(-140, 6)
"""Values of attention: larger logits leave one key alone, and their rounding decides which."""
UNITS = {torch.float32: FP32_UNIT, torch.bfloat16: BF16_UNIT}
DTYPES = st.sampled_from(list(UNITS))
SETTINGS = settings(max_examples=60, deadline=None)


TILES = torch.cpu._is_amx_tile_supported()


@st.composite
def layouts(draw: st.DrawFn) -> Callable[..., Tensor]:
    """Draw a function that makes random tensors of a shape and a power of two, some with strides of their own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    choose = draw(st.randoms(use_true_random=False)).choice

    def make(power: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * 2.0**power
        how = choose(("whole", "part of rows", "every second row", "transposed"))
        if how == "part of rows":
            x = torch.cat((x, x.flip(-1)), -1)[..., : shape[-1]].to(dtype)
            wide = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype)
            wide[..., 1 : 1 + shape[-1]] = x
            return wide[..., 1 : 1 + shape[-1]]
        if how == "every second row":
            wide = torch.full((2 * shape[0], *shape[1:]), torch.nan, dtype=dtype)
            wide[::2] = x.to(dtype)
            return wide[::2]
        if how == "transposed" and len(shape) > 1:
            return x.to(dtype).transpose(-1, -2).contiguous().transpose(-1, -2)
        return x.to(dtype)

    return make


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(operation: Any, arguments: tuple[Any, ...], want: Tensor, bound: Tensor) -> None:
    """Compare every backend with the equation in FP64; no number may be off by more than the bound.

    Torch's own products only get rows without NaN: in BF16, units of tiles (AMX) read two numbers at a time and
    multiply what follows a row of odd length by zero. Where there are such units, the kernels' linear is torch's.
    """
    alone = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    for backend in BACKENDS:
        with ops.use(backend), torch.no_grad():
            own = backend == "cpu" and not (TILES and operation in (linear, linear_cross_entropy))
            got = operation(*(arguments if own else alone)).double()
        assert got.shape == want.shape
        excess = ((got - want).abs() - bound).nan_to_num(nan=torch.inf)
        assert (excess <= 0).all(), f"{backend}: {excess.max():.1e} above a bound of {bound.max():.1e}"


@SETTINGS
@given(layouts(), DTYPES, SIZES, SIZES, SIZES, POWERS, POWERS)
def test_linear(make: Any, dtype: torch.dtype, n: int, i: int, o: int, of_x: int, of_weight: int) -> None:
    x, weight = make(of_x, n, i, dtype=dtype), make(of_weight, o, i, dtype=dtype)
    sums = x.double().abs() @ weight.double().abs().T
    flushed = FLUSHED * (1 + i * (x.abs().max().double() + weight.abs().max().double()))
    want = x.double() @ weight.double().T
    bound = SAFETY * (FP32_UNIT * i**0.5 * sums + UNITS[dtype] * want.abs()) + flushed
    check(linear, (x, weight), want, bound)


@SETTINGS
@given(layouts(), DTYPES, SIZES, SIZES, POWERS)
def test_rms_norm(make: Any, dtype: torch.dtype, n: int, m: int, power: int) -> None:
    x, weight = make(power, n, m, dtype=dtype), make(0, m).contiguous()
    # the mean of squares is off by u sqrt(m), its root by half of that; a flushed x is nothing next to sqrt(eps)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    bound = SAFETY * (UNITS[dtype] + FP32_UNIT * m**0.5) * want.abs() + 4e3 * FLUSHED
    check(rms_norm, (x, weight, 1e-6), want, bound)


@SETTINGS
@given(layouts(), DTYPES, st.integers(1, 12), st.integers(1, 60), st.integers(1, 6), SIZES, st.integers(-45, 15))
def test_index_scores(make: Any, dtype: torch.dtype, s: int, t: int, h: int, d: int, power: int) -> None:
    q, k = make(power, 2, s, h, d, dtype=dtype), make(power, 2, t, d, dtype=dtype)
    weights = make(power, 2, s, h)
    each = torch.einsum("bshd,btd->bsht", q.double().abs(), k.double().abs())
    sums = torch.einsum("bsht,bsh->bst", each, weights.double().abs())
    products = torch.einsum("bshd,btd->bsht", q.double(), k.double()).relu()
    want = torch.einsum("bsht,bsh->bst", products, weights.double())
    # products stay in FP32, or are rounded to the dtype of q and k before the ReLU
    bound = SAFETY * (UNITS[dtype] + FP32_UNIT * (d + h) ** 0.5) * sums
    check(index_scores, (q, k, weights), want, bound + FLUSHED * (1 + d * h * (1 + 2.0**power) ** 2 * 8))


def attention_of(make: Any, dtype: torch.dtype, b: int, s: int, t: int, h: int, power: int) -> tuple[Any, ...]:
    """Return random operands of absorbed_attention. Logits are near 1, or near 0 for small values."""
    n, c, r, v = 12, 24, 8, 10
    q_nope, q_rope = make(power, b, s, h, n, dtype=dtype), make(power, b, s, h, r, dtype=dtype)
    rows = make(power, b, t, c + r, dtype=dtype)
    w_uk, w_uv = (make(-2, h, *of, dtype=dtype).contiguous() for of in ((n, c), (c, v)))
    return q_nope, q_rope, rows, w_uk, w_uv, 0.2


def in_fp64(arguments: tuple[Any, ...], hidden: Tensor) -> Tensor:
    """Return attention by the keys and values of every head, which are made of the latents. True hides a key."""
    q_nope, q_rope, rows, w_uk, w_uv, scale = map(wide, arguments)
    latent, k_rope = rows.tensor_split((w_uk.shape[-1],), -1)
    k, v = torch.einsum("btc,hnc->bhtn", latent, w_uk), torch.einsum("btc,hcv->bhtv", latent, w_uv)
    logits = torch.einsum("bshn,bhtn->bhst", q_nope, k) + torch.einsum("bshr,btr->bhst", q_rope, k_rope)
    weights = (logits * scale).masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhst,bhtv->bshv", weights, v).flatten(2)


def bound_of_attention(arguments: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Return how far attention may be off: logits by their rounding, which weights follow, then values and sums.

    A logit is off by at most the unit times the sum of its absolute products, so a weight by twice as much.
    """
    q_nope, q_rope, rows, w_uk, w_uv, scale = map(wide, arguments)
    c = w_uk.shape[-1]
    latent = torch.einsum("bshn,hnc->bshc", q_nope.abs(), w_uk.abs())
    logits = torch.cat((latent, q_rope.abs()), -1) @ rows.abs().transpose(1, 2)[:, None] * scale
    moved = 2 * logits.amax(-1, keepdim=True)
    values = torch.einsum("btc,hcv->bthv", rows[..., :c].abs(), w_uv.abs()).amax(1)
    unit = SAFETY * UNITS[dtype] if dtype == torch.bfloat16 else SAFETY * FP32_UNIT * rows.shape[1] ** 0.5
    flushed = FLUSHED * (1 + 8 * c * w_uv.abs().max())
    return (unit * (4 + moved) * values[:, None]).flatten(2) + flushed


@SETTINGS
@given(layouts(), DTYPES, st.integers(1, 5), st.integers(1, 60), st.integers(1, 5), MODERATE)
def test_absorbed_attention(make: Any, dtype: torch.dtype, s: int, t: int, h: int, power: int) -> None:
    arguments = attention_of(make, dtype, 2, s, t, h, power)
    hidden = torch.rand(2, s, t) < 0.3
    hidden[..., 0] = False
    for mask in (None, hidden):
        want = in_fp64(arguments, torch.zeros_like(hidden) if mask is None else mask)
        check(absorbed_attention, (*arguments, mask), want, bound_of_attention(arguments, dtype))


@SETTINGS
@given(layouts(), DTYPES, st.integers(1, 5), st.integers(4, 60), st.integers(1, 5), MODERATE)
def test_topk_attention(make: Any, dtype: torch.dtype, s: int, t: int, h: int, power: int) -> None:
    arguments = attention_of(make, dtype, 2, s, t, h, power)
    chosen = torch.rand(2, s, t).argsort(-1)[..., : max(1, t // 3)]
    hidden = torch.ones(2, s, t, dtype=torch.bool).scatter(-1, chosen, False)
    check(topk_attention, (*arguments, chosen), in_fp64(arguments, hidden), bound_of_attention(arguments, dtype))


@SETTINGS
@given(layouts(), DTYPES, SIZES, SIZES, SIZES, POWERS)
def test_linear_cross_entropy(make: Any, dtype: torch.dtype, n: int, m: int, v: int, power: int) -> None:
    hidden, weight = make(power, n, m, dtype=dtype), make(min(-power, 100), v, m, dtype=dtype)
    targets = torch.randint(0, v, (n,)).masked_fill(torch.rand(n) < 0.3, IGNORE)
    logits = hidden.double().abs() @ weight.double().abs().T
    # a loss moves by no more than twice the largest move of its logits; with BF16 logits are rounded once
    moved = (UNITS[dtype] + FP32_UNIT * (m**0.5 + v**0.5)) * (1 + logits.amax(-1))
    of_targets = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    bound = (2 * SAFETY * moved).sum() + n * FP32_UNIT * 8
    check(linear_cross_entropy, (hidden, weight, targets), of_targets, bound)


@SETTINGS
@given(layouts(), DTYPES, SIZES, st.integers(1, 6), SIZES, POWERS, POWERS)
def test_sums_of_streams(make: Any, dtype: torch.dtype, t: int, n: int, m: int, of_rows: int, of_weights: int) -> None:
    streams, output = make(of_rows, t, n, m, dtype=dtype), make(of_rows, t, m, dtype=dtype)
    post, comb = make(of_weights, t, n), make(of_weights, t, n, n)
    for operation, arguments, weights in (
        (read_streams, (streams, post), post.unsqueeze(-1)),
        (write_streams, (streams, output, post, comb), torch.cat((comb, post.unsqueeze(-2)), -2)),
    ):
        rows = streams if operation is read_streams else torch.cat((streams, output.unsqueeze(-2)), -2)
        want, sums = (
            w.mT @ r for w, r in ((weights.double(), rows.double()), (weights.double().abs(), rows.double().abs()))
        )
        want, sums = (y.view(t, -1, m).squeeze(1) if operation is read_streams else y for y in (want, sums))
        bound = SAFETY * (FP32_UNIT * (n + 1) ** 0.5 * sums + UNITS[dtype] * want.abs()) + 8 * FLUSHED
        check(operation, arguments, want, bound)


@SETTINGS
@given(layouts(), SIZES, st.integers(1, 7), st.integers(1, 8), POWERS)
def test_sinkhorn(make: Any, t: int, n: int, iterations: int, power: int) -> None:
    """A division by sums brings positive matrices no further apart, so the relative errors of all of them add up."""
    logits = make(power, t, n, n)
    want = sinkhorn.reference(logits.double(), iterations, 1e-6)
    check(sinkhorn, (logits, iterations, 1e-6), want, SAFETY * FP32_UNIT * (8 + 2 * iterations * (n + 2)) * want)


# --- dispatch and combine: every pair has its slot, and no expert is added to in an order left to chance


@given(st.data(), st.integers(1, 9), st.integers(1, 4), st.integers(1, 7), st.sampled_from([1, 64]))
def test_every_pair_has_a_slot_of_its_own_among_its_experts(data: Any, n: int, k: int, e: int, align: int) -> None:
    row = st.lists(st.integers(0, e - 1), min_size=k, max_size=k)
    indices = torch.tensor(data.draw(st.lists(row, min_size=n, max_size=n)))
    counts = torch.bincount(indices.flatten(), minlength=e)
    token, slot, ends = sort_by_expert(indices, e, align)

    assert slot.flatten().unique().numel() == n * k
    assert torch.equal(token[slot], torch.arange(n)[:, None].expand(n, k))
    assert (token[torch.isin(torch.arange(len(token)), slot, invert=True)] == 0).all()
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1]))
    assert (slot >= starts[indices]).all() and (slot < ends[indices]).all()
    assert (starts % align == 0).all()
    assert (ends - starts >= counts).all() and ends[-1] == len(token)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        assert token[start : start + count].diff().ge(0).all()
    if align == 1:
        assert len(token) == n * k and torch.equal(ends - starts, counts)
    else:
        elsewhere = sort_by_expert(torch.zeros_like(indices), e, align)
        assert len(elsewhere.token) == len(token)


@pytest.mark.parametrize(("m", "f"), [(24, 12), (23, 11)], ids=["grouped product", "one by one"])
@pytest.mark.parametrize(("n", "dtype"), [(5, torch.float32), (5, torch.bfloat16), (130, torch.bfloat16)])
def test_empty_experts_have_a_gradient_of_exactly_zero(m: int, f: int, n: int, dtype: torch.dtype) -> None:
    case = expert_case(n, dtype, m, f, routing=routed(n, 3, 6, empty=(0, 2, 5)))
    with ops.use("eager"), Operations() as seen:
        gradients = run(case, experts)[3:]
    grouped = m == 24 and hasattr(F, "grouped_mm")  # torch 2.9 has none
    assert any("grouped_mm" in result.operation for result in seen.results) == grouped
    for gradient in gradients:
        assert gradient.any(-1).any(-1).tolist() == [i not in (0, 2, 5) for i in range(6)]


ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_put", "index_reduce", "embedding_dense_backward")
"""Operations that add in no fixed order on an accelerator."""


def test_nothing_is_added_in_an_order_left_to_chance() -> None:
    with ops.use("eager"), Operations() as seen:  # the reference adds each expert's tokens, all distinct, by index
        run(expert_case(9, torch.float32), experts)
        torch.zeros(3).index_add(0, torch.tensor([1, 1]), torch.ones(2))
    found = [r.operation for r in seen.results if r.operation.strip("_") in ATOMIC and r.dtype.is_floating_point]
    assert found == ["index_add"]
