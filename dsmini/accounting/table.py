"""Bytes by part, and as a table that people can read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from dsmini.accounting.tensors import collect

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """An amount of memory or traffic; `print` shows a table."""

    total: float
    """Bytes; a whole number unless something is a mean or an expectation."""
    by_part: Mapping[str, float]
    """They sum to total. Multi-token prediction's names begin with "mtp "."""

    @classmethod
    def of(cls, amounts: Iterable[tuple[str, float]]) -> Self:
        """From names and amounts; those of one name are added up."""
        by_part = collect(amounts)
        return cls(total=sum(by_part.values()), by_part=by_part)

    def __str__(self) -> str:
        rows = [*self.by_part.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        whole = self.total or 1
        return "\n".join(f"{name:{width}}  {readable(amount):>11}  {amount / whole:7.2%}" for name, amount in rows)


def readable(amount: float) -> str:
    """With the largest unit that leaves 1 or more, of 1024 steps."""
    unit = 0
    while abs(amount) >= 1024 and unit + 1 < len(UNITS):
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.6g} B" if not unit else f"{amount:.2f} {UNITS[unit]}"
