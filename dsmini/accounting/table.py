"""Named amounts, added up by name and printed as a table; and arguments that several counts refuse.

`print(weight_bytes(v3, "fp8", mtp=False))` with DeepSeek-V3 shows among others

    scales               155.79 MiB    0.02%
    routed experts       609.00 GiB   97.11%
    total                627.12 GiB  100.00%
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from dsmini.accounting.tensors import collect
from dsmini.config import ModelConfig

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


def readable(amount: float) -> str:
    """Return the amount in the largest binary unit that leaves 1 or more."""
    unit = 0
    while abs(amount) >= 1024 and unit + 1 < len(UNITS):
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.6g} B" if not unit else f"{amount:.2f} {UNITS[unit]}"


def check_dtype(dtype: str, known: tuple[str, ...]) -> None:
    """Refuse a dtype that is not among the known ones."""
    if dtype not in known:
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not positive; use 1 or more")


def check_context(c: ModelConfig, context: int) -> None:
    """Refuse a context that the model cannot have."""
    if not 1 <= context <= c.max_seq_len:
        raise ValueError(f"context={context} is not from 1 to max_seq_len={c.max_seq_len}; use such a number")


def check_depths(c: ModelConfig, seq_len: int) -> None:
    """Refuse training sequences that leave a depth of multi-token prediction without a position."""
    if seq_len <= c.n_mtp_layers:
        raise ValueError(f"seq_len={seq_len} is too short for n_mtp_layers={c.n_mtp_layers}; use more tokens")
