"""Named amounts: added up by name, and printed as a table.

`print(weight_bytes(v3, "fp8", mtp=False))` with DeepSeek-V3 shows among others

    scales               155.79 MiB    0.02%
    routed experts       609.00 GiB   97.11%
    total                627.12 GiB  100.00%
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

N = TypeVar("N", int, float)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """An amount of memory or traffic; `print` shows a table."""

    total: float
    """Bytes; a whole number unless something is a mean or an expectation."""
    by_part: Mapping[str, float]
    """Bytes of each part; they sum to total. The names of multi-token prediction begin with "mtp "."""

    @classmethod
    def of(cls, amounts: Iterable[tuple[str, float]]) -> Self:
        """Return the table of these names and amounts; amounts of one name are added up."""
        by_part = collect(amounts)
        return cls(total=sum(by_part.values()), by_part=by_part)

    def __str__(self) -> str:
        rows = [*self.by_part.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        whole = self.total or 1
        return "\n".join(f"{name:{width}}  {readable(amount):>11}  {amount / whole:7.2%}" for name, amount in rows)


def collect(amounts: Iterable[tuple[str, N]]) -> dict[str, N]:
    """Return the sum of the amounts of each name that has any, in order of first appearance."""
    out: dict[str, N] = {}
    for name, amount in amounts:
        if amount:
            out[name] = out[name] + amount if name in out else amount
    return out


def readable(amount: float) -> str:
    """Return the amount in the largest binary unit that leaves 1 or more."""
    unit = 0
    while abs(amount) >= 1024 and unit + 1 < len(UNITS):
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.6g} B" if not unit else f"{amount:.2f} {UNITS[unit]}"
