"""Random figures of a plan, to hold formulas and their explanations to the computation."""

import random
from collections.abc import Callable, Mapping

from dsmini.planner.quantities.quantity import (
    COUNT,
    Count,
    exponential,
    geometric_mean,
    largest,
    power,
    smallest,
    total,
)

ONE = COUNT(1)


def bounded(x: Count) -> Count:
    """Return a smooth function of x between -1/2 and 1/2."""
    return x / (ONE + x * x)


SMOOTH: Mapping[str, Callable[[Count, Count], Count]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / (ONE + y * y),
    "max": largest,
    "min": smallest,
    "**": lambda x, y: power(ONE + bounded(x), ONE + bounded(y)),
    "exp": lambda x, y: exponential(bounded(x)) * y,
    "sqrt": lambda x, y: geometric_mean(ONE + x * x, ONE + y * y),
    "shared": lambda x, y: x * x * y + x,
}
"""Operations without jumps, in terms that stay in their domain whatever x and y are."""


def random_figure(seed: str, values: Mapping[str, float], operations: int = 40, named: float = 0.2) -> Count:
    """Return a figure of these inputs. The seed alone decides on the operations, never the values.

    Args:
        named: share of the results that get a name.
    """
    rng = random.Random(seed)
    known = [COUNT(value, name, name) for name, value in values.items()]
    for number in range(operations):
        # a product of the largest ones again and again would grow without bound
        x, y = (bounded(a) if rng.random() < 0.5 else a for a in rng.sample(known, 2))
        known = [*known[-8:], SMOOTH[rng.choice(sorted(SMOOTH))](x, y)]
        if rng.random() < named:
            known[-1] = known[-1].named(f"part_{number}", f"Part {number}")
    return total(known)


def drawn(seed: str) -> dict[str, float]:
    rng = random.Random(seed)
    return {name: rng.uniform(0.5, 2) for name in "abcde"}
