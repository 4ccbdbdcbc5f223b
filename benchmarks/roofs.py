"""This machine's roofs, measured once and kept: how fast it multiplies, and how fast it moves bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A rate that depends on a size, interpolated between measured sizes on a logarithmic scale."""

    sizes: Sequence[float]
    rates: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """Rates of one machine, device and number of threads."""

    card: Mapping[str, str]
    """What the machine is: processor, cores, memory, caches, device, versions."""
    peak: Mapping[str, float]
    """FLOP/s of a large matrix product, by dtype ("float32", "bfloat16")."""
    bandwidth: float
    """Bytes/s that are read from memory."""
    copy: float
    """Bytes/s, read and written together, of a large copy."""
    call: float
    """Seconds of an operation that does nothing."""
    curves: Mapping[str, Curve]
    """Bytes/s or FLOP/s of a class of operations, by size: see prediction.py."""
