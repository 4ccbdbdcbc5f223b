"""Groups of named figures: dataclasses whose fields are quantities, so that all of a plan can be listed by name."""

import dataclasses
from typing import Any

from dsmini.planner.quantities.quantity import Anything, Quantity


class Figures:
    """Base of dataclasses of named quantities, other Figures, and tuples of them; None where a figure is absent."""

    __slots__ = ()

    def figures(self) -> dict[str, Anything]:
        """Return all figures by name, in the order of the fields."""
        found: dict[str, Anything] = {}
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            _collect(getattr(self, field.name), found)
        return found


def _collect(value: Any, found: dict[str, Anything]) -> None:
    if isinstance(value, Quantity):
        assert value.name, f"{value!r} has no name; name each figure"
        assert value.name not in found or found[value.name] is value, f"two figures are named {value.name}"
        found[value.name] = value
    elif isinstance(value, Figures):
        for figure in value.figures().values():
            _collect(figure, found)
    elif isinstance(value, tuple):
        for part in value:
            _collect(part, found)
