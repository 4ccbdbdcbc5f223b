"""This machine's roofs: how fast it multiplies, how fast it moves bytes, what a call costs.

calibration.py measures them.

A class of operations has a curve: what one operation takes, by its size, from so small that only the call is left to so
large that no cache holds it. Between measured sizes it is interpolated, on logarithmic scales.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The cost of a class of operations, by size."""

    sizes: Sequence[float]
    costs: Sequence[float]

    def at(self, size: float) -> float:
        """Return the cost at a size: beyond the last in proportion to it, below the first the first's."""
        if size <= self.sizes[0]:
            return self.costs[0]
        if size >= self.sizes[-1]:
            return self.costs[-1] * size / self.sizes[-1]
        i = next(i for i, s in enumerate(self.sizes) if s > size)
        (a, b), (low, high) = self.sizes[i - 1 : i + 1], self.costs[i - 1 : i + 1]
        share = math.log(size / a) / math.log(b / a)
        return low * (high / low) ** share


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """Rates of one machine, device and number of threads."""

    card: Mapping[str, str]
    """The machine: processor, cores, memory, caches, device, versions."""
    peak: Mapping[str, float]
    """FLOP/s of a large matrix product, by dtype ("float32", "bfloat16")."""
    bandwidth: float
    """Bytes/s that are read from memory."""
    copy: float
    """Bytes/s, read and written together, of a large copy."""
    call: float
    """Seconds of a call in a model, whatever it does: torch's part and that of the Python around it."""
    cache_bytes: int
    """Bytes of the last-level cache."""
    probes: Mapping[str, float]
    """Seconds of a product and of reading memory, so short that they can be taken again and again; see steadiness."""
    curves: Mapping[str, Curve]
    """Seconds by bytes of "warm pointwise float32" and the like, FLOP/s by rows of "cold product bfloat16";
    cold: what is read comes from memory, and what is written goes where nothing was lately."""


def from_json(raw: Mapping[str, Any]) -> Roofs:
    return Roofs(**{**raw, "curves": {name: Curve(**curve) for name, curve in raw["curves"].items()}})


SMALL, LARGE_MATRIX = 256 * 1024, 1024 * 1024


def product_rate(roofs: Roofs, dtype: str, rows: float, size: float, cold: float) -> float:
    """Return flops_rate of a product with a matrix of so many numbers, between the two sizes that were measured."""
    share = math.log(min(max(size, SMALL), LARGE_MATRIX) / SMALL) / math.log(LARGE_MATRIX / SMALL)
    small, large = (flops_rate(roofs, kind, dtype, rows, cold) for kind in ("small product", "product"))
    return small * (large / small) ** share


def flops_rate(roofs: Roofs, kind: str, dtype: str, rows: float, cold: float) -> float:
    """Return the FLOP/s of a product whose rows share a matrix, where a share `cold` of its bytes comes from memory."""
    rates = []
    for name in ("warm", "cold"):
        curve = roofs.curves[f"{name} {kind} {dtype}"]
        rates.append(curve.at(min(max(rows, curve.sizes[0]), curve.sizes[-1])))
    return 1 / ((1 - cold) / rates[0] + cold / rates[1])


def point_seconds(roofs: Roofs, kind: str, dtype: str, size: float, cold: float) -> float:
    """Return the seconds of an operation that moves so many bytes, a share `cold` of them from memory."""
    warm, far = (roofs.curves[f"{name} {kind} {dtype}"].at(size) for name in ("warm", "cold"))
    return (1 - cold) * warm + cold * far
