"""Dispatch and combine: every pair has its slot, and the experts equal a loop over tokens and experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini import Experts, MoE, ops
from dsmini.numerics import dispatch, grouped_linear
from dsmini.numerics.dispatch import grouped_linear_by_expert, sort_by_expert
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.helpers.watching import Operations

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")


class Pairs(NamedTuple):
    """Tokens, and the experts that each of them chose."""

    x: Tensor
    indices: Tensor
    weights: Tensor


def stack(e: int, m: int, f: int) -> Experts:
    return Experts(
        n_routed_experts=e, dim=m, moe_inter_dim=f, n_activated_experts=1, n_expert_groups=1, n_limited_groups=1
    )


def pairs_of(n: int, k: int, e: int, m: int, empty: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Pairs:
    """Return random tokens that each choose k distinct experts of those not left empty."""
    open_to_all = torch.tensor([i for i in range(e) if i not in empty])
    indices = open_to_all[torch.rand(n, len(open_to_all)).argsort()[:, :k]]
    return Pairs(torch.randn(n, m, dtype=dtype), indices, torch.rand(n, k) + 0.5)


def run(experts: Experts, pairs: Pairs, forward: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Return the output, and the gradients of a fixed random projection of it."""
    x, weights = pairs.x.detach().requires_grad_(), pairs.weights.detach().requires_grad_()
    named = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    y = (forward or experts)(x, pairs.indices, weights)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    grads = torch.autograd.grad((y * direction).sum(), list(named.values()))
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}


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


SIZES = {"grouped product": (24, 12), "one by one": (23, 11)}


@pytest.mark.parametrize(("m", "f"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("n", "dtype"), [(5, torch.float32), (5, torch.bfloat16), (130, torch.bfloat16)])
def test_empty_experts_have_a_gradient_of_exactly_zero(m: int, f: int, n: int, dtype: torch.dtype) -> None:
    experts = stack(6, m, f)
    empty = (0, 2, 5)
    x, indices, weights = pairs_of(n, 3, e=6, m=m, empty=empty, dtype=dtype)
    experts(x, indices, weights).float().square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        for i in range(6):
            assert bool(parameter.grad[i].eq(0).all()) == (i in empty), f"{name}[{i}]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_gives_the_same_bits(randomise: Any, dtype: torch.dtype) -> None:
    moe = randomise(MoE(dim=24, moe_inter_dim=12))

    def once() -> list[Tensor]:
        x = torch.randn(2, 130, 24, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        y, routing = moe(x)
        return [y, routing.indices, *torch.autograd.grad(y.float().square().sum(), [x, *moe.parameters()])]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_put", "index_reduce", "embedding_dense_backward")
"""Operations that add in no fixed order on an accelerator."""


def test_nothing_is_added_in_an_order_left_to_chance(randomise: Any) -> None:
    experts = randomise(stack(4, 24, 12))
    with ops.use("eager"), Operations() as seen:  # the reference adds each expert's tokens, all distinct, by index
        run(experts, pairs_of(9, 3, e=4, m=24))
        torch.zeros(3).index_add(0, torch.tensor([1, 1]), torch.ones(2))
    found = [r.operation for r in seen.results if r.operation.strip("_") in ATOMIC and r.dtype.is_floating_point]
    assert found == ["index_add"]


@needs_grouped_mm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_one_by_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(dispatch.F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k))
    x = torch.randn(130, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 16, 24, requires_grad=True)
    ends = torch.tensor([0, 1, 64, 64, 130])
    direction = torch.randn(130, 16, dtype=dtype)

    def both(product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = product(x, weight.to(dtype), ends)
        return (y, *torch.autograd.grad((y * direction).sum(), [x, weight]))

    results = zip(both(grouped_linear), both(grouped_linear_by_expert), strict=True)
    assert calls
    tolerance = rounding(FP32_UNIT, terms=130) if dtype == torch.float32 else rounding(BF16_UNIT)
    assert all(relative_error(a, b) <= tolerance for a, b in results)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("n", [5, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_reaches_no_output_and_no_gradient(randomise: Any, n: int, dtype: torch.dtype) -> None:
    experts = stack(4, 24, 12)
    results = run(randomise(experts), pairs_of(n, 3, e=4, m=24, empty=(3,), dtype=dtype))
    assert all(result.isfinite().all() for result in results.values())
