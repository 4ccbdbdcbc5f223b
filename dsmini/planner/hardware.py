"""Hardware of a plan: what one accelerator can hold and do, and the links to the others.

machines.toml has the known hardware, and says how to write a file of your own. `this` is the machine at hand, measured.
A plan divides by these numbers: 1 GB over 200 GB/s takes 5 ms.
"""

import datetime
import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsmini.config.fields import refuse_unknown, require
from dsmini.planner.figure import Sheet
from dsmini.reading import brief, read_toml

OnPart = Callable[[float, str], None]
"""Progress of a long work: the share that is done, and a short text."""


def quiet(done: float, what: str) -> None:
    """Tell nobody."""


USER = "the command line"
DTYPES = ("float32", "bfloat16", "fp8")
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BYTES = {f"{p}B": size for p, size in PREFIXES.items()} | {f"{p}iB": 1024.0**i for i, p in enumerate("KMGT", 1)}
RATES = {f"{p}B/s": size for p, size in PREFIXES.items()} | {f"{p}b/s": size / 8 for p, size in PREFIXES.items()}
SPEEDS = {f"{p}FLOP/s": size for p, size in PREFIXES.items()}
NUMBERS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "memory": ("gpu_memory", BYTES),
    "memory_bandwidth": ("memory_bandwidth", RATES),
    "gpus_per_node": ("gpus_per_node", {}),
    "multiprocessors": ("multiprocessors", {}),
    "fast_link": ("fast_link", RATES),
    "slow_link": ("slow_link", RATES),
    "fast_link_effective": ("fast_link", RATES),
    "slow_link_effective": ("slow_link", RATES),
    "link_latency": ("link_latency", {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}),
    "price": ("gpu_price", {"$/h": 1 / 3600, "$/s": 1.0}),
    "power": ("gpu_power", {"W": 1.0, "kW": 1e3}),
}
"""Numbers of a file: the figure that each gives, and the units that it may have. Effective links come after nominal."""
NEEDED = ("memory", "memory_bandwidth", "gpus_per_node")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One accelerator of a cluster."""

    name: str
    """Name on the command line, such as "h800"."""
    title: str
    """Name for people, such as "NVIDIA H800 SXM"."""
    numbers: Mapping[str, tuple[float, str]]
    """Value in base units and source of each number, by the name of its figure; without what is not published."""

    @property
    def peaks(self) -> list[str]:
        """Dtypes that the hardware has units for."""
        return [dtype for dtype in DTYPES if f"peak_{dtype}" in self.numbers]

    @property
    def node(self) -> int:
        """Number of accelerators that the fast link connects; 1 without one."""
        return round(self.numbers["gpus_per_node"][0]) if self.linked else 1

    @property
    def linked(self) -> bool:
        """True for hardware with a link inside a node."""
        return "fast_link" in self.numbers

    @property
    def networked(self) -> bool:
        """True for hardware with links inside a node and between nodes."""
        return self.linked and "slow_link" in self.numbers

    def value(self, name: str) -> float:
        """Return a number by the name of its figure."""
        return self.numbers[name][0]

    def put(self, sheet: Sheet) -> None:
        """Put all numbers on a sheet as inputs."""
        for name, (value, source) in self.numbers.items():
            sheet.put(name, value, source)

    def peak(self, sheet: Sheet, dtype: str) -> Any:
        """Return the peak of a dtype on a sheet. Raises: ValueError for a dtype that the hardware has no units for."""
        if dtype not in self.peaks:
            raise ValueError(f"{self.title} has no {dtype} units; use one of {', '.join(self.peaks)}")
        return getattr(sheet, f"peak_{dtype}")

    def at_price(self, dollars_an_hour: float | None) -> "Hardware":
        """Return hardware with another rent, if one is given."""
        if dollars_an_hour is None:
            return self
        return replace(self, numbers={**self.numbers, "gpu_price": (dollars_an_hour / 3600, USER)})


@functools.cache
def _machines() -> dict[str, Any]:
    return read_toml(Path(__file__).parent / "machines.toml")


def known_hardware() -> list[str]:
    """Return the names of the known hardware, without `this`."""
    return sorted(_machines())


def load_hardware(name_or_path: str | Path, on_part: OnPart = quiet) -> Hardware:
    """Return known hardware by name, that of your own TOML file by path, or this machine's, measured, for "this".

    Args:
        on_part: progress of measuring this machine, which takes half a minute the first time; see load_or_measure.

    Raises: ValueError for an unknown name, or naming what is wrong with a file.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "this":
        return this_machine(on_part)
    if name in known_hardware():
        return read(_machines()[name], name, f"[{name}]")
    if path.suffix != ".toml":
        known = ", ".join(known_hardware())
        raise ValueError(
            f"unknown hardware {brief(name)}; use one of {known}, this, or the path of your own .toml file"
        )
    return read(read_toml(path), path.stem, path.name)


def read(raw: dict[str, Any], name: str, file: str) -> Hardware:
    """Return hardware from the tables of a file. Raises: ValueError naming what is wrong."""
    refuse_unknown(raw, ["title", "peaks", *NUMBERS], file, "")
    title, peaks = raw.get("title"), raw.get("peaks")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"{file} has no title; add title = the name of the hardware")
    if not isinstance(peaks, dict) or not peaks:
        raise ValueError(f"{file} has no peaks; add a table [peaks.bfloat16] with value, unit and source")
    refuse_unknown(peaks, list(DTYPES), file, "peaks.")
    for key in NEEDED:
        require(key in raw, f"{file} has no {key}; add a table [{key}]")
    there = [(f"peak_{dtype}", f"peaks.{dtype}", peaks[dtype], SPEEDS) for dtype in DTYPES if dtype in peaks]
    there += [(figure, key, raw[key], units) for key, (figure, units) in NUMBERS.items() if key in raw]
    numbers = {figure: _number(key, table, units, file) for figure, key, table, units in there}
    return Hardware(name=name, title=title, numbers=numbers)


def _number(key: str, table: Any, units: Mapping[str, float], file: str) -> tuple[float, str]:
    """Return the value in base units and the source of a table with value, unit and source."""
    parts = ["value", "unit", "source"] if units else ["value", "source"]
    if not isinstance(table, dict):
        raise ValueError(f"{key} in {file} is {brief(table)}, want a table [{key}] with {', '.join(parts)}")
    refuse_unknown(table, parts, file, f"{key}.")
    value, unit, source = table.get("value"), str(table.get("unit", "")), table.get("source")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{key} in {file} has no source; add source = the text that says where it comes from")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key}.value in {file} is {brief(value)}, want a positive finite number")
    require(bool(units) or value == int(value), f"{key}.value in {file} is {value}, want a whole number")
    require(not units or unit in units, f"{key}.unit in {file} is {brief(unit)}, want {', '.join(units)}")
    scaled = value * units.get(unit, 1)
    beyond = f"{key} in {file} is {value} {unit}, beyond what a float can hold; check its unit"
    require(0 < scaled < math.inf, beyond)
    return (int(scaled) if float(scaled).is_integer() and scaled < 2.0**53 else scaled), source


def this_machine(on_part: OnPart | None = None) -> Hardware:
    """Return this machine: its memory, and its measured rates; without `on_part` 1 in place of each rate.

    That is enough to see what fits. Rates are those of its stored roofs, or are measured now.
    """
    import torch

    from dsmini import machine
    from dsmini.measure.calibration import load_or_measure
    from dsmini.measure.rates import why_unusable

    device = machine.pick_device("auto")
    memory = machine.memory_bytes(device)
    if not memory:
        raise ValueError("the memory of this machine is unknown; write its numbers into a .toml file of your own")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    title, numbers = "", {"gpu_memory": memory, "gpus_per_node": count}
    rates: dict[str, float] = dict.fromkeys(("peak_float32", "peak_bfloat16", "memory_bandwidth"), 1.0)
    if on_part is not None:
        roofs = load_or_measure(device, on_part=on_part)
        usable = [name for name, dtype in machine.DTYPES.items() if why_unusable(dtype, roofs.peak) is None]
        rates = {f"peak_{dtype}": roofs.peak[dtype] for dtype in DTYPES if dtype in usable}
        rates["memory_bandwidth"] = roofs.bandwidth
        title = roofs.card["device" if device.type == "cuda" else "processor"]
    source = f"measured here by dsmini.measure, {datetime.date.today()}"
    return Hardware(name="this", title=title, numbers={key: (x, source) for key, x in {**numbers, **rates}.items()})
