"""Hardware of a plan: what one accelerator can hold and do, and the links to the others.

machines.toml has the known hardware, and says how to write a file of your own. `this` is the machine at hand, measured.
A plan divides by these numbers: 1 GB over 200 GB/s takes 5 ms.
"""

import datetime
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmini.config.fields import build, check_types, refuse_unknown, require, setting
from dsmini.planner.figure import Figure
from dsmini.reading import brief, read_toml
from dsmini.report.units import span

OnPart = Callable[[float, str], None]
"""Progress of a long work: the share that is done, and a short text."""


def quiet(done: float, what: str) -> None:
    """Tell nobody."""


USER = "the command line"
DTYPES = ("float32", "bfloat16", "fp8", "fp4", "int8")
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BYTES = {f"{p}B": size for p, size in PREFIXES.items()} | {f"{p}iB": 1024.0**i for i, p in enumerate("KMGT", 1)}
RATES = {f"{p}B/s": size for p, size in PREFIXES.items()} | {f"{p}b/s": size / 8 for p, size in PREFIXES.items()}
SPEEDS = {f"{p}FLOP/s": size for p, size in PREFIXES.items()}
COUNT = {"": 1.0}
PEAK = "Dense peak of {} products of an accelerator"
NUMBERS: Mapping[str, tuple[str, str, Mapping[str, float]]] = {
    **{f"peaks.{dtype}": (f"peak_{dtype}", PEAK.format(dtype), SPEEDS) for dtype in DTYPES},
    "memory": ("gpu_memory", "Memory of an accelerator", BYTES),
    "memory_bandwidth": ("memory_bandwidth", "Bandwidth of an accelerator's memory", RATES),
    "gpus_per_node": ("gpus_per_node", "Accelerators that the fast link connects", COUNT),
    "fast_link": ("fast_link", "Peak rate to others of the node, one direction", RATES),
    "slow_link": ("slow_link", "Peak rate to other nodes, one direction", RATES),
    "price": ("gpu_price", "Rent of an accelerator, the low end", {"$/s": 1.0, "$/h": 1 / 3600}),
    "price.most": ("gpu_price_most", "Rent of an accelerator, the high end", {"$/s": 1.0, "$/h": 1 / 3600}),
}
"""Numbers of a file: the figure that each gives, its title, and the units that it may have, the base unit first."""
FIGURES = {name: (title, next(iter(units))) for name, title, units in NUMBERS.values()}
"""Title and base unit of each figure."""


NO_LINK = Figure("no_link", 0, "B/s", "Rate of a link that there is not", "the hardware")


class Hardware:
    """One accelerator of a cluster."""

    def __init__(self, name: str, title: str, numbers: Mapping[str, Figure]) -> None:
        """Take the numbers.

        Args:
            name: on the command line, such as "h800".
            title: for people, such as "NVIDIA H800 SXM".
            numbers: by the name of their figure, in base units, with their sources; without what is not published.
        """
        self.name: str = name
        self.title: str = title
        self.numbers: Mapping[str, Figure] = numbers
        self.memory: Figure = numbers["gpu_memory"]
        self.memory_bandwidth: Figure = numbers["memory_bandwidth"]
        self.peaks: list[str] = [dtype for dtype in DTYPES if f"peak_{dtype}" in numbers]
        """Dtypes that the hardware has units for."""
        self.linked: bool = "fast_link" in numbers
        """There is a link inside a node; else all plans are of one accelerator."""
        self.networked: bool = self.linked and "slow_link" in numbers
        """There are links between nodes too; else all plans are of one node."""
        self.fast_link: Figure = numbers.get("fast_link", NO_LINK)
        self.slow_link: Figure = numbers.get("slow_link", NO_LINK)
        self.gpus_per_node: int = round(numbers["gpus_per_node"])
        self.node: int = self.gpus_per_node if self.linked else 1
        """Number of accelerators that the fast link connects."""
        self.most_gpus: float = math.inf if self.networked else self.node
        """Number of accelerators that the links connect."""
        self.price: Figure | None = numbers.get("gpu_price")
        """Least dollars a second of an accelerator; None where nobody published one."""
        self.price_most: Figure | None = numbers.get("gpu_price_most", self.price)

    @property
    def rent(self) -> str:
        """Rent of an accelerator with its source and date, in words; "" where nobody published one."""
        low, high = self.price, self.price_most
        if low is None or high is None:
            return ""
        return f"{span(3600 * low, 3600 * high, '$')} an hour ({low.source})"

    def check_links(self, gpus: int) -> None:
        """Raise ValueError for more accelerators than the links connect."""
        if gpus > self.most_gpus:
            most = f"{self.node} or fewer" if self.linked else f"{self.node}"
            raise ValueError(f"{self.title} has no link that gpus={gpus} need; use {most}")

    def peak(self, dtype: str) -> Figure:
        """Return the peak of a dtype. Raises: ValueError for a dtype that the hardware has no units for."""
        if dtype not in self.peaks:
            raise ValueError(f"{self.title} has no {dtype} units; use a precision that it has: {', '.join(self.peaks)}")
        return self.numbers[f"peak_{dtype}"]

    def rate(self, *dtypes: str) -> Figure:
        """Return the peak of the first of some dtypes that there are units for. Raises: ValueError, as peak."""
        return self.peak(next((dtype for dtype in dtypes if dtype in self.peaks), dtypes[0]))

    def having(self, source: str, numbers: Mapping[str, Any]) -> "Hardware":
        """Return hardware with other numbers in base units, also such as it lacks.

        Raises: ValueError for what no file may have.
        """
        found = dict(self.numbers)
        if "gpu_price" in numbers:
            numbers = {"gpu_price_most": numbers["gpu_price"], **numbers}
        for figure, title, units in NUMBERS.values():
            if figure in numbers:
                table = {"value": numbers[figure], "unit": next(iter(units)), "source": source}
                found[figure] = _number(table, (figure, title, units), f"{figure} of {source}", "")
        return Hardware(self.name, self.title, found)


@functools.cache
def _machines() -> dict[str, Any]:
    return read_toml(Path(__file__).parent / "machines.toml")


def known_hardware() -> list[str]:
    """Return the names of the known hardware, without `this`."""
    return sorted(_machines())


def load_hardware(name_or_path: str | Path, on_part: OnPart = quiet, fresh: bool = False) -> Hardware:
    """Return known hardware by name, that of your own TOML file by path, or this machine's, measured, for "this".

    Args:
        on_part: progress of measuring this machine, which takes a few seconds the first time; see load_or_measure.
        fresh: measure this machine again.

    Raises: ValueError for an unknown name, or naming what is wrong with a file.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "this":
        return this_machine(on_part, fresh)
    if name in known_hardware():
        return read(_machines()[name], name, f"[{name}]")
    if path.suffix != ".toml":
        known = f"{', '.join(known_hardware())}, this, or the path of your own .toml file"
        raise ValueError(f"unknown hardware {brief(name)}; use one of {known}")
    return read(read_toml(path), path.stem, path.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """Number of a hardware file."""

    value: float = setting(0.0, above=0, most=1e290)
    unit: str = ""
    source: str = ""
    date: str = ""
    """Month of a price."""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.source.strip()), "it has no source; add source = the text that says where it comes from")


def read(raw: dict[str, Any], name: str, file: str) -> Hardware:
    """Return hardware from the tables of a file. Raises: ValueError naming what is wrong."""
    title, peaks = raw.get("title"), raw.get("peaks", {})
    refuse_unknown(raw, ["title", "peaks", *(key for key in NUMBERS if "." not in key)], file, "")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"{file} has no title; add title = the name of the hardware")
    for key in ("peaks", "memory", "memory_bandwidth", "gpus_per_node"):
        require(isinstance(raw.get(key), dict) and bool(raw[key]), f"{file} has no {key}; add a table [{key}]")
    refuse_unknown(peaks, list(DTYPES), file, "peaks.")
    there = raw | {f"peaks.{dtype}": table for dtype, table in peaks.items()}
    if isinstance(price := there.get("price"), dict):
        one = {key: value for key, value in price.items() if key != "most"}
        there |= {"price": one, "price.most": {**one, "value": price.get("most", price.get("value"))}}
    kinds = {key: kind for key, kind in NUMBERS.items() if key in there}
    numbers = {kind[0]: _number(there[key], kind, file, f"{key}.") for key, kind in kinds.items()}
    low, high = (numbers.get(name, 0) for name in ("gpu_price", "gpu_price_most"))
    require(low <= high, f"price.most in {file} is less than its value; swap the two ends of the range")
    return Hardware(name, title, numbers)


def _number(table: Any, kind: tuple[str, str, Mapping[str, float]], file: str, key: str) -> Figure:
    """Return a number of a file in base units. Raises: ValueError naming what is wrong."""
    number, (name, title, units) = build(Number, table, f"[{key[:-1]}] of {file}" if key else file, key), kind
    want = ", ".join(filter(None, units)) or "none"
    require(number.unit in units, f"{key}unit in {file} is {brief(number.unit)}, want {want}")
    scaled = number.value * units[number.unit]
    require(scaled.is_integer() or units is not COUNT, f"{key}value in {file} is {number.value}, want a whole number")
    return Figure(name, scaled, next(iter(units)), title, ", ".join(filter(None, (number.source, number.date))))


def this_machine(on_part: OnPart, fresh: bool) -> Hardware:
    """Return this machine: its memory, and its rates, which are stored or measured now."""
    import torch

    from dsmini import machine
    from dsmini.measure.roofs import load_or_measure, why_unusable

    device = machine.pick_device("auto")
    memory = machine.memory_bytes(device)
    if not memory:
        raise ValueError("the memory of this machine is unknown; write its numbers into a .toml file of your own")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    roofs = load_or_measure(device, on_part=on_part, fresh=fresh)
    usable = [name for name, dtype in machine.DTYPES.items() if why_unusable(dtype, roofs.peak) is None]
    numbers: dict[str, float] = {f"peak_{dtype}": roofs.peak[dtype] for dtype in DTYPES if dtype in usable}
    numbers |= {"memory_bandwidth": roofs.bandwidth, "gpu_memory": memory, "gpus_per_node": count}
    source = f"measured here by dsmini.measure, {datetime.date.today()}"
    title = roofs.card["device" if device.type == "cuda" else "processor"]
    return Hardware("this", title, {n: Figure(n, x, FIGURES[n][1], FIGURES[n][0], source) for n, x in numbers.items()})
