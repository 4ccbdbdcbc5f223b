"""A finding: one thing that was measured about a run, in numbers and in words."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["Data", "Algorithm", "Machine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A measured figure, its interval, and a verdict on it."""

    axis: Axis
    """Part of a run that the figure is about."""
    name: str
    """Short name, unique over all findings: "duplicates"."""
    value: float
    unit: str
    low: float
    """Lower end of the 95% interval; the value itself where it is exact."""
    high: float
    """Upper end of the 95% interval; the value itself where it is exact."""
    is_fault: bool
    """The figure is bad enough that a user should act."""
    sentence: str
    """Sentence about what was measured, with numbers and units."""
    fix: str = ""
    """First thing to do; empty where there is nothing to do."""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"finding {self.name!r} has value={self.value!r} outside low={self.low!r} to high={self.high!r}; "
                "want low <= value <= high"
            )
        if self.is_fault and not self.fix:
            raise ValueError(f"finding {self.name!r} is a fault without a fix; say what to do first")
