"""This machine's roofs: rates of products and of memory, measured once in a few seconds; and the file for them."""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from dsmini.atomic import lock, write_text
from dsmini.machine import DTYPES, card, last_level_cache, matmul_rate
from dsmini.measure.cpu_time import watched
from dsmini.measure.turns import in_turns
from dsmini.reading import read_table

R = TypeVar("R")

VERSION = 14
"""Version of the measurement; roofs stored by another version are measured again."""
LEAST_SHARE = 0.2
"""Least share of FP32's rate that a usable dtype reaches."""
BUSY, SLOW = 0.1, 0.2
"""Cores that are waited for, and share by which this machine is slower than usual, above which rates are disturbed. A
shared machine drifts by up to 15 % in minutes."""
ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""Variables that choose the instructions of torch's products."""
LARGE = 1 << 28
"""Bytes that fit into no cache."""
ROUNDS, ROUND = 5, 2e-4
"""Rounds of a measurement, and least seconds of one."""
PEAK_SECONDS = 1.0
"""Seconds to find the peak of a dtype."""


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
    cache_bytes: int
    """Bytes of the last-level cache."""
    probes: Mapping[str, float]
    """Seconds of a short product and of reading memory, to be repeated later; see steadiness."""
    disturbed: str = ""
    """Sentence about what disturbed the measurement; "" for nothing. Disturbed rates are too low, and not stored."""

    @property
    def memory(self) -> float:
        """Bytes/s from memory at most: of reading or of a copy, whichever is higher."""
        return max(self.bandwidth, self.copy)

    def peak_of(self, dtype: str) -> float:
        """Return the FLOP/s of products: of float32, or for narrower dtypes of the fastest, in which they run here."""
        return self.peak["float32"] if dtype == "float32" else max(self.peak.values())

    def least_seconds(self, moved: float, flops: float, dtype: str) -> float:
        """Return the roof: seconds of the bytes from memory, or of the products, whichever is longer."""
        return max(moved / self.memory, flops / self.peak_of(dtype))


@dataclass(frozen=True)
class Store:
    """A file of rates of one or more machines, each with a key. A damaged file has none."""

    path: Path

    @classmethod
    def at(cls, path: Path | None) -> "Store":
        """Return the store of a file; None: that in the user's cache. Without a home nothing is stored."""
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if cache.startswith("~"):  # it was not expanded, and would be a folder of that name here
            cache = os.devnull
        return cls(path or Path(cache) / "dsmini" / "roofs.json")

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

    def write(self, key: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Store rates under a key. No other process writes while `make` makes them of what is stored."""
        with suppress(OSError):  # measured again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as held:
                lock(held, self.path, wait=True)
                write_text(self.path, json.dumps({**self.contents(), key: make()}))


def disturbance(busy: float, steady: float = 1.0) -> str:
    """Return what disturbed a measurement in a sentence; "" if nothing did.

    Args:
        busy: cores that this process waited for.
        steady: rate of this machine during the measurement, as a share of its usual one.
    """
    if busy <= BUSY and steady >= 1 - SLOW:
        return ""
    why = f"this machine ran at {steady:.0%} of its usual rate"
    if busy > BUSY:
        why = f"other programs kept {busy:.1f} cores from this one"
    return f"{why} while it was measured: its rates are not stored, and predictions from them are too slow"


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


def load_or_measure(
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
) -> Roofs:
    """Return the roofs of this machine for the current number of threads, stored or measured now (a few seconds).

    Args:
        keep: file that stores the roofs of one or more machines; None: a file in the user's cache. A busy machine's
            roofs are not stored.
        on_part: called with the share that is done and the name of the next part.
        fresh: measure even if roofs are stored.
    """
    store, key = Store.at(keep), key_of(device)
    if not fresh and (stored := store.read(key, lambda raw: Roofs(**raw))) is not None:
        return stored
    roofs = measure(device, on_part)
    if roofs.disturbed:
        warnings.warn(roofs.disturbed, stacklevel=2)
    else:
        store.write(key, lambda: asdict(roofs))
    return roofs


def key_of(device: torch.device) -> str:
    """Return the key of this machine's roofs in a store."""
    chosen = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return json.dumps([VERSION, card(device), chosen], sort_keys=True)


def measure(device: torch.device, on_part: Callable[[float, str], None] = lambda done, what: None) -> Roofs:
    """Measure all rates, each as the median of a few rounds."""
    jobs: dict[str, Callable[[], Any]] = {
        "probes": lambda: probes(device),
        **{name: lambda dtype=dtype: matmul_rate(device, dtype, PEAK_SECONDS) for name, dtype in DTYPES.items()},
        "bandwidth": lambda: read_bandwidth(device),
        "copy": lambda: _copy(device),
        "probes again": lambda: probes(device),
    }
    done = dict[str, Any]()

    def measure_all() -> None:
        for i, (name, job) in enumerate(jobs.items()):
            on_part(i / len(jobs), name)
            done[name] = job()

    _, busy = watched(measure_all)
    first, again = done["probes"], done["probes again"]
    steady = min((min(pair) / max(pair) for pair in zip(first.values(), again.values(), strict=True)), default=1.0)
    return Roofs(
        card=card(device),
        peak={name: done[name] for name in DTYPES},
        bandwidth=done["bandwidth"],
        copy=done["copy"],
        probes={name: (seconds + again[name]) / 2 for name, seconds in first.items()},
        cache_bytes=last_level_cache(device),
        disturbed=disturbance(busy, steady),
    )


def seconds_of(
    run: Callable[[], object],
    device: torch.device,
    rounds: int = ROUNDS,
    least: float = ROUND,
    most: float = math.inf,
) -> float:
    """Return the median seconds of some rounds after a warm-up: the statistic of what is predicted.

    Args:
        least: seconds of a round, which repeats short runs.
        most: seconds after which no round begins; the first always runs.
    """
    return in_turns({"run": run}, device, count=rounds, seconds=most, least_seconds=least).median("run")


def read_bandwidth(device: torch.device, size: int = LARGE, rounds: int = 3) -> float:
    """Return the highest rate of operations that only read: a sum, and matrix-vector products in both dtypes.

    Args:
        size: bytes to read, a multiple of 16,384 that fits into no cache.
    """
    x = torch.ones(size // 4, device=device)
    rates = [size / seconds_of(lambda: x.sum(), device, rounds)]
    for dtype in (torch.float32, torch.bfloat16):
        matrix = x.view(dtype)[: size // 4].view(-1, 4096)
        vector = torch.ones(1, 4096, dtype=dtype, device=device)
        rates.append(matrix.nbytes / seconds_of(lambda m=matrix, v=vector: F.linear(v, m), device, rounds))
    return max(rates)


def probes(device: torch.device) -> dict[str, float]:
    """Return the current seconds of a matrix product and of a row times 128 MiB of weights.

    Takes a sixth of a second on two cores.
    """
    a = torch.ones(1024, 1024, device=device)
    weights, row = a.bfloat16().repeat(64, 1, 1), a[:1].bfloat16()

    def stream() -> None:
        for weight in weights:
            F.linear(row, weight)

    runs: dict[str, Callable[[], object]] = {"products": lambda: a @ a, "weights": stream}
    return {name: seconds_of(run, device, ROUNDS, 6e-3) for name, run in runs.items()}


def steadiness(roofs: Roofs, device: torch.device) -> float:
    """Return the lowest of the machine's current rates over the stored ones; 1 if none is stored."""
    return min((roofs.probes[name] / now for name, now in probes(device).items()), default=1.0) if roofs.probes else 1.0


def _copy(device: torch.device) -> float:
    x = torch.ones(LARGE // 8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device, 3)
