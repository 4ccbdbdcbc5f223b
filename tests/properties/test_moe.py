"""Dispatch and combine: every pair has its slot, and the experts equal a loop over tokens and experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsmini import ops
from dsmini.nn.moe import experts
from dsmini.numerics.dispatch import sort_by_expert
from tests.helpers.operations import expert_case, routed, run
from tests.helpers.watching import Operations


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
