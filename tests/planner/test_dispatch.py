"""Traffic of expert parallelism against routing that is drawn, and against print."""

import dataclasses
import math
from typing import Any

import pytest

from dsmini.planner.model.routing import places_hit
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT
from dsmini.planner.training.dispatch import DispatchFigures, dispatch_figures
from tests.helpers.configs import refusal, released
from tests.helpers.plans import H800

V3 = released("deepseek-v3")


def dispatch_of(expert: int = 64, dispatch: Any = "fp8", **changes: Any) -> DispatchFigures:
    config = dataclasses.replace(V3, **changes)
    return dispatch_figures(ModelInputs.of(config, "a test"), H800, COUNT(expert, "expert", "GPUs", "a test"), dispatch)


def test_rows_of_v3() -> None:
    found = dispatch_of()
    assert (found.dispatch_row.value, found.combine_row.value) == (7392, 14336)
    assert dispatch_of(dispatch="bf16").dispatch_row.value == 14336


@pytest.mark.parametrize(("limit", "drawn"), [(4, 3.97), (8, 5.29), (2, 2.0)])
def test_nodes_reached_are_those_of_drawn_scores(limit: int, drawn: float) -> None:
    """Nodes that a V3 gate with random scores reached. The four best nodes are hit but for 1 %."""
    assert dispatch_of(n_limited_groups=limit).nodes_reached.value == pytest.approx(drawn, rel=0.011)


@pytest.mark.parametrize(
    ("experts", "chosen", "places"), [(256, 8, 8), (256, 8, 64), (64, 6, 8), (8, 8, 8), (160, 6, 1)]
)
def test_places_hit_are_those_of_different_experts(experts: int, chosen: int, places: int) -> None:
    """An exact count: a place is missed if all chosen experts are among the others. The midpoint is 0.1 % off."""
    m = ModelInputs.of(
        dataclasses.replace(
            V3, n_routed_experts=experts, n_activated_experts=chosen, n_expert_groups=1, n_limited_groups=1
        ),
        "a test",
    )
    missed = math.comb(experts - experts // places, chosen) / math.comb(experts, chosen)
    assert places_hit(m, COUNT(places)).value == pytest.approx(places * (1 - missed), rel=1e-3)


def test_more_places_than_experts_are_hit_once_each() -> None:
    assert places_hit(ModelInputs.of(V3, "a test"), COUNT(320)).value == pytest.approx(8)


def test_v3_reaches_at_most_four_nodes() -> None:
    found = dispatch_of()
    assert (found.expert_nodes.value, found.node_limit.value, found.nodes_reached.value) == (8, 4, 4)
    assert found.slow_copies.value == 3.5
    assert found.slow_bytes.value == 3.5 * (7392 + 14336)
    assert found.slow_copies_unlimited.value == 7, "the eighth expert is on the token's own node"
    assert found.slow_bytes_unlimited.value == 7 * (7392 + 14336)
    assert found.dispatch_seconds.value == found.slow_bytes.value / 40e9


def test_copies_inside_a_node() -> None:
    """One node: nothing crosses the slow link; a token reaches 5.29 GPUs, its own among them."""
    found = dispatch_of(expert=8)
    assert (found.expert_nodes.value, found.slow_copies.value) == (1, 0)
    assert found.fast_copies.value == pytest.approx(8 * (1 - math.comb(224, 8) / math.comb(256, 8)) * 7 / 8, rel=1e-4)
    assert found.dispatch_seconds.value == pytest.approx(found.fast_copies.value * 21728 / 160e9)


def test_limit_counts_groups_that_span_nodes() -> None:
    """256 GPUs are 32 nodes, 4 for each of 8 groups: 4 groups are 16 nodes; two nodes of 16 GPUs hold 4 groups each."""
    assert dispatch_of(expert=256).node_limit.value == 16
    assert dispatch_of(expert=16).node_limit.value == 4
    assert dispatch_of(expert=16).nodes_reached.value == pytest.approx(
        2 * (1 - math.comb(128, 8) / math.comb(256, 8)), rel=1e-4
    )
    assert dispatch_of(n_expert_groups=1, n_limited_groups=1).node_limit.value == 8


def test_hardware_without_links_raises() -> None:
    m, expert = ModelInputs.of(V3, "a test"), COUNT(64, "expert", "GPUs", "a test")
    alone = dataclasses.replace(H800, fast_link=None)
    assert "no fast link between GPUs" in refusal(dispatch_figures, m, alone, expert)
    node = dataclasses.replace(H800, slow_link=None)
    assert "no link between nodes" in refusal(dispatch_figures, m, node, expert)
    found = dispatch_figures(m, node, COUNT(8, "expert", "GPUs", "a test"))
    assert found.dispatch_seconds.value == pytest.approx(found.fast_bytes.value / 160e9)
