"""Findings say what figures show, and hedge where they do not; what questions compute besides is as by hand."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import shapes, steps
from benchmarks.case import pick
from benchmarks.questions import fp8, kv_cache, moe_or_dense, mtp, plan
from benchmarks.questions.mtp import expected_acceptance, in_turns, tokens_per_step
from benchmarks.steps import check_bandwidth, step_figures
from dsmini import Transformer, accounting
from dsmini.measure.counting import count
from dsmini.measure.step_rates import SHAPES
from tests.conftest import randomise
from tests.helpers.questions import TINY, setting

# --- sentences


def cached(spread: float) -> str:
    """Return the finding of a layer that is 1.2 times as fast, with quartiles of this spread."""
    figures = [
        kv_cache.figure("bytes_per_token", {"attention": kind, "cache": "bfloat16"}, size)
        for kind, size in (("mla", 1.0), ("mha", 8.0))
    ]
    for kind, t in (("mla", 1.0), ("mha", 1.2)):
        case = {"attention": kind, "context": 4096}
        figures.append(kv_cache.figure("seconds_per_layer", case, [t * (1 - spread), t, t * (1 + spread)]))
    return kv_cache.finding(figures)


def better(*gains: float) -> str:
    return moe_or_dense.finding([moe_or_dense.figure("gain", {"seed": i}, gain) for i, gain in enumerate(gains)])


def short() -> str:
    figures = [fp8.figure("bytes", fp8._case("weights", kind), size) for kind, size in (("fp8", 6), ("bfloat16", 10))]
    return fp8.finding([*figures, fp8.figure("decode_ratio", fp8._case("weights"), [1.7, 1.71, 1.72])])


def forecast(*predicted: float, memory: bool = False) -> str:
    found = [plan.figure("seconds", {"step": str(i)}, 1.0, predicted=p) for i, p in enumerate(predicted)]
    if memory:
        found += [plan.figure("process_memory", {"step": "a"}, 100.0, predicted=112.0)]
        found += [plan.figure("tensor_memory", {"step": "a"}, 100.0, predicted=101.0)]
    return plan.finding(found)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (cached(0.01), "at context 4,096 its layer decodes 1.2 times as fast."),
        (cached(0.5), "at context 4,096 its layer decodes 0.7 to 2.0 times as fast (unclear)."),
        (short(), "FP8 stores weights in 60% of the bytes (a decoding step takes 1.71 times as long)."),
        (better(0.02, 0.021, 0.019), "MoE is better by 0.0200 nats a byte, 95 % interval"),
        (better(-0.02, -0.021, -0.019), "MoE is worse by 0.0200 nats a byte"),
        (better(0.02, -0.01, 0.005), "No difference is clear"),
        (
            forecast(1.1, 0.9, 1.29),
            "3 steps, forecast before they ran: error of the time 10% in the median, 29% at worst (as asked)",
        ),
        (forecast(1.1, 0.9, 1.31), "10% in the median, 31% at worst (asked: 15% and 30%)"),
        (forecast(0.8, 1.2, 1.0), "20% in the median, 20% at worst (asked: 15% and 30%)"),
        (forecast(1.0, memory=True), "peak memory at most 12% (asked: 10%), of the tensors' 1.0%"),
    ],
)
def test_findings_say_what_figures_show(told: str, words: str) -> None:
    assert words in told


def test_interval_of_five_seeds_is_students() -> None:
    mean, half = moe_or_dense.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)


# --- the cache that fits


@pytest.mark.parametrize(("memory", "left"), [(8 << 30, 2 << 30), (100 << 30, 10 << 30)])
def test_context_that_fits_leaves_room_for_the_system(monkeypatch: pytest.MonkeyPatch, memory: int, left: int) -> None:
    monkeypatch.setattr(kv_cache, "memory_bytes", lambda device: memory)
    fits = pick(kv_cache.measure_bytes(setting()), "context_that_fits", attention="mla", cache="bfloat16")[0]
    config = shapes.BIG
    used = accounting.weight_bytes(config).total + (fits.predicted or 0) * accounting.kv_bytes_per_token(config)
    assert 0 <= memory - left - used < accounting.kv_bytes_per_token(config)
    assert f"with {left >> 30}.00 GiB of memory left to the system" in fits.note.replace("10.0 ", "10.00 ")


def test_context_that_fits_is_not_said_where_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "memory_bytes", lambda device: 0)
    assert pick(kv_cache.measure_bytes(setting()), "context_that_fits") == []


# --- plans


def test_held_out_steps_are_none_of_those_that_rates_are_of() -> None:
    for quick in (False, True):
        held_out = plan.held_out(quick)
        assert len(held_out) == 6
        for shape in held_out.values():
            for config, batch, tokens in SHAPES[shape.work]:
                assert shape.config != config and (shape.batch, shape.tokens) != (batch, tokens)


def test_dtypes_too_slow_here_are_left_out() -> None:
    assert plan.usable(setting()) == ["float32", "bfloat16", "fp8"]
    assert plan.usable(setting(peak={"float32": 1e11, "bfloat16": 1e9})) == ["float32"]


# --- speculative decoding


def test_tokens_of_a_step() -> None:
    for accepted, tokens in (([], 1), ([0.8], 1.8), ([0.5, 0.5, 0.5], 1.875), ([0.0, 1.0], 1)):
        assert tokens_per_step(accepted) == tokens


def test_expected_acceptance_of_guesses_that_are_the_trunks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept drafts that equal the main model's prediction, and reject drafts that are one token late."""
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=2)))
    tokens = torch.randint(0, 256, (2, 32))
    out = model.run(tokens, mtp=True)
    right = [out.logits[:, 1:], out.logits[:, 1:-1]]  # the second depth is one token late
    monkeypatch.setattr(model, "run", lambda *_, **__: out._replace(mtp_logits=right))
    for temperature in (0.0, 0.8):
        first, second = expected_acceptance(model, tokens, temperature)
        assert first == pytest.approx(1)
        assert second < 0.9


def test_an_unequal_continuation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1))).eval()
    generate = mtp.generate

    def wrong(*args: Any, speculative: bool, **more: Any) -> Any:
        done = generate(*args, speculative=speculative, **more)
        return done._replace(tokens=done.tokens + speculative)

    in_turns(model, [torch.tensor([1, 2])], 0.0, 3)
    monkeypatch.setattr(mtp, "generate", wrong)
    with pytest.raises(AssertionError, match="changed the greedy continuation"):
        in_turns(model, [torch.tensor([1, 2])], 0.0, 3)


# --- bandwidth above the roof

ROOF = {"bandwidth": 10e9, "copy": 8e9}
# bytes a second, readings of the memory now, and the roof that is allowed, if any
ALLOWED: list[tuple[float, list[float], float | None]] = [
    (9.9e9, [10e9], 10e9),
    (12.4e9, [10e9], 10e9),  # a kernel may read faster than a sum
    (12.6e9, [10e9] * 9, None),
    (19e9, [20e9], 20e9),  # the stored roof was measured on a busy machine
    (20e9, [10e9, 11e9, 19e9], 19e9),  # other programs slowed the first readings
    (12.4e9, [9e9], 10e9),
]


@pytest.mark.parametrize(("reached", "readings", "roof"), ALLOWED)
def test_a_bandwidth_far_above_the_roof_is_an_error(
    monkeypatch: pytest.MonkeyPatch, reached: float, readings: list[float], roof: float | None
) -> None:
    left: Iterator[float] = iter(readings)
    monkeypatch.setattr(steps, "read_bandwidth", lambda device: next(left))
    if roof is None:
        with pytest.raises(ValueError, match=r"x: 12.6 GB/s from memory is above the roof of 10.0: .* --fresh"):
            check_bandwidth("x", reached, setting(**ROOF))
    else:
        assert check_bandwidth("x", reached, setting(**ROOF)) == roof
        assert len([*left]) <= (len(readings) == 1), "a reading that is enough is the last"


def test_figures_of_a_step_are_over_its_bytes_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "read_bandwidth", lambda device: 9e9)
    counted, here = count(lambda: torch.rand(1 << 16) * 2, 1 << 10), setting(**ROOF)
    moved = sum(op.cold for op in counted.operations)
    here = dataclasses.replace(here, dtype=torch.float32)
    figures = {f.metric: f for f in step_figures("q", {}, counted, [moved / 9e9] * 3, 2, here, flops_bound=50.0)}
    assert figures["bandwidth"].measured == pytest.approx(9e9) and figures["bandwidth"].bound
    assert figures["useful_share"].measured == pytest.approx(50.0 * 2 / (moved / 9e9) / 1e11)
    with pytest.raises(ValueError, match="above the roof"):
        list(step_figures("q", {}, counted, [moved / 13e9] * 3, 2, here, flops_bound=50.0))
