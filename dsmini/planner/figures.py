"""Plans that list their figures: a dataclass of named quantities, which may hold further plans.

for figure in plan.figures():
    print(figure.name, figure)
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from dsmini.planner.quantity import Anything, Quantity


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Base of every plan: its fields are named quantities, further plans, or None for what does not apply."""

    def figures(self) -> Iterator[Anything]:
        """Yield the named figures in the order of the fields, those of inner plans in their place."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Figures):
                yield from value.figures()
            elif isinstance(value, Quantity):
                assert value.name, f"{type(self).__name__}.{field.name} has no name"
                yield value
