"""Hardware of a plan: what one accelerator can hold and do, and the links to the others.

A hardware file is a TOML with a title, one table for each number, and a table for each dtype below [peaks]:

    title = "NVIDIA H800 SXM"

    [peaks.bfloat16]
    value = 989.4
    unit = "TFLOP/s"
    source = "NVIDIA H100 white paper, BF16 tensor cores without sparsity"

Every number has its source, or the file is refused. Two traps of data sheets: they print peaks with sparsity, twice
the dense ones, and NVLink in both directions together, 400 GB/s of an H800 where one direction has 200. Peaks here are
dense, and links count one direction of one accelerator. A plan divides by them: 1 GB over 200 GB/s takes 5 ms.

machines/ holds the files of the known hardware. `this` is the machine at hand, measured.
"""

import datetime
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from dsmini.config.fields import refuse_unknown
from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    DOLLARS_PER_SECOND,
    FLOPS_PER_SECOND,
    SECONDS,
    WATTS,
    Bytes,
    BytesPerSecond,
    Count,
    D,
    DollarsPerSecond,
    FlopsPerSecond,
    N,
    Quantity,
    Seconds,
    Unit,
    Watts,
)
from dsmini.reading import brief, read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One accelerator of a cluster. Every quantity is an input with its source; None where nothing is published."""

    name: str
    """Name on the command line, such as "h800"."""
    title: str
    """Name for people, such as "NVIDIA H800 SXM"."""
    peaks: Mapping[str, FlopsPerSecond]
    """Dense peak of matrix products by dtype: "float32", "bfloat16", "fp8", those that the hardware has."""
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    gpus_per_node: Count
    """Accelerators that the fast link connects."""
    fast_link: BytesPerSecond | None
    """Bytes per second that one accelerator sends to others of its node, one direction."""
    slow_link: BytesPerSecond | None
    """Bytes per second that one accelerator sends to other nodes, one direction."""
    link_latency: Seconds | None
    """Time of a small message to another node."""
    price: DollarsPerSecond | None
    """Rent of one accelerator."""
    power: Watts | None
    """Power of one accelerator with its share of the node."""
    fast_link_effective: BytesPerSecond | None = None
    """Part of fast_link that programs were measured to reach."""
    slow_link_effective: BytesPerSecond | None = None
    """Part of slow_link that programs were measured to reach."""

    def peak(self, dtype: str) -> FlopsPerSecond:
        """Return the dense peak of a dtype. Raises: ValueError for a dtype that the hardware has no units for."""
        if dtype not in self.peaks:
            raise ValueError(f"{self.title} has no {dtype} units; use one of {', '.join(self.peaks)}")
        return self.peaks[dtype]


MACHINES = Path(__file__).parent / "machines"
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
SIZES = {f"{p}B": size for p, size in PREFIXES.items()} | {f"{p}iB": 1024.0**i for i, p in enumerate("KMGT", 1)}
RATES = {f"{p}B/s": size for p, size in PREFIXES.items()} | {f"{p}b/s": size / 8 for p, size in PREFIXES.items()}
SPEEDS = {f"{p}FLOP/s": size for p, size in PREFIXES.items()}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@dataclass(frozen=True, slots=True)
class _Field(Generic[N, D]):
    """A number of a hardware file: its name in formulas, its title, and the units that it may have."""

    name: str
    title: str
    unit: Unit[N, D]
    sizes: Mapping[str, float]
    """Units by symbol, in base units; empty for a count."""

    def of(self, value: float, source: str) -> Quantity[N, D]:
        return self.unit(value, self.name, self.title, source)

    def read(self, key: str, table: Any, file: str) -> Quantity[N, D]:
        """Return the quantity of a table with value, unit and source."""
        parts = ["value", "unit", "source"] if self.sizes else ["value", "source"]
        if not isinstance(table, dict):
            raise ValueError(f"{key} in {file} is {brief(table)}, want a table [{key}] with {', '.join(parts)}")
        refuse_unknown(table, parts, file, f"{key}.")
        value, unit, source = table.get("value"), str(table.get("unit", "")), table.get("source")
        if not isinstance(source, str) or not source.strip():
            raise ValueError(f"{key} in {file} has no source; add source = the text that says where it comes from")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{key}.value in {file} is {brief(value)}, want a positive finite number")
        if not self.sizes:
            if value != int(value):
                raise ValueError(f"{key}.value in {file} is {value}, want a whole number")
            return self.of(int(value), source)
        if unit not in self.sizes:
            raise ValueError(f"{key}.unit in {file} is {brief(unit)}, want {', '.join(self.sizes)}")
        scaled = value * self.sizes[unit]
        if not 0 < scaled < math.inf:
            raise ValueError(f"{key} in {file} is {value} {unit}, beyond what a float can hold; check its unit")
        return self.of(int(scaled) if scaled.is_integer() and scaled < 2.0**53 else scaled, source)


DTYPES = ("float32", "bfloat16", "fp8")
PEAKS = {
    d: _Field(f"peak_{d}", f"Dense peak of {d} products of an accelerator", FLOPS_PER_SECOND, SPEEDS) for d in DTYPES
}
MEMORY = _Field("gpu_memory", "Memory of an accelerator", BYTES, SIZES)
BANDWIDTH = _Field("memory_bandwidth", "Bandwidth of an accelerator's memory", BYTES_PER_SECOND, RATES)
PER_NODE = _Field("gpus_per_node", "Accelerators that the fast link connects", COUNT, {})
FAST = _Field("fast_link", "Nominal rate to others of the node, one direction", BYTES_PER_SECOND, RATES)
SLOW = _Field("slow_link", "Nominal rate to other nodes, one direction", BYTES_PER_SECOND, RATES)
FAST_REACHED = _Field("fast_link_effective", "Reached rate to others of the node", BYTES_PER_SECOND, RATES)
SLOW_REACHED = _Field("slow_link_effective", "Reached rate to other nodes", BYTES_PER_SECOND, RATES)
LATENCY = _Field("link_latency", "Time of a small message to another node", SECONDS, TIMES)
PRICE = _Field("gpu_price", "Rent of an accelerator", DOLLARS_PER_SECOND, {"$/h": 1 / 3600, "$/s": 1.0})
POWER = _Field("gpu_power", "Power of an accelerator with its share of the node", WATTS, {"W": 1.0, "kW": 1e3})
KEYS = ["title", "peaks", "memory", "memory_bandwidth", "gpus_per_node", "fast_link", "slow_link"]
KEYS += ["fast_link_effective", "slow_link_effective", "link_latency", "price", "power"]


def known_hardware() -> list[str]:
    """Return the names of the known hardware, without `this`."""
    return sorted(path.stem for path in MACHINES.glob("*.toml"))


def load_hardware(
    name_or_path: str | Path, on_part: Callable[[float, str], None] = lambda done, what: None
) -> Hardware:
    """Return known hardware by name, that of your own TOML file by path, or this machine's, measured, for "this".

    Args:
        on_part: progress of measuring this machine, which takes half a minute the first time; see load_or_measure.

    Raises: ValueError for an unknown name, or naming what is wrong with a file.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "this":
        return _measured(on_part)
    if name in known_hardware():
        return _read(MACHINES / f"{name}.toml", name)
    if path.suffix != ".toml":
        known = ", ".join(known_hardware())
        raise ValueError(
            f"unknown hardware {brief(name)}; use one of {known}, this, or the path of your own .toml file"
        )
    return _read(path, path.stem)


def _read(path: Path, name: str) -> Hardware:
    raw = read_toml(path)
    file = path.name
    refuse_unknown(raw, KEYS, file, "")
    title, peaks = raw.get("title"), raw.get("peaks")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"{file} has no title; add title = the name of the hardware")
    if not isinstance(peaks, dict) or not peaks:
        raise ValueError(f"{file} has no peaks; add a table [peaks.bfloat16] with value, unit and source")
    refuse_unknown(peaks, list(DTYPES), file, "peaks.")

    def need(key: str, field: _Field[N, D]) -> Quantity[N, D]:
        if key not in raw:
            raise ValueError(f"{file} has no {key}; add a table [{key}]")
        return field.read(key, raw[key], file)

    def may(key: str, field: _Field[N, D]) -> Quantity[N, D] | None:
        return field.read(key, raw[key], file) if key in raw else None

    return Hardware(
        name=name,
        title=title,
        peaks={dtype: PEAKS[dtype].read(f"peaks.{dtype}", peaks[dtype], file) for dtype in DTYPES if dtype in peaks},
        memory=need("memory", MEMORY),
        memory_bandwidth=need("memory_bandwidth", BANDWIDTH),
        gpus_per_node=need("gpus_per_node", PER_NODE),
        fast_link=may("fast_link", FAST),
        slow_link=may("slow_link", SLOW),
        fast_link_effective=may("fast_link_effective", FAST_REACHED),
        slow_link_effective=may("slow_link_effective", SLOW_REACHED),
        link_latency=may("link_latency", LATENCY),
        price=may("price", PRICE),
        power=may("power", POWER),
    )


def _measured(on_part: Callable[[float, str], None]) -> Hardware:
    """Return the machine at hand: rates of its stored roofs, or measured now."""
    import torch

    from dsmini import machine
    from dsmini.measure.calibration import load_or_measure
    from dsmini.measure.rates import why_unusable

    device = machine.pick_device("auto")
    memory = machine.memory_bytes(device)
    if not memory:
        raise ValueError("the memory of this machine is unknown; write its numbers into a .toml file of your own")
    roofs = load_or_measure(device, on_part=on_part)
    source = f"measured here by dsmini.measure, {datetime.date.today()}"
    usable = [name for name, dtype in machine.DTYPES.items() if why_unusable(dtype, roofs.peak) is None]
    return Hardware(
        name="this",
        title=roofs.card["device" if device.type == "cuda" else "processor"],
        peaks={dtype: PEAKS[dtype].of(roofs.peak[dtype], source) for dtype in usable},
        memory=MEMORY.of(memory, source),
        memory_bandwidth=BANDWIDTH.of(roofs.bandwidth, source),
        gpus_per_node=PER_NODE.of(torch.cuda.device_count() if device.type == "cuda" else 1, source),
        fast_link=None,
        slow_link=None,
        link_latency=None,
        price=None,
        power=None,
    )
