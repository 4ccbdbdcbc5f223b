"""This machine's roofs: rates of products and of memory, and the cost of a call; and the file that stores rates.

calibration.py measures them. Each class of operations has a curve of costs by size, from sizes where only the call
counts to sizes that fit into no cache. Between measured sizes the curve is interpolated on logarithmic scales.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dsmini.atomic import write_text
from dsmini.reading import read_table

R = TypeVar("R")

LEAST_SHARE = 0.2
"""Least share of FP32's rate that a usable dtype reaches."""
BUSY = 0.1
"""Share of the time without a core above which rates are those of a busy machine."""
BUSY_WORDS = (
    "other programs had the cores while this machine's rates were measured ({:.0%} of the time): the rates are too "
    "low and not stored; predictions are too slow until it is measured again on a quiet machine"
)
SMALL, LARGE_MATRIX = 256 * 1024, 1024 * 1024
"""Elements in the matrices of the two measured products."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Cost of a class of operations by size."""

    sizes: Sequence[float]
    costs: Sequence[float]

    def at(self, size: float) -> float:
        """Return the cost at a size: proportional beyond the last measured size, constant below the first."""
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
    """Description of the machine: processor, cores, memory, caches, device, versions."""
    peak: Mapping[str, float]
    """FLOP/s of a large matrix product, by dtype ("float32", "bfloat16")."""
    bandwidth: float
    """Bytes/s of reading memory."""
    copy: float
    """Bytes/s of a large copy, read and written together."""
    call: float
    """Seconds of any call in a model, in torch and in the Python around it."""
    cache_bytes: int
    """Bytes of the last-level cache."""
    probes: Mapping[str, float]
    """Seconds of a short product and of reading memory, to be repeated later; see steadiness."""
    curves: Mapping[str, Curve]
    """Seconds by bytes, such as "warm pointwise float32", and FLOP/s by rows, such as "cold product bfloat16". Cold
    operations read from memory and write to memory that is not in a cache."""
    busy: float = 0.0
    """Cores that this process waited for while it measured. Above BUSY the rates are those of a busy machine: they are
    too low, and are not stored."""


def from_json(raw: Mapping[str, Any]) -> Roofs:
    """Return roofs from JSON."""
    return Roofs(**{**raw, "curves": {name: Curve(**curve) for name, curve in raw["curves"].items()}})


@dataclass(frozen=True)
class Store:
    """A file of rates of one or more machines, each with a key. A damaged file has none."""

    path: Path

    @classmethod
    def at(cls, path: Path | None) -> "Store":
        """Return the store of a file; None: that in the user's cache."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(path or cache / "dsmini" / "roofs.json")

    def contents(self) -> dict[str, Any]:
        try:
            return read_table(self.path)
        except ValueError:
            return {}

    def read(self, key: str, parse: Callable[[Any], R]) -> R | None:
        """Return what is stored under a key; None if nothing is, or if it is damaged."""
        with suppress(KeyError, TypeError, AttributeError, ValueError):
            return parse(self.contents()[key])
        return None

    def write(self, key: str, value: Mapping[str, Any], busy: float) -> None:
        """Store rates under a key, unless they are those of a busy machine; that is said."""
        if busy > BUSY:
            warnings.warn(BUSY_WORDS.format(busy), stacklevel=2)
            return
        with suppress(OSError):  # measured again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({**self.contents(), key: value}))


def why_unusable(dtype: torch.dtype, peak: Mapping[str, float]) -> str | None:
    """Return the reason why a dtype is too slow here, in words, or None if it is usable.

    Many CPUs have no BF16 units (AVX2 without AVX-512 or AMX). torch's BF16 matrix product is a plain loop there:
    0.3 GFLOP/s where FP32 reaches 170.

    Args:
        peak: Roofs.peak. A missing dtype counts as usable.
    """
    name = str(dtype).removeprefix("torch.")
    here, plain = peak.get(name), peak.get("float32")
    if here is None or plain is None or here >= LEAST_SHARE * plain:
        return None
    return f"{name} products run at {here / 1e9:.3g} GFLOP/s here, float32 at {plain / 1e9:.3g}"


def product_rate(roofs: Roofs, dtype: str, rows: float, size: float, cold: float) -> float:
    """Return flops_rate of a product with a matrix of `size` elements, interpolated between the two measured sizes."""
    small, large = (flops_rate(roofs, kind, dtype, rows, cold) for kind in ("small product", "product"))
    return between(small, large, size, SMALL, LARGE_MATRIX)


def between(small: float, large: float, size: float, least: float, most: float) -> float:
    """Return the rate at a size, interpolated on logarithmic scales between those at `least` and at `most`."""
    share = math.log(min(max(size, least), most) / least) / math.log(most / least)
    return small * (large / small) ** share


def flops_rate(roofs: Roofs, kind: str, dtype: str, rows: float, cold: float) -> float:
    """Return the FLOP/s of a product whose rows share a matrix and read a share `cold` of the bytes from memory."""
    rates = []
    for name in ("warm", "cold"):
        curve = roofs.curves[f"{name} {kind} {dtype}"]
        rates.append(curve.at(min(max(rows, curve.sizes[0]), curve.sizes[-1])))
    return 1 / ((1 - cold) / rates[0] + cold / rates[1])


def point_seconds(roofs: Roofs, kind: str, dtype: str, size: float, cold: float) -> float:
    """Return the seconds of an operation that moves `size` bytes, a share `cold` of them from memory."""
    warm, far = (roofs.curves[f"{name} {kind} {dtype}"].at(size) for name in ("warm", "cold"))
    return (1 - cold) * warm + cold * far
