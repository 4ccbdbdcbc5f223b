"""Other figures of questions, as by hand, and the words of comparisons."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import models, question
from benchmarks.question import check_bandwidth, compared, drawing, figure, race, times
from benchmarks.questions import kernels, pipeline, sparse, steps
from benchmarks.questions.fp8 import Gemm, errors_of, operand_error, product_error, record
from benchmarks.questions.pipeline import RANKS, Passes, Size, bubble_share, formula
from dsmini import Transformer
from dsmini.config.run import CHUNKS
from dsmini.measure.counting import Count, count
from dsmini.nn.fp8 import fp8_weights
from dsmini.numerics import E4M3, E5M2, round_tiles
from dsmini.report import pick
from tests.conftest import Clock, randomise
from tests.helpers.questions import TINY, setting
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

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
    told = compared(figures, "context", "at context {}", key="attention")
    assert told.startswith("MHA 1.00 times (1.00 to 1.00, unclear) at context 100 and 4.00 times")
    assert compared(figures[:1], key="attention") == "MHA 4.00 times (4.00 to 4.00)"


def test_race_compares_turn_by_turn(clock: Clock) -> None:
    """A slow turn slows both sides, and leaves the ratio as it is."""
    runs = {"a": clock.work("a", 1, 1, 10, 1, 1, 1, 1), "b": clock.work("b", 2, 2, 20, 2, 2, 2, 2)}
    found = list(race(setting(), {"n": 1}, runs, predicted={"a": 3.0, "b": 9.0}, each=2, count=6, seconds=99, least=6))
    assert [(f.measured, f.predicted) for f in found] == [(0.5, 1.5), (1.0, 4.5), (2.0, 3.0)]
    assert found[2].low == found[2].high == 2 and found[2].case == {"n": 1, "model": "b", "than": "a"}


def test_drawing_has_a_line_for_each_value_or_a_place_for_each_label() -> None:
    """Check lines over a number, in its order and with their predictions, and one group over labels."""
    given = [("MLA", 400, 2.0), ("MLA", 100, 1.0), ("MHA", 100, 3.0)]
    figures = [figure("seconds", {"context": n, "model": m}, value, predicted=9.0) for m, n, value in given]
    (over_numbers,) = drawing("seconds", "Time", x="context", by="model")(figures)
    assert [series.label for series in over_numbers.series] == ["MLA", "MLA, predicted", "MHA", "MHA, predicted"]
    mla, predicted, *_ = over_numbers.series
    assert (mla.x, mla.y, predicted.y, predicted.of) == ([100.0, 400.0], [1.0, 2.0], [9.0, 9.0], "MLA")
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
    said = "3 steps, forecast before they ran: error of the time 10% in the median, 29% at worst."
    assert steps.forecast_answer(found) == said
    found.append(figure("tensor_memory", {}, 100.0, predicted=101.0))
    assert steps.forecast_answer(found).endswith("; of the memory of tensors at most 1.0%.")


# --- bandwidth above the roof

ROOF = {"bandwidth": 10e9, "copy": 8e9}
# bytes a second, a reading of the memory now, and the roof that is allowed, if any
ALLOWED: list[tuple[float, float, float | None]] = [
    (9.9e9, 0, 10e9),
    (12.4e9, 10e9, 10e9),  # a kernel may read faster than a sum
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
    """Read two prompts of eight tokens at a given rate of memory."""
    counted: list[Count] = []
    monkeypatch.setattr(question, "read_bandwidth", lambda device: 9e9)
    monkeypatch.setattr(models, "QUICK", TINY)
    monkeypatch.setattr(question.Setting, "predicted", lambda *_: {"step": 0.5})
    monkeypatch.setattr(steps, "count", lambda *args: (counted.append(count(*args)), counted[-1])[1])

    def measured_at(rate: float) -> dict[str, question.Figure]:
        def seconds() -> list[float]:
            return [sum(op.cold for op in counted[-1].operations) / rate] * 5

        monkeypatch.setattr(steps, "in_turns", lambda *_, **__: SimpleNamespace(seconds={"step": seconds()}))
        return {f.metric: f for f in steps.measure("prefill", setting(**ROOF, cache_bytes=1 << 10), 2, 8)}

    figures = measured_at(9e9)
    assert figures["bandwidth"].measured == pytest.approx(9e9) and figures["bandwidth"].bound
    moved = sum(op.cold for op in counted[-1].operations)
    rate = figures["tokens_per_s"]
    assert rate.measured == pytest.approx(16 / (moved / 9e9)) and rate.predicted == 32
    for metric, total in (("bytes_per_token", counted[-1].bytes), ("flops_per_token", counted[-1].flops)):
        least = figures[metric].predicted
        assert figures[metric].measured == pytest.approx(total / 16) and least and least <= total / 16
    with pytest.raises(ValueError, match="above the roof"):
        measured_at(13e9)


@pytest.mark.parametrize(
    ("moved", "flops", "dtype", "seconds"),
    [(2e10, 0, "float32", 1.0), (1e10, 1e11, "float32", 1.0), (1e10, 1e11, "bfloat16", 0.5)],
)
def test_roof_of_a_kernel_is_the_slower_of_memory_and_arithmetic(
    moved: float, flops: float, dtype: str, seconds: float
) -> None:
    """Expect 20 GB/s and 100 GFLOP/s in FP32, 300 in BF16, of the invented machine, for a call of a second."""
    calls: Any = [SimpleNamespace(kind="x", cold=moved / 2, flops=flops / 2)] * 2
    assert kernels.roof_seconds(calls, 1.0, dtype, setting()) == seconds


# --- FP8: errors of the products of a step


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_expected_error_is_that_of_rounding(format: Any) -> None:
    x = torch.randn(1024, 256) * torch.rand(1024, 1).mul(4).exp()  # fractions spread over many powers of two
    rounded = round_tiles(x, (1, 128), "ue8m0", format.name, 1e-4, torch.float32)
    assert abs(relative_error(rounded, x) / operand_error(format) - 1) < 0.03


def test_recorded_products_make_the_gradients() -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1)))
    tokens, targets = torch.randint(0, 256, (2, 2, 32)).unbind()
    gemms = record(model, tokens, targets)
    assert all(p.grad is None for p in model.parameters())
    model.losses(tokens, targets).total.backward()
    assert {g.name for g in gemms} == set(fp8_weights(model))
    for name in fp8_weights(model):
        grad = model.get_parameter(name).grad
        assert grad is not None
        mine = [g.exact()[2] for g in gemms if g.name == name]
        chosen = grad if grad.dim() == 2 else grad[[bool(g.any()) for g in grad]]
        got = torch.stack(sorted(mine, key=torch.norm))  # backward has an order of its own
        want = torch.stack(sorted(chosen.view(-1, *grad.shape[-2:]), key=torch.norm))
        assert relative_error(got, want) < rounding(FP32_UNIT, terms=64, chained=8), name


def test_errors_are_those_of_the_shipped_products() -> None:
    gemms = [Gemm("layers.0.attn.wo.weight", torch.randn(63, 130), torch.randn(200, 130), torch.randn(63, 200))] * 2
    found, expected = errors_of(gemms), product_error(E4M3, E4M3)
    for product in ("fprop", "dgrad", "wgrad"):
        assert abs(found["tiles", gemms[0].name, product] / expected - 1) < 0.2
        assert found["e5m2 gradients", gemms[0].name, product] > (1.3 if product != "fprop" else 0.9) * expected


# --- bubbles of a pipeline: the formulas by hand, and two real processes

BY_HAND = {
    "1f1b": 9 / 33,
    "interleaved1f1b": 4.5 / 28.5,
    "zero_bubble": 1.5 / 25.5,
    "zbv": 1.5 / 25.5,
    "dualpipev": 3 / 27,
}
"""Shares of 4 ranks and 8 micro-batches, where F, I and W take 1 each."""


@pytest.mark.parametrize("name", CHUNKS)
def test_formulas_are_those_of_the_report(name: pipeline.ScheduleName) -> None:
    assert formula(name, 4, 8) == pytest.approx(BY_HAND[name], rel=1e-12)


def test_bubble_is_the_time_without_the_processor() -> None:
    """The slower of two ranks takes 4 seconds, and both together compute for 6 of 8."""
    assert bubble_share([Passes(whole=3.0, busy=3.0), Passes(whole=4.0, busy=3.0)]) == pytest.approx(1 / 4)


def test_pipeline_is_left_out_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "cores", lambda: 1)
    found = list(pipeline.measure(setting(), Size(1, 1, 1, 1)))
    assert [f.case["schedule"] for f in found] == list(CHUNKS)
    assert {f.note for f in found} == {"left out: 2 ranks need 2 processor cores, and there is 1"}
    assert pipeline.answer(found) == ""


@pytest.mark.slow
def test_two_processes_measure_every_schedule(tmp_path: Path) -> None:
    size = Size(sequences=1, tokens=64, warm=1, steps=3)
    found = list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), size))
    bubbles = {str(f.case["schedule"]): f for f in pick(found, "bubble")}
    assert list(bubbles) == list(CHUNKS)
    assert all(0 < (f.measured or 0.0) < 0.9 for f in bubbles.values())
    told = pipeline.answer(found)
    assert "(formula 11%)" in told and "the fastest step is that of" in told
    for name, rank in itertools.product(CHUNKS, range(RANKS)):
        events = json.loads((tmp_path / "pipeline" / f"{name}-rank{rank}.json").read_text())["traceEvents"]
        assert any("mm" in str(event.get("name")) for event in events)
