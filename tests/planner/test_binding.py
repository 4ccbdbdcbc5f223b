"""Verdicts: which resource binds, by how much, and the word for it in each vocabulary."""

import pytest

from dsmini.planner.binding import AXES, Axis, Demand, Resource, Vocabulary, binding
from dsmini.planner.quantities.formula import evaluate
from dsmini.planner.quantities.quantity import SECONDS


def demand(resource: Resource, seconds: float) -> Demand:
    return Demand(resource=resource, time=SECONDS(seconds, resource.name.lower(), resource.value, "a test"))


def test_largest_time_binds_and_second_is_next() -> None:
    found = binding(
        [demand(Resource.COMPUTE, 2), demand(Resource.LINKS_BETWEEN, 14), demand(Resource.MEMORY, 7)], "step_"
    )
    assert found.first.resource is Resource.LINKS_BETWEEN
    assert found.second is not None and found.second.resource is Resource.MEMORY
    assert found.ratio is not None and found.ratio.value == 2
    assert found.ratio.name == "step_binding_ratio"
    assert evaluate(found.ratio, {"memory": 3.5}) == 4
    assert evaluate(found.ratio, {"memory": 1}) == 7, "compute is second then"
    assert evaluate(found.ratio, {"memory": 28}) == 2, "memory binds then"
    assert [figure.name for figure in found.figures().values()] == ["step_binding_ratio"]


@pytest.mark.parametrize(
    ("resource", "article", "textbook"),
    [
        (Resource.WAITING, Axis.DATA, Axis.DATA),
        (Resource.MEMORY, Axis.MACHINE, Axis.DATA),
        (Resource.LINKS_BETWEEN, Axis.MACHINE, Axis.MACHINE),
        (Resource.LINKS_WITHIN, Axis.MACHINE, Axis.MACHINE),
        (Resource.COMPUTE, Axis.ALGORITHM, Axis.MACHINE),
        (Resource.LATENCY, Axis.MACHINE, Axis.ALGORITHM),
    ],
)
def test_word_of_each_resource(resource: Resource, article: Axis, textbook: Axis) -> None:
    found = binding([demand(resource, 3)], "step_")
    assert found.axis(Vocabulary.ARTICLE) is article
    assert found.axis(Vocabulary.TEXTBOOK) is textbook


def test_every_word_is_used_and_every_resource_has_one() -> None:
    for words in AXES.values():
        assert words.keys() == set(Resource)
        assert set(words.values()) == set(Axis)


def test_one_demand_has_no_second() -> None:
    found = binding([demand(Resource.COMPUTE, 4), demand(Resource.LINKS_BETWEEN, 0)], "step_")
    assert found.second is None and found.ratio is None


def test_equal_demands_bind_in_their_order() -> None:
    found = binding([demand(Resource.LINKS_BETWEEN, 4), demand(Resource.COMPUTE, 4)], "step_")
    assert found.first.resource is Resource.LINKS_BETWEEN
    assert found.ratio is not None and found.ratio.value == 1


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one time above 0 s"):
        binding([demand(Resource.COMPUTE, 0)], "step_")
