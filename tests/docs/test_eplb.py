"""Check the load balancer against its published example and figures, by its invariants, and by brute force."""

import itertools
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from docs.tutorials.eplb import balance, copies_of, place_experts
from tests.helpers.configs import refusal

README = tomllib.loads(Path(__file__).with_name("eplb.toml").read_text())
LOADS = np.array(README["loads"])


def test_readme_example_is_reproduced() -> None:
    assert place_experts(LOADS, 16, 4, 2, 8).tolist() == README["placed"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int, int]:
    """Draw loads and sizes that fit, of both policies."""
    nodes, per_node, per_group = (draw(st.integers(1, 3)) for _ in range(3))
    groups = draw(st.sampled_from([nodes, 2 * nodes, 1]))
    gpus, experts = nodes * per_node, groups * per_group
    least = -(-experts // gpus) * gpus
    most = experts * (gpus if groups % nodes else per_node)
    replicas = draw(st.integers(0, 3)) * gpus + least
    layers = draw(st.integers(1, 2))
    load = st.integers(0, draw(st.sampled_from([1, 10, 100_000])))
    rows = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
    replicas = max(least, min(replicas, most // gpus * gpus))
    assume(replicas <= most)
    return np.array(rows), replicas, groups, nodes, gpus


@settings(max_examples=120)
@given(cases())
def test_placement_keeps_its_invariants(case: tuple[np.ndarray, int, int, int, int]) -> None:
    loads, n_replicas, n_groups, n_nodes, n_gpus = case
    placed = place_experts(loads, n_replicas, n_groups, n_nodes, n_gpus)
    counts = copies_of(placed, loads.shape[1])
    assert placed.shape == (len(loads), n_replicas)
    assert (counts >= 1).all() and (counts.sum(1) == n_replicas).all()
    for experts in placed:
        if n_groups % n_nodes == 0:  # a group stays whole on one node
            nodes = np.arange(n_replicas) // (n_replicas // n_nodes)
            groups = experts // (loads.shape[1] // n_groups)
            assert len(set(zip(groups.tolist(), nodes.tolist(), strict=True))) == n_groups
    found = balance(loads, placed, n_gpus)
    shares = np.take_along_axis(loads / counts, placed, axis=1).reshape(len(loads), n_gpus, -1).sum(2)
    mean = loads.sum(1) / n_gpus
    assert shares.sum(1) == pytest.approx(loads.sum(1)), "no load is lost, none is counted twice"
    assert found * mean == pytest.approx(shares.max(1) * (mean > 0))


@pytest.mark.parametrize(
    ("n_replicas", "groups", "nodes", "gpus", "after"),
    # the mean over layers varies by 0.01 with the draw, the last one by 0.05: it is the largest of 256 loads
    [(288, 8, 4, 32, (1.04, 1.06)), (288, 8, 1, 32, (1.001, 1.003)), (320, 1, 1, 320, (2.25, 2.37))],
)
def test_published_sizes_are_balanced(
    n_replicas: int, groups: int, nodes: int, gpus: int, after: tuple[float, float]
) -> None:
    loads = np.random.default_rng(16).random((58, 256)) ** 3
    found = balance(loads, place_experts(loads, n_replicas, groups, nodes, gpus), gpus)
    assert after[0] < found.mean() < after[1]
    if gpus == 32:
        before = balance(loads, np.arange(256)[None].repeat(58, 0), gpus)
        assert 1.8 < before.mean() < 2.1
        assert found.max() < before.min()


def test_largest_load_per_copy_is_the_smallest_possible() -> None:
    ways = np.array([counts for counts in itertools.product(range(1, 6), repeat=4) if sum(counts) == 8])
    for seed in range(20):
        loads = np.random.default_rng(seed).random((1, 4)) ** 2
        counts = copies_of(place_experts(loads, 8, 1, 1, 2), 4)
        assert (loads / counts).max() == (loads / ways).max(1).min()


def test_wrong_sizes_and_loads_are_refused() -> None:
    for sizes, sentence in README["refused"]:
        said = refusal(place_experts, LOADS, *sizes)
        assert sentence in said and "\n" not in said
    for wrong in ([[1.0, float("nan")]], [[1, -1]], [1, 2], [[]], np.zeros((0, 2))):
        assert "loads" in refusal(place_experts, np.array(wrong), 2, 1, 1, 1)
