"""Machines: the numbers of their files, each with its source and in use, and the machine at hand."""

import re

import pytest
import torch

from dsmini.planner.hardware import load_hardware
from dsmini.planner.pages import plan_page
from tests.helpers.commands import let_prices_be_invented
from tests.helpers.plans import INVENTED, plan_of
from tests.helpers.questions import invented_roofs


def test_numbers_of_an_own_file_are_in_base_units() -> None:
    wanted = {"gpu_memory": 96 * 2**30, "memory_bandwidth": 2e12, "gpus_per_node": 8, "fast_link": 100e9}
    wanted |= {"slow_link": 25e9, "gpu_price": 3 / 3600, "gpu_price_most": 3 / 3600}
    wanted |= {"peak_float32": 50e12, "peak_bfloat16": 500e12, "peak_fp8": 1e15}
    assert {name: float(value) for name, value in load_hardware(INVENTED).numbers.items()} == pytest.approx(wanted)


def test_prices_are_ranges_with_a_month() -> None:
    h200 = load_hardware("h200")
    assert h200.price is not None and h200.price_most is not None
    assert (h200.price * 3600, h200.price_most * 3600) == pytest.approx((2.5, 7)) and "2026-06" in h200.price.source
    own = h200.having("a test", {"gpu_price": 1 / 3600})
    assert own.price == own.price_most == pytest.approx(1 / 3600)


# --- the machine at hand


@pytest.mark.parametrize(("bfloat16", "peaks"), [(300e9, ["float32", "bfloat16"]), (0.3e9, ["float32"])])
def test_this_is_the_measured_machine(monkeypatch: pytest.MonkeyPatch, bfloat16: float, peaks: list[str]) -> None:
    """It has no peak of a dtype that it multiplies too slowly."""
    roofs = invented_roofs(peak={"float32": 170e9, "bfloat16": bfloat16}, bandwidth=20e9, copy=15e9)
    asked: list[bool] = []
    measured = lambda device, fresh, **_: (asked.append(fresh), roofs)[1]  # noqa: E731
    monkeypatch.setattr("dsmini.measure.roofs.load_or_measure", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    this = load_hardware("this", fresh=True)
    assert asked == [True], "not what was stored"
    assert (this.name, this.title, this.peaks, this.linked) == ("this", "A processor", peaks, False)
    values = {name: float(value) for name, value in this.numbers.items()}
    assert values.pop("gpu_memory") > 1e8
    of_peaks = {f"peak_{dtype}": roofs.peak[dtype] for dtype in peaks}
    assert values == of_peaks | {"memory_bandwidth": 20e9, "gpus_per_node": 1}
    (source,) = {value.source for value in this.numbers.values()}
    assert re.fullmatch(r"measured here by dsmini\.measure, \d{4}-\d\d-\d\d", source)
    if "bfloat16" not in peaks:
        with pytest.raises(ValueError, match="A processor has no bfloat16 units; use a precision that it has: float32"):
            this.peak("bfloat16")


def test_page_of_this_machine_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.machine.memory_bytes", lambda device: 16 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    let_prices_be_invented(monkeypatch)
    assert "measured on this machine" in plan_page(plan_of("toy @this n_layers=2 n_mtp_layers=0"), "", []).lead
