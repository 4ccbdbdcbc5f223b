"""Hardware files: the numbers as printed, each with its source and in use, and refusals of everything else."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini.measure import calibration
from dsmini.measure.rates import Roofs
from dsmini.planner.hardware import MACHINES, Hardware, known_hardware, load_hardware
from dsmini.planner.quantities.quantity import Quantity

FULL = """
title = "My machine"
[peaks.float32]
value = 1.5
unit = "TFLOP/s"
source = "my data sheet"
[peaks.bfloat16]
value = 30
unit = "TFLOP/s"
source = "my data sheet"
[memory]
value = 24
unit = "GiB"
source = "my data sheet"
[memory_bandwidth]
value = 900
unit = "GB/s"
source = "my data sheet"
[gpus_per_node]
value = 2
source = "I counted"
[slow_link]
value = 100
unit = "Gb/s"
source = "the cable"
[link_latency]
value = 20
unit = "us"
source = "ping"
[price]
value = 0.36
unit = "$/h"
source = "the bill"
[power]
value = 0.35
unit = "kW"
source = "the meter"
"""


def numbers(hardware: Hardware) -> dict[str, Quantity[Any, Any]]:
    """Return the quantities of hardware by name."""
    fields = [getattr(hardware, field.name) for field in dataclasses.fields(hardware)]
    return {q.name: q for q in (*hardware.peaks.values(), *fields) if isinstance(q, Quantity)}


def test_known_hardware_is_listed() -> None:
    names = ["a100-pcie", "ascend-910c", "b200", "gb200-nvl72", "h100", "h200", "h800", "laptop"]
    assert known_hardware() == names
    assert [load_hardware(name).name for name in names] == names


@pytest.mark.parametrize("name", known_hardware())
def test_every_number_is_an_input_with_its_source(name: str) -> None:
    found = numbers(load_hardware(name))
    assert len(found) >= 4
    for key, quantity in found.items():
        assert (quantity.op, quantity.name) == ("input", key)
        assert quantity.title and len(quantity.source) > 10 and quantity.value > 0


def leaves(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        elif not isinstance(value, str):
            yield path + key, value


@pytest.mark.parametrize("name", known_hardware())
def test_every_number_of_a_file_changes_a_quantity(name: str, tmp_path: Path) -> None:
    text = (MACHINES / f"{name}.toml").read_text()
    before = {key: q.value for key, q in numbers(load_hardware(name)).items()}
    places = list(leaves(tomllib.loads(text)))
    assert len(places) == len(re.findall(r"(?m)^value =", text)) == len(before)
    changed = set()
    for i, found in enumerate(re.finditer(r"(?m)^value = (\S+)$", text)):
        path = tmp_path / f"{i}.toml"
        path.write_text(f"{text[: found.start(1)]}{2 * float(found[1])}{text[found.end(1) :]}")
        after = {key: q.value for key, q in numbers(load_hardware(path)).items()}
        differs = {key for key in before if after[key] != before[key]}
        assert len(differs) == 1 and all(after[key] == 2 * before[key] for key in differs), found[0]
        changed |= differs
    assert changed == before.keys()


# --- as printed


def test_links_of_the_h800_are_those_of_the_insights_paper() -> None:
    """Section 4.3: NVLink provides 200 GB/s, of which about 160 are reached, and InfiniBand 50, of which 40 count."""
    h800 = load_hardware("h800")
    links = (h800.fast_link, h800.fast_link_effective, h800.slow_link, h800.slow_link_effective)
    assert [link and link.value for link in links] == [200e9, 160e9, 50e9, 40e9]
    assert [link and link.units for link in links] == ["B/s"] * 4


def test_h800_has_four_ninths_of_the_nvlink_of_an_h100() -> None:
    h800, h100 = load_hardware("h800").fast_link, load_hardware("h100").fast_link
    assert h800 and h100 and (h800 / h100).value == pytest.approx(4 / 9)


def test_peak_of_the_h800_is_the_one_of_the_printed_mfu() -> None:
    """Insights, table 4: 385 and 432 TFLOP/s are 38.94 and 43.73 % of the BF16 peak."""
    peak = load_hardware("h800").peak("bfloat16").value
    assert 385e12 / peak == pytest.approx(0.3894, rel=0.005)
    assert 432e12 / peak == pytest.approx(0.4373, rel=0.005)


def test_price_of_the_h800_is_the_one_of_the_v3_report() -> None:
    price = load_hardware("h800").price
    assert price and (price * 3600).value == pytest.approx(2)


def test_power_of_an_a100_node_is_that_of_fire_flyer() -> None:
    a100 = load_hardware("a100-pcie")
    assert a100.power and (a100.power * a100.gpus_per_node).value == 2500


@pytest.mark.parametrize("name", ["h800", "h100", "h200", "b200", "gb200-nvl72"])
def test_fp8_has_twice_the_peak_of_bf16_and_neither_is_sparse(name: str) -> None:
    """A sparse peak next to a dense one would be four times as large."""
    hardware = load_hardware(name)
    assert (hardware.peak("fp8") / hardware.peak("bfloat16")).value == pytest.approx(2, rel=1e-3)
    intensity = (hardware.peak("bfloat16") / hardware.memory_bandwidth).value
    assert 200 < intensity < 320, "FLOP a byte; a sparse peak would be above 400"


def test_units_are_scaled_to_base_units(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(FULL)
    mine = load_hardware(tmp_path / "mine.toml")
    assert (mine.name, mine.title) == ("mine", "My machine")
    assert {name: q.value for name, q in numbers(mine).items()} == pytest.approx(
        {
            "peak_float32": 1.5e12,
            "peak_bfloat16": 30e12,
            "gpu_memory": 24 * 1024**3,
            "memory_bandwidth": 900e9,
            "gpus_per_node": 2,
            "slow_link": 12.5e9,
            "link_latency": 20e-6,
            "gpu_price": 1e-4,
            "gpu_power": 350,
        }
    )
    assert (mine.fast_link, mine.fast_link_effective, mine.slow_link_effective) == (None, None, None)
    assert isinstance(mine.gpus_per_node.value, int)
    assert load_hardware(str(tmp_path / "mine.toml")).memory.value == mine.memory.value


def test_a_dtype_without_units_is_refused() -> None:
    with pytest.raises(ValueError, match="NVIDIA A100 PCIe 40 GB has no fp8 units; use one of float32, bfloat16"):
        load_hardware("a100-pcie").peak("fp8")


# --- refusals

CHANGES: list[tuple[str, str, str]] = [
    ("title = ", "titel = ", r"unknown key 'titel' in mine\.toml; did you mean 'title'\?"),
    ("[memory]", "[memry]", r"unknown key 'memry' in mine\.toml; did you mean 'memory'\?"),
    (
        "[peaks.float32]",
        "[peaks.float64]",
        r"unknown key 'peaks\.float64' in mine\.toml; did you mean 'peaks\.bfloat16'\?",
    ),
    ("value = 24\n", "valu = 24\n", r"unknown key 'memory\.valu' in mine\.toml; did you mean 'memory\.value'\?"),
    ('source = "I counted"', 'unit = "GPU"\nsource = "I counted"', r"unknown key 'gpus_per_node\.unit' in mine\.toml"),
    ('"My machine"', '" "', r"mine\.toml has no title; add title"),
    ('"My machine"', "3", r"mine\.toml has no title; add title"),
    ("value = 24\n", 'value = "24"\n', r"memory\.value in mine\.toml is '24', want a positive finite number"),
    ("value = 24\n", "value = true\n", r"memory\.value in mine\.toml is True, want a positive finite number"),
    ("value = 24\n", "value = 0\n", r"memory\.value in mine\.toml is 0, want a positive finite number"),
    ("value = 24\n", "value = -24\n", r"memory\.value in mine\.toml is -24, want a positive finite number"),
    ("value = 24\n", "value = nan\n", r"memory\.value in mine\.toml is nan, want a positive finite number"),
    ("value = 24\n", "value = inf\n", r"memory\.value in mine\.toml is inf, want a positive finite number"),
    ("value = 24\n", f"value = {2**1024 - 1}\n", r"memory\.value in mine\.toml is 1797.*want a positive finite number"),
    ("value = 24\n", "", r"memory\.value in mine\.toml is None, want a positive finite number"),
    ("value = 24\n", "value = 1e305\n", r"memory in mine\.toml is 1e\+305 GiB, beyond what a float can hold"),
    ("value = 2\n", "value = 2.5\n", r"gpus_per_node\.value in mine\.toml is 2\.5, want a whole number"),
    ('unit = "GiB"', 'unit = "GB/s"', r"memory\.unit in mine\.toml is 'GB/s', want B, kB, MB, GB"),
    ('unit = "GiB"\n', "", r"memory\.unit in mine\.toml is '', want B, kB, MB, GB"),
    ('unit = "GiB"', "unit = 3", r"memory\.unit in mine\.toml is '3', want B, kB, MB, GB"),
    ('unit = "Gb/s"', 'unit = "Gbit"', r"slow_link\.unit in mine\.toml is 'Gbit', want B/s, kB/s, .*Gb/s"),
    ('source = "I counted"', "", r"gpus_per_node in mine\.toml has no source; add source"),
    ('source = "ping"', 'source = ""', r"link_latency in mine\.toml has no source; add source"),
    ('source = "ping"', "source = 7", r"link_latency in mine\.toml has no source; add source"),
    ("title", "= title", r"cannot read .*mine\.toml: "),
]


@pytest.mark.parametrize(("old", "new", "words"), CHANGES)
def test_a_wrong_file_is_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in FULL
    (tmp_path / "mine.toml").write_text(FULL.replace(old, new, 1))
    with pytest.raises(ValueError, match=words) as error:
        load_hardware(tmp_path / "mine.toml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["peaks", "memory", "memory_bandwidth", "gpus_per_node"])
def test_a_file_without_a_needed_number_is_refused(key: str, tmp_path: Path) -> None:
    tables = re.split(r"(?m)^(?=\[)", FULL)
    (tmp_path / "mine.toml").write_text("".join(t for t in tables if not re.match(rf"\[{key}[.\]]", t)))
    with pytest.raises(ValueError, match=rf"mine\.toml has no {key}; add a table \[{key}"):
        load_hardware(tmp_path / "mine.toml")


def test_a_number_in_place_of_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("power = 300\n" + FULL.partition("[power]")[0])
    with pytest.raises(
        ValueError, match=r"power in mine\.toml is 300, want a table \[power\] with value, unit, source"
    ):
        load_hardware(tmp_path / "mine.toml")


def test_unknown_hardware_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown hardware 'h900'; use one of a100-pcie, .*, laptop, this, or the path"
    ):
        load_hardware("h900")
    with pytest.raises(ValueError, match=r"unknown hardware '\.\./h800'"):
        load_hardware("../h800")
    with pytest.raises(ValueError, match=r"there is no file .*none\.toml"):
        load_hardware(tmp_path / "none.toml")


# --- this machine


def measured(monkeypatch: pytest.MonkeyPatch, **peak: float) -> Hardware:
    """Return `this` of a machine with these measured peaks."""
    roofs = Roofs(
        card={"processor": "A processor", "device": "cpu"},
        peak=peak,
        bandwidth=20e9,
        copy=15e9,
        call=2e-6,
        cache_bytes=1 << 25,
        probes={},
        curves={},
    )
    monkeypatch.setattr(calibration, "load_or_measure", lambda device, **_: roofs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return load_hardware("this")


def test_this_is_the_measured_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    this = measured(monkeypatch, float32=170e9, bfloat16=300e9)
    assert (this.name, this.title) == ("this", "A processor")
    assert {dtype: q.value for dtype, q in this.peaks.items()} == {"float32": 170e9, "bfloat16": 300e9}
    assert this.memory_bandwidth.value == 20e9
    assert this.memory.value > 1e9 and this.gpus_per_node.value == 1
    assert (this.fast_link, this.slow_link, this.price) == (None, None, None)
    sources = {q.source for q in numbers(this).values()}
    assert len(sources) == 1 and re.fullmatch(r"measured here by dsmini\.measure, \d{4}-\d\d-\d\d", sources.pop())


def test_this_has_no_peak_of_an_unusable_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    this = measured(monkeypatch, float32=170e9, bfloat16=0.3e9)
    assert list(this.peaks) == ["float32"]
    with pytest.raises(ValueError, match="A processor has no bfloat16 units; use one of float32"):
        this.peak("bfloat16")


def test_known_hardware_is_loaded_without_torch() -> None:
    code = "import sys; from dsmini.planner.hardware import load_hardware; load_hardware('h800')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
