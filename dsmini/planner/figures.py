"""Plans that list their figures: a dataclass of named quantities, which may hold further plans and tuples of them.

for figure in plan.figures():
    print(figure.name, figure)
by_name(plan)["kv_cache"]
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsmini.planner.quantity import Anything, Quantity


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Base of every plan: its fields are named quantities, further plans, tuples of them, or None without one."""

    def figures(self) -> Iterator[Anything]:
        """Yield the named figures in the order of the fields, those of inner plans in their place."""
        for field in dataclasses.fields(self):
            yield from _figures(getattr(self, field.name), f"{type(self).__name__}.{field.name}")


def by_name(plan: Figures) -> dict[str, Anything]:
    """Return the figures of a plan by name, in their order."""
    return unique(plan.figures())


def unique(figures: Iterable[Anything]) -> dict[str, Anything]:
    """Return figures by name. One that is there twice is the same."""
    found: dict[str, Anything] = {}
    for figure in figures:
        same = found.setdefault(figure.name, figure)
        assert same.value == figure.value and same.unit == figure.unit, f"two figures are named {figure.name}"
    return found


def _figures(value: Any, place: str) -> Iterator[Anything]:
    if isinstance(value, Figures):
        yield from value.figures()
    elif isinstance(value, tuple):
        for part in value:
            yield from _figures(part, place)
    elif isinstance(value, Quantity):
        assert value.name, f"{place} has no name"
        yield value
