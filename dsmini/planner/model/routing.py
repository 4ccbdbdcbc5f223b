"""Places that a token's experts are on.

k different experts of e, g of them on each of n places, miss a place with the probability

    (1 - g / e) (1 - g / (e - 1)) ... (1 - g / (e - k + 1))         k factors, or the same with k and g exchanged

which is about (1 - g / (e - (k - 1) / 2))^k. Either form is a little too high, so the smaller one counts. 8 of 256
experts on 8 places hit 5.29; with one expert a place they hit 8 exactly.
"""

from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, Count, largest, power, smallest

ONE = COUNT(1)


def places_hit(m: ModelInputs, places: Count) -> Count:
    """Return the expected number of different places, of equal size, that a token's experts are on."""
    every = largest(m.n_routed_experts, places)  # a place has an expert or more: redundant ones fill it
    here, chosen = every / places, m.n_activated_experts

    def missed(times: Count, of: Count) -> Count:
        return power(largest(ONE - of / (every - (times - ONE) / 2), COUNT(0)), times)

    return places * (ONE - smallest(missed(chosen, here), missed(here, chosen)))


def node_limit(m: ModelInputs, nodes: Count) -> Count:
    """Return how many nodes the routing's groups allow; large groups span several nodes each."""
    return m.n_limited_groups * largest(ONE, nodes / m.n_expert_groups)
