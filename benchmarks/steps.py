"""Figures that decode, prefill and train share: speed of a step, what it moves, and how near the roofs that comes."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.case import Figure, Figures, Setting, Value, pick
from dsmini import Transformer
from dsmini.measure import prediction
from dsmini.measure.counting import Count, count
from dsmini.measure.memory import peak_since_reset, reset_peak
from dsmini.measure.timing import interleaved, times
from dsmini.measure.workloads import dtype_name, random_cache
from dsmini.nn import Cache, Routing

HIGHER = {"tokens_per_s": "tokens/s", "useful_share": ""}
LOWER = {"bytes_per_token": "bytes", "peak_memory": "bytes"}
NEITHER = {"flops_per_token": "FLOP", "bandwidth": "bytes/s", "flop_rate": "FLOP/s", "seconds_by_kind": "s"}
LEAST = "predicted: lower bound, operands and results of each product once; measured: those of all operations"
LEAST_FLOPS = "predicted: lower bound, the products of the formula: causal, without padding"
USEFUL = "of the peak, by the FLOPs that the formula needs: causal, without padding"
COLD = "measured: bytes that no cache holds; predicted: the roof"
WHOLE = "of the whole process, torch and what else it has loaded included"
ONE_PASS = "one pass, each operation timed by itself from Python: of many small ones mostly their calls"


def check_bandwidth(what: str, from_memory: float, setting: Setting) -> float:
    """Return the roof, in bytes/s.

    Raises: ValueError for bytes/s from memory above it, which are an error of counting, not a result.
    """
    roof = max(setting.roofs.bandwidth, setting.roofs.copy)
    if from_memory > roof:
        raise ValueError(
            f"{what}: {from_memory / 1e9:.1f} GB/s from memory is above the roof of {roof / 1e9:.1f}: bytes are "
            "counted wrong, or the kept roof is too low, which --fresh measures again"
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
    """Measure a step on sequences, which returns its routing, and yield its figures.

    Args:
        case: batch and tokens.
        seconds: time to fill with steps.
        least_flops: FLOPs of the whole step that the formula needs.
        least_bytes: returns the traffic of a token, for this many distinct experts.
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
    """Yield the figures of any kind of step: its speed, its bytes and FLOPs next to their lower bounds, and the roofs.

    Args:
        counted: one step.
        taken: seconds of several steps.
        tokens: number of tokens in a step.
        flops_bound, bytes_bound: least FLOPs and bytes a token, from the config.
        bytes_measured: bytes a token, if not those of the counted step.

    Raises: ValueError for a bandwidth above what this machine can do, which is an error of counting, not a result.
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
    """Return predicted and measured seconds of decoding from caches of random rows, while the models take turns."""

    def step(model: Transformer, cache: Cache) -> None:
        cache.truncate(context)
        decode(model, cache)

    runs = {name: partial(step, model, random_cache(model, batch, context, 8)) for name, model in models.items()}
    predicted = {name: prediction.predicted_seconds(run, setting.roofs) for name, run in runs.items()}
    taken = interleaved(runs, setting.device, rounds)
    return {name: (predicted[name], taken[name]) for name in runs}


def distinct_experts(routing: Sequence[Routing]) -> float | None:
    """Return how many distinct experts a step's tokens visited in a layer, the mean of the layers; None without any."""
    return statistics.fmean(float((r.counts > 0).sum()) for r in routing) if routing else None


def over_bound(figures: list[Figure], case: Mapping[str, Value]) -> str:
    """Return the end of a sentence: how many times the least bytes a case moves; "" where that was not measured."""
    ratios = [f.ratio for f in pick(figures, "bytes_per_token", **case) if f.ratio]
    return "".join(f", moving {ratio:.2f} times the bytes that must move" for ratio in ratios)


def speed_sentence(figures: list[Figure], what: str) -> str:
    """Return the fastest case in words, and how well it was predicted."""
    speed = [f for f in pick(figures, "tokens_per_s") if f.measured]
    if not speed:
        return ""
    best = max(speed, key=lambda f: f.measured or 0)
    text = f"{best.measured:,.0f} tokens/s at {what} {best.case['tokens']:,} in batches of {best.case['batch']}"
    shares = [f.ratio for f in pick(figures, "flop_rate", **best.case) if f.ratio]
    text += "".join(f", {share:.0%} of the matrix peak" for share in shares)
    text += f"; {best.ratio:.2f} times what its operations predict" if best.ratio else ""
    return text + over_bound(figures, best.case) + "."
