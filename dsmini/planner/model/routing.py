"""Places that a token's experts are on: k even choices among n places hit n (1 - (1 - 1/n)^k) of them on average."""

from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, Count, largest, power

ONE = COUNT(1)


def places_hit(m: ModelInputs, places: Count) -> Count:
    """Return the expected number of different places, of equal size, that a token's experts are on."""
    return places * (ONE - power(ONE - ONE / places, m.n_activated_experts))


def node_limit(m: ModelInputs, nodes: Count) -> Count:
    """Return how many nodes the routing's groups allow; large groups span several nodes each."""
    return m.n_limited_groups * largest(ONE, nodes / m.n_expert_groups)
