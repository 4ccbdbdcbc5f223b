"""Figures that decode, prefill and train share: speed of a step, its bytes and FLOPs, and its share of the roofs."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.case import Figure, Figures, Setting, Value, pick
from dsmini import Transformer
from dsmini.measure import prediction
from dsmini.measure.calibration import read_bandwidth
from dsmini.measure.counting import Count, count
from dsmini.measure.memory import peak_since_reset, reset_peak
from dsmini.measure.timing import interleaved, times
from dsmini.measure.workloads import dtype_name, random_cache
from dsmini.nn import Cache, Routing
from dsmini.report.verdicts import compared

FASTEST = 1.25
"""Rate of the best kernels over that of the plain reading which is the roof (docs/log.md)."""
READINGS = 4
"""Times that the roof is measured again before a rate is far above it: other programs may slow one of them."""
HIGHER = {"tokens_per_s": "tokens/s", "useful_share": ""}
LOWER = {"bytes_per_token": "bytes", "peak_memory": "bytes"}
NEITHER = {"flops_per_token": "FLOP", "bandwidth": "bytes/s", "flop_rate": "FLOP/s", "seconds_by_kind": "s"}
LEAST = "whole model; predicted: lower bound, operands and results of each product once; measured: of all operations"
LEAST_FLOPS = "whole model; predicted: lower bound, the products of the formula (causal, without padding)"
USEFUL = "share of the peak, counting only the FLOPs of the formula (causal, without padding)"
COLD = "measured: bytes from memory, not from a cache; predicted: the roof"
WHOLE = "whole process, torch and other libraries included"
ONE_PASS = "one step; each operation is timed from Python, so many small ones show mostly the cost of a call"


def check_bandwidth(what: str, from_memory: float, setting: Setting) -> float:
    """Return the roof, in bytes/s.

    A rate above the stored roof has it measured again: other processes may have slowed its first measurement. A rate
    far above it has it measured up to READINGS times.

    Raises: ValueError for a rate far above the roof, which can only be an error of counting.
    """
    roof = max(setting.roofs.bandwidth, setting.roofs.copy)
    if from_memory > roof:
        roof = max(roof, read_bandwidth(setting.device))
    for _ in range(READINGS - 1):
        if from_memory > FASTEST * roof:
            roof = max(roof, read_bandwidth(setting.device))
    if from_memory > FASTEST * roof:
        raise ValueError(
            f"{what}: {from_memory / 1e9:.1f} GB/s from memory is above the roof of {roof / 1e9:.1f}: bytes are "
            "counted wrong, or the stored roof is too low; --fresh measures it again"
        )
    return roof


def measure_step(
    name: str,
    case: Mapping[str, Value],
    step: Callable[[], Sequence[Routing]],
    setting: Setting,
    seconds: float,
    least_flops: float,
    least_bytes: Callable[..., Any],
) -> Iterator[Figure]:
    """Measure a step on sequences and yield its figures. The step returns its routing.

    Args:
        case: batch and tokens.
        seconds: time to fill with steps.
        least_flops: FLOPs of the formula for the whole step.
        least_bytes: function from the number of distinct experts to the traffic of a token.
    """
    reset_peak()
    step()
    experts = distinct_experts(step())
    counted = count(step, setting.roofs.cache_bytes)
    taken = times(step, setting.device, seconds)
    tokens = int(case["batch"]) * int(case["tokens"])
    bounds = {"bytes_bound": least_bytes(experts=experts).total, "flops_bound": least_flops / tokens}
    yield from step_figures(name, case, counted, taken, tokens, setting, **bounds)


def step_figures(
    name: str,
    case: Mapping[str, Value],
    counted: Count,
    taken: Sequence[float],
    tokens: int,
    setting: Setting,
    *,
    flops_bound: float,
    bytes_bound: float | None = None,
    bytes_measured: float | None = None,
) -> Iterator[Figure]:
    """Yield the figures of a step: speed, bytes and FLOPs with their lower bounds, and the roofs.

    Args:
        counted: operations of one step.
        taken: seconds of several steps.
        tokens: number of tokens in a step.
        flops_bound, bytes_bound: least FLOPs and bytes a token, from the config.
        bytes_measured: measured bytes a token; None takes those of the counted step.

    Raises: ValueError for a bandwidth above the roof.
    """
    figure = Figures(name, HIGHER, LOWER, NEITHER)
    peak = setting.roofs.peak[dtype_name(setting.dtype)]
    from_memory = sum(op.cold for op in counted.operations)
    memory = check_bandwidth(f"{name} {dict(case)}", from_memory / statistics.median(taken), setting)
    predicted = tokens / prediction.seconds(counted, setting.roofs)
    moved = counted.bytes / tokens if bytes_measured is None else bytes_measured
    useful, rates = ([flops / t for t in taken] for flops in (flops_bound * tokens / peak, counted.flops))
    whole = WHOLE if setting.device.type == "cpu" else ""
    yield figure("tokens_per_s", case, [tokens / t for t in taken], predicted=predicted)
    yield figure("bytes_per_token", case, moved, predicted=bytes_bound, bound=True, note=LEAST)
    flops = counted.flops / tokens
    yield figure("flops_per_token", case, flops, predicted=flops_bound, bound=True, note=LEAST_FLOPS)
    yield figure("useful_share", case, useful, note=USEFUL)
    yield figure("bandwidth", case, [from_memory / t for t in taken], predicted=memory, bound=True, note=COLD)
    yield figure("flop_rate", case, rates, predicted=peak, bound=True, note="predicted: the roof")
    yield figure("peak_memory", case, float(peak_since_reset(setting.device)), note=whole)
    for kind, parts in sorted(prediction.by_kind(counted.operations, setting.roofs).items()):
        by_kind = {**case, "kind": kind, "calls": int(parts["calls"])}
        yield figure("seconds_by_kind", by_kind, parts["measured"], predicted=parts["predicted"], note=ONE_PASS)


def decode_in_turns(
    models: Mapping[str, Transformer],
    setting: Setting,
    batch: int,
    context: int,
    rounds: int,
    decode: Callable[[Transformer, Cache], object],
) -> dict[str, tuple[float, list[float]]]:
    """Return predicted and measured seconds of decoding from random caches; the models take turns."""

    def step(model: Transformer, cache: Cache) -> None:
        cache.truncate(context)
        decode(model, cache)

    runs = {name: partial(step, model, random_cache(model, batch, context, 8)) for name, model in models.items()}
    predicted = {name: prediction.predicted_seconds(run, setting.roofs) for name, run in runs.items()}
    taken = interleaved(runs, setting.device, rounds)
    return {name: (predicted[name], taken[name]) for name in runs}


def distinct_experts(routing: Sequence[Routing]) -> float | None:
    """Return the distinct experts that a step visits in a layer, the mean over layers; None without experts."""
    return statistics.fmean(float((r.counts > 0).sum()) for r in routing) if routing else None


def over_bound(figures: list[Figure], case: Mapping[str, Value]) -> str:
    """Return a clause with the bytes of a case over their lower bound; "" if they were not measured."""
    ratios = [f.ratio for f in pick(figures, "bytes_per_token", **case) if f.ratio]
    return "".join(f"; bytes per token in the whole model are {ratio:.2f} times the lower bound" for ratio in ratios)


def speed_sentence(figures: list[Figure], what: str) -> str:
    """Return the fastest case in words, compared with its prediction."""
    speed = [f for f in pick(figures, "tokens_per_s") if f.measured]
    if not speed:
        return ""
    best = max(speed, key=lambda f: f.measured or 0)
    text = f"{best.measured:,.0f} tokens/s at {what} {best.case['tokens']:,} in batches of {best.case['batch']}"
    shares = [f.ratio for f in pick(figures, "flop_rate", **best.case) if f.ratio]
    text += "".join(f", {share:.0%} of the matrix peak" for share in shares)
    text += f"; {compared(best, best.predicted, 'what its operations predict')}" if best.predicted else ""
    return text + over_bound(figures, best.case) + "."
