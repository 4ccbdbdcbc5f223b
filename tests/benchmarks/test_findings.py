"""Other figures of questions, as by hand, and the words of comparisons."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import question
from benchmarks.question import check_bandwidth, compared, drawing, figure, race, times
from benchmarks.questions import kernels, plan, sparse, steps
from dsmini.measure.counting import count
from tests.conftest import Clock
from tests.helpers.questions import setting

# --- comparisons in words


def ratio(middle: float, spread: float = 0.0, turns: int = 6, **case: Any) -> question.Figure:
    """Return how many times as long MHA takes as MLA, over turns that differ by this share."""
    values = [middle * (1 + spread * (2 * i / (turns - 1) - 1)) for i in range(turns)]
    return figure("times_as_long", {"attention": "MHA", "than": "MLA", **case}, values)


def test_ratios_are_told_with_their_interval() -> None:
    assert times(ratio(1.62, 0.02)) == "1.62 times (1.59 to 1.65)"
    assert times(ratio(1.1, 0.2)) == "1.10 times (0.88 to 1.32, unclear)"
    assert times(ratio(12.34, 0.0, turns=5)) == "12.3 times", "five turns have no interval"


def test_comparison_tells_both_ends() -> None:
    figures = [ratio(x / 100, context=x) for x in (400, 100, 200)]
    assert compared(figures, "context", "at context {}", key="attention") == (
        "MHA 1.00 times (1.00 to 1.00, unclear) at context 100 and 4.00 times (4.00 to 4.00) at context 400"
    )
    assert compared(figures[:1], key="attention") == "MHA 4.00 times (4.00 to 4.00)"


def test_race_compares_turn_by_turn(clock: Clock) -> None:
    """A slow turn slows both sides, and leaves the ratio as it is."""
    runs = {"a": clock.work("a", 1, 1, 10, 1, 1, 1, 1), "b": clock.work("b", 2, 2, 20, 2, 2, 2, 2)}
    found = list(race(setting(), {"n": 1}, runs, predicted={"a": 3.0, "b": 9.0}, each=2, count=6, seconds=99, least=6))
    assert [(f.metric, f.measured, f.predicted) for f in found] == [
        ("seconds", 0.5, 1.5),
        ("seconds", 1.0, 4.5),
        ("times_as_long", 2.0, 3.0),
    ]
    assert found[2].low == found[2].high == 2 and found[2].case == {"n": 1, "model": "b", "than": "a"}


def test_drawing_has_a_line_for_each_value_or_a_place_for_each_label() -> None:
    """Check lines over a number, in its order and with their predictions, and one group over labels."""
    given = [("MLA", 400, 2.0), ("MLA", 100, 1.0), ("MHA", 100, 3.0)]
    figures = [figure("seconds", {"context": n, "model": m}, value, predicted=9.0) for m, n, value in given]
    (over_numbers,) = drawing("seconds", "Time", x="context", by="model")(figures)
    assert [(s.label, s.x, s.y, s.of) for s in over_numbers.series] == [
        ("MLA", [100.0, 400.0], [1.0, 2.0], ""),
        ("MLA, predicted", [100.0, 400.0], [9.0, 9.0], "MLA"),
        ("MHA", [100.0], [3.0], ""),
        ("MHA, predicted", [100.0], [9.0], "MHA"),
    ]
    (over_labels,) = drawing("seconds", "Time", "{model}", by="context", kind="bars")(figures)
    assert over_labels.labels == ["MLA", "MHA"]
    assert [(s.label, s.x, s.y) for s in over_labels.series] == [("400", [0.0], [2.0]), ("100", [0.0, 1.0], [1.0, 3.0])]


def test_sparse_attention_pays_between_two_cases() -> None:
    gains = [figure("times_as_long", {"context": n}, gain, predicted=1.1) for n, gain in ((1000, 0.5), (4000, 2.0))]
    assert sparse.break_even(gains, "context", "measured") == "2,000 tokens"
    assert sparse.break_even(gains, "context", "predicted") == "every length"
    assert sparse.break_even(gains[:1], "context", "measured") == "no length"


def test_plan_says_how_far_its_forecasts_were() -> None:
    found = [figure("seconds", {"step": str(i)}, 1.0, predicted=p) for i, p in enumerate((1.1, 0.9, 1.29))]
    assert plan.answer(found) == "3 steps, forecast before they ran: error of the time 10% in the median, 29% at worst."
    memory = {"process_memory": 112.0, "tensor_memory": 101.0}
    found += [figure(metric, {}, 100.0, predicted=predicted) for metric, predicted in memory.items()]
    assert plan.answer(found).endswith("; of a process's peak memory at most 12%; of the tensors' at most 1.0%.")


# --- bandwidth above the roof

ROOF = {"bandwidth": 10e9, "copy": 8e9}
# bytes a second, a reading of the memory now, and the roof that is allowed, if any
ALLOWED: list[tuple[float, float, float | None]] = [
    (9.9e9, 0, 10e9),
    (12.4e9, 10e9, 10e9),  # a kernel may read faster than a sum
    (12.4e9, 9e9, 10e9),
    (12.6e9, 10e9, None),
    (19e9, 20e9, 20e9),  # the stored roof was measured on a busy machine
]


@pytest.mark.parametrize(("reached", "reading", "roof"), ALLOWED)
def test_a_bandwidth_far_above_the_roof_is_an_error(
    monkeypatch: pytest.MonkeyPatch, reached: float, reading: float, roof: float | None
) -> None:
    monkeypatch.setattr(question, "read_bandwidth", lambda device: reading)
    if roof is not None:
        assert check_bandwidth("x", reached, setting(**ROOF)) == roof
        return
    with pytest.raises(ValueError, match=r"x: 12.6 GB/s from memory is above the roof of 10.0: .* --fresh"):
        check_bandwidth("x", reached, setting(**ROOF))


def test_figures_of_a_step_are_over_its_bytes_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "read_bandwidth", lambda device: 9e9)
    counted, here = count(lambda: torch.rand(1 << 16) * 2, 1 << 10), setting(**ROOF)
    moved = sum(op.cold for op in counted.operations)
    found = list(steps.step_figures({}, counted, [moved / 9e9] * 5, 0.5, here, 2, counted.bytes / 2, 50.0, 8.0))
    figures = {f.metric: f for f in found}
    assert figures["bandwidth"].measured == pytest.approx(9e9) and figures["bandwidth"].bound
    assert (
        figures["tokens_per_s"].measured == pytest.approx(2 / (moved / 9e9)) and figures["tokens_per_s"].predicted == 4
    )
    assert figures["flops_per_token"].predicted == 50 and figures["bytes_per_token"].predicted == 8
    with pytest.raises(ValueError, match="above the roof"):
        list(steps.step_figures({}, counted, [moved / 13e9] * 5, None, here, 2, 1.0, 50.0, 8.0))


@pytest.mark.parametrize(
    ("moved", "flops", "dtype", "seconds"),
    [
        (2e10, 0, "float32", 1.0),
        (1e10, 1e11, "float32", 1.0),
        (1e10, 1e11, "bfloat16", 0.5),
        (2.6e10, 0, "float32", "kernel x: 26.0 GB/s from memory is above the roof of 20.0"),
    ],
)
def test_roof_of_a_kernel_is_the_slower_of_memory_and_arithmetic(
    monkeypatch: pytest.MonkeyPatch, moved: float, flops: float, dtype: str, seconds: float | str
) -> None:
    """Expect 20 GB/s and 100 GFLOP/s in FP32, 300 in BF16, of the invented machine, for a call of a second."""
    monkeypatch.setattr(question, "read_bandwidth", lambda device: 2e10)
    calls: Any = [SimpleNamespace(kind="x", cold=moved / 2, flops=flops / 2)] * 2
    if isinstance(seconds, str):
        with pytest.raises(ValueError, match=seconds):
            kernels.roof_seconds(calls, 1.0, dtype, setting())
    else:
        assert kernels.roof_seconds(calls, 1.0, dtype, setting()) == seconds
