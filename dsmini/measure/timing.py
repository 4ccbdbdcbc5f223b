"""What the questions share: models and filled caches, times and their spread, memory at its peak."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from benchmarks.question import Case, Figure, Plot, Series, Setting, Value, pick
from dsmini import ModelConfig, Transformer
from dsmini.measure import prediction
from dsmini.measure.counting import Count, count
from dsmini.measure.machine import peak_memory, synchronize
from dsmini.measure.rates import Roofs
from dsmini.nn import Routing
from dsmini.nn.cache import Cache, CacheDtype

LEAST = "predicted: lower bound, operands and results of each product once; measured: those of all operations"
LEAST_FLOPS = "predicted: lower bound, the products of the formula: causal, without padding"


def built(config: ModelConfig, setting: Setting) -> Transformer:
    """A model with random weights in the setting's dtype, ready to decode."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        return Transformer(config).to(setting.dtype).eval()


def filled(model: Transformer, batch: int, context: int, room: int, dtype: CacheDtype | None = None) -> Cache:
    """A cache that holds random rows in place of `context` tokens, with room for more."""
    cache = model.new_cache(batch, context + room, dtype=dtype)
    generator = torch.Generator(cache.stores[0].data.device).manual_seed(0)
    for store in cache.stores:
        if store.data.dtype == torch.uint8:  # codes and scales: written as rows are
            rows = torch.randn(batch, context, store.c + store.r, generator=generator, device=store.data.device)  # pyright: ignore[reportAttributeAccessIssue]
            store.data[:, :context] = store._encode(rows)
        else:
            store.data[:, :context].normal_(generator=generator)
    cache.lengths = torch.full((batch,), context)
    return cache


def forget_peak() -> None:
    """Let the peak of memory begin anew, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes at the peak since forget_peak: of the GPU's memory, or of this process in RAM."""
    if device.type == "cpu":
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return peak_memory(device)


def name_of(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def random_tokens(config: ModelConfig, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), device=device)


def times(run: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> list[float]:
    """Of runs in a row, after one that warms up: as many as fit in those seconds, at least a few."""
    run()
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < least or time.perf_counter() - start < seconds:
        taken.append(once(run, device))
    return taken


def interleaved(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Of each the times of some rounds in which they take turns, after one that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            elapsed = once(run, device)
            if i:
                taken[name].append(elapsed)
    return taken


def once(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


class Spread(TypedDict):
    """What a Figure has of values that were measured several times."""

    measured: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) < 2:
        return {"measured": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"measured": middle, "low": low, "high": high}


def predicted_seconds(step: Callable[[], object], setting: Setting) -> float:
    """What a step should take, by the operations that it is counted to be."""
    step()
    return prediction.seconds(count(step, setting.roofs.cache_bytes), setting.roofs)


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
    arithmetic = roofs.peak[name_of(setting.dtype)]
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
    yield figure("peak_memory", "bytes", measured=float(peak(setting.device)), better="lower", note=whole)
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


def lines(figures: list[Figure], metric: str, *, x: str, by: str, title: str, unit: str) -> list[Plot]:
    """A metric over one part of the case, a line for each value of another, predictions dashed."""
    found = [f for f in pick(figures, metric) if f.measured]
    series: list[Series] = []
    for value in sorted({f.case[by] for f in found}, key=str):
        line = sorted((f for f in found if f.case[by] == value), key=lambda f: f.case[x])
        at = [float(f.case[x]) for f in line]
        bounds = {"low": [f.low or 0.0 for f in line], "high": [f.high or 0.0 for f in line]} if line[0].low else {}
        series.append(Series(label=f"{by} {value}", x=at, y=[f.measured or 0.0 for f in line], **bounds))
        if all(f.predicted for f in line):
            series.append(
                Series(label=f"{by} {value}, predicted", x=at, y=[f.predicted or 0.0 for f in line], dashed=True)
            )
    return [Plot(title=title, x=x, y=unit, series=series, log_x=True, log_y=True)] if series else []
