"""Operations of a step next to the roofs of memory and of arithmetic.

Each operation is timed by itself during five steps; its time includes the call. A train step is forward, backward,
clipping and AdamW. Operations below 0.2 % of the time are left out. An operation without products counts one FLOP for
each element that it writes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import models
from benchmarks.question import Case, Figure, Question, Setting, cases_over, check_bandwidth, figure, pick
from dsmini import TrainConfig
from dsmini.measure import prediction
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.workloads import (
    StepShape,
)
from dsmini.report import Plot, Series

PASSES = 5
LEAST_SHARE = 0.002
MOST_KINDS = 5
"""Number of kinds of operations that a plot names, by their time. The others share a colour."""


ADAMW = TrainConfig(optimizer="adamw")


def cases(setting: Setting) -> list[Case]:
    served = models.decoded(setting.quick)
    trained = dataclasses.replace(models.TRAINED, n_layers=3) if setting.quick else models.TRAINED
    of = partial(StepShape, dtype=setting.dtype_name)
    steps = {
        "decode": of(work="decode", config=served, batch=1, tokens=1024),
        "prefill": of(work="prefill", config=served, batch=1, tokens=512),
        "train": of(
            work="training", config=trained, batch=8, tokens=trained.max_seq_len, train=TrainConfig(optimizer="adamw")
        ),
    }
    if setting.quick:  # training has the products of a prompt
        del steps["prefill"]
    return cases_over("step={}", ((name,) for name in steps), 6.0, lambda name: operations(setting, name, steps[name]))


def operations(setting: Setting, name: str, shape: StepShape) -> Iterator[Figure]:
    """Yield rate and share of the time of each operation of one shape."""
    step = shape.make(setting.device)
    with torch.set_grad_enabled(name == "train"):
        step()
        every = [op for _ in range(PASSES) for op in count(step, setting.roofs.cache_bytes).operations]
    groups: dict[tuple[str, str, str], list[CountedOperation]] = {}
    for op in every:
        sizes = " x ".join("[" + ", ".join(map(str, s)) + "]" for s in op.shape[:2])
        groups.setdefault((op.kind, op.name, sizes), []).append(op)
    total = sum(op.seconds for op in every)
    check_bandwidth(f"operations of {name}", sum(op.cold for op in every) / total, setting)
    for (kind, operation, sizes), ops in sorted(groups.items(), key=lambda item: -_seconds(item[1])):
        # an operation without products counts one FLOP for each element that it writes
        flops = sum(op.flops or op.written // op.dtype.itemsize for op in ops)
        moved, seconds = sum(op.bytes for op in ops), _seconds(ops)
        if seconds >= LEAST_SHARE * total and moved and flops:
            case = {"step": name, "kind": kind, "operation": operation, "shape": sizes, "intensity": flops / moved}
            expected = flops / sum(prediction.operation_seconds(op, setting.roofs) for op in ops)
            yield figure("flop_rate", case, flops / seconds, predicted=expected)
            yield figure("share_of_time", case, seconds / total)
    yield figure("roof", {"step": name, "roof": "memory"}, setting.roofs.bandwidth)
    yield figure("roof", {"step": name, "roof": "arithmetic"}, setting.roofs.peak[setting.dtype_name])


def _seconds(ops: Sequence[CountedOperation]) -> float:
    return sum(op.seconds for op in ops)


def _roofs(figures: list[Figure]) -> tuple[float, float]:
    """Return the roofs of memory and of arithmetic; 0 for one that was not measured."""
    roofs = {f.case["roof"]: f.measured or 0.0 for f in pick(figures, "roof")}
    return roofs.get("memory", 0.0), roofs.get("arithmetic", 0.0)


def answer(figures: list[Figure]) -> str:
    memory, arithmetic = _roofs(figures)
    if not memory or not arithmetic:
        return ""
    ridge, parts = arithmetic / memory, []
    shares = pick(figures, "share_of_time")
    for step, group in itertools.groupby(shares, key=lambda f: f.case["step"]):
        mine = list(group)
        below = sum(f.measured or 0.0 for f in mine if float(f.case["intensity"]) < ridge)
        parts.append(f"{below / sum(f.measured or 0.0 for f in mine):.0%} of the time of a {step} step")
    text = f"Below {ridge:.0f} FLOPs a byte memory or caches limit this machine"
    return text + (f": this is {', '.join(parts)}." if parts else ".")


def plots(figures: list[Figure]) -> list[Plot]:
    memory, arithmetic = _roofs(figures)
    found = pick(figures, "flop_rate") if memory and arithmetic else []
    return [
        _roofline(str(step), list(group), pick(figures, "share_of_time", step=step), memory, arithmetic)
        for step, group in itertools.groupby(found, key=lambda f: f.case["step"])
    ]


def _roofline(step: str, found: list[Figure], shares: list[Figure], memory: float, arithmetic: float) -> Plot:
    ridge = arithmetic / memory
    at = [float(f.case["intensity"]) for f in found]
    low, high = min(at) / 2, max(4 * ridge, 2 * max(at))
    series = [Series(label="roof", x=[low, ridge, high], y=[low * memory, arithmetic, arithmetic], dashed=True)]
    seconds = dict.fromkeys((str(f.case["kind"]) for f in found), 0.0)
    for f in shares:
        if f.case["kind"] in seconds:
            seconds[str(f.case["kind"])] += f.measured or 0.0
    by_time = sorted(seconds, key=lambda kind: -seconds[kind])
    for label, members in {**{kind: [kind] for kind in by_time[:MOST_KINDS]}, "others": by_time[MOST_KINDS:]}.items():
        some = [f for f in found if f.case["kind"] in members]
        if some:
            x, y = [float(f.case["intensity"]) for f in some], [f.measured or 0.0 for f in some]
            series.append(Series(label=label, kind="points", x=x, y=y))
    caption = "Each point is an operation of one shape. Above the sloping roof its bytes come from a cache."
    axes = {"x": "FLOPs a byte", "y": "FLOP/s", "log_x": True, "log_y": True}
    return Plot(title=f"Operations of a {step} step", series=series, caption=caption, **axes)


QUESTION = Question(
    name="roofline",
    title="Which limits each operation, memory or arithmetic?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(plots,),
)
