"""Figures that decode, prefill and train share: speed of a step, what it moves, and how near the roofs that comes."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.question import Case, Figure, Setting, Value, pick
from dsmini.measure import prediction
from dsmini.measure.counting import Count
from dsmini.measure.memory import peak_since_reset
from dsmini.measure.rates import Roofs
from dsmini.measure.timing import spread
from dsmini.measure.workloads import dtype_name
from dsmini.nn import Routing

LEAST = "predicted: lower bound, operands and results of each product once; measured: those of all operations"
LEAST_FLOPS = "predicted: lower bound, the products of the formula: causal, without padding"


def check_bandwidth(what: str, from_memory: float, setting: Setting) -> float:
    """The roof, in bytes/s.

    Raises: ValueError for bytes/s from memory above it, which are an error of counting, not a result.
    """
    roof = max(setting.roofs.bandwidth, setting.roofs.copy)
    if from_memory > roof:
        raise ValueError(
            f"{what}: {from_memory / 1e9:.1f} GB/s from memory is above the roof of {roof / 1e9:.1f}: bytes are "
            "counted wrong, or the kept roof is too low, which --fresh measures anew"
        )
    return roof


def step_cases(
    axis: str,
    points: Sequence[tuple[int, int]],
    seconds: float,
    measure: Callable[[int, int], Iterator[Figure]],
) -> list[Case]:
    """Return a case for each batch and length of the axis, such as context."""
    return [
        Case(key=f"batch={batch} {axis}={length}", seconds=seconds, run=partial(measure, batch, length))
        for batch, length in points
    ]


def step_figures(
    name: str,
    case: Mapping[str, Value],
    counted: Count,
    taken: Sequence[float],
    tokens: int,
    setting: Setting,
    *,
    bytes_bound: float | None = None,
    flops_bound: float | None = None,
    bytes_measured: float | None = None,
) -> Iterator[Figure]:
    """Yield the figures of any kind of step: its speed, its bytes and FLOPs next to their lower bounds, and the roofs.

    Args:
        counted: one step.
        taken: seconds of several steps.
        tokens: number of tokens in a step.
        bytes_bound, flops_bound: least bytes and FLOPs a token, from the config.
        bytes_measured: bytes a token, if not those of the counted step.

    Raises: ValueError for a bandwidth above what this machine can do, which is an error of counting, not a result.
    """
    roofs = setting.roofs
    arithmetic = roofs.peak[dtype_name(setting.dtype)]
    from_memory = sum(op.cold for op in counted.operations)
    memory = check_bandwidth(f"{name} {dict(case)}", from_memory / statistics.median(taken), setting)

    def figure(metric: str, unit: str, **values: Any) -> Figure:
        return Figure(question=name, case=case, metric=metric, unit=unit, **values)

    predicted = prediction.seconds(counted, roofs)
    speed = spread([tokens / t for t in taken])
    yield figure("tokens_per_s", "tokens/s", predicted=tokens / predicted, better="higher", **speed)
    moved = counted.bytes / tokens if bytes_measured is None else bytes_measured
    least = {"predicted": bytes_bound, "bound": True, "note": LEAST}
    yield figure("bytes_per_token", "bytes", measured=moved, better="lower", **least)
    least = {"predicted": flops_bound, "bound": True, "note": LEAST_FLOPS}
    yield figure("flops_per_token", "FLOP", measured=counted.flops / tokens, **least)
    if flops_bound is not None:
        useful = spread([flops_bound * tokens / t / arithmetic for t in taken])
        note = "of the peak, by the FLOPs that the formula needs: causal, without padding"
        yield figure("useful_share", "", better="higher", note=note, **useful)
    note = "measured: bytes that no cache holds; predicted: the roof"
    bandwidth = spread([from_memory / t for t in taken])
    yield figure("bandwidth", "bytes/s", predicted=memory, note=note, bound=True, **bandwidth)
    rate = spread([counted.flops / t for t in taken])
    yield figure("flop_rate", "FLOP/s", predicted=arithmetic, note="predicted: the roof", bound=True, **rate)
    whole = "of the whole process, torch and what else it has loaded included" if setting.device.type == "cpu" else ""
    yield figure("peak_memory", "bytes", measured=float(peak_since_reset(setting.device)), better="lower", note=whole)
    yield from _by_kind(name, case, counted, roofs)


def _by_kind(name: str, case: Mapping[str, Value], counted: Count, roofs: Roofs) -> Iterator[Figure]:
    """Yield the seconds of each kind of operation."""
    for kind, parts in sorted(prediction.by_kind(counted.operations, roofs).items()):
        yield Figure(
            question=name,
            case={**case, "kind": kind, "calls": int(parts["calls"])},
            metric="seconds_by_kind",
            unit="s",
            measured=parts["measured"],
            predicted=parts["predicted"],
            note="one pass, each operation timed by itself from Python: of many small ones mostly their calls",
        )


def distinct_experts(routing: Sequence[Routing]) -> float | None:
    """Return how many distinct experts a step's tokens visited in a layer, the mean of the layers; None without any."""
    return statistics.fmean(float((r.counts > 0).sum()) for r in routing) if routing else None


def over_bound(figures: list[Figure], case: Mapping[str, Value]) -> str:
    """Return the end of a sentence: how many times the least bytes a case moves; "" where that was not measured."""
    moved = next((f for f in pick(figures, "bytes_per_token") if f.case == case), None)
    return f", moving {moved.ratio:.2f} times the bytes that must move" if moved and moved.ratio else ""


def speed_sentence(figures: list[Figure], axis: str, what: str) -> str:
    """The fastest case in words, and how well it was predicted."""
    speed = [f for f in pick(figures, "tokens_per_s") if f.measured]
    if not speed:
        return "Nothing was measured yet."
    best = max(speed, key=lambda f: f.measured or 0)
    text = f"{best.measured:,.0f} tokens/s at {what} {best.case[axis]:,} in batches of {best.case['batch']}"
    rate = next((f for f in pick(figures, "flop_rate") if f.case == best.case), None)
    if rate and rate.measured and rate.predicted:
        text += f", {rate.measured / rate.predicted:.0%} of the matrix peak"
    if best.ratio:
        text += f"; {best.ratio:.2f} times what its operations predict"
    return text + over_bound(figures, best.case) + "."
