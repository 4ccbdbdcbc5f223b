"""Which limits each operation, memory or arithmetic?

Each operation is timed by itself during five steps; its time includes the call. A train step is forward, backward,
clipping and AdamW. Operations below 0.2 % of the time are left out. An operation without products counts one FLOP for
each element that it writes.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Series, Setting, pick, values
from benchmarks.steps import check_bandwidth
from dsmini import TrainConfig
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.workloads import StepShape, dtype_name

NAME = "roofline"
PASSES = 5
STEPS = ("decode", "prefill", "train")
MOST_KINDS = 5
"""Number of kinds of operations that a plot names, by their time. The others share a colour."""

figure = Figures(NAME, neither={"flop_rate": "FLOP/s", "share_of_time": "", "roof": "FLOP/s"})


def cases(setting: Setting) -> list[Case]:
    served = shapes.decoded(setting.quick)
    trained = dataclasses.replace(shapes.TRAINED, n_layers=3) if setting.quick else shapes.TRAINED
    adamw = TrainConfig(optimizer="adamw")
    of = partial(StepShape, dtype=dtype_name(setting.dtype))
    steps = {
        "decode": of(work="decode", config=served, batch=1, tokens=1024),
        "prefill": of(work="prefill", config=served, batch=1, tokens=512),
        "train": of(work="training", config=trained, batch=8, tokens=trained.max_seq_len, train=adamw),
    }
    if setting.quick:  # two minutes for all questions; training has the products of a prompt
        del steps["prefill"]
    return [
        Case(key=f"step={name}", seconds=6.0, run=lambda name=name, shape=shape: measure(setting, name, shape))
        for name, shape in steps.items()
    ]


def measure(setting: Setting, name: str, shape: StepShape) -> Iterator[Figure]:
    step = shape.make(setting.device)
    with torch.set_grad_enabled(name == "train"):
        step()
        passes = [count(step, setting.roofs.cache_bytes).operations for _ in range(PASSES)]
    groups: dict[tuple[str, str, str], list[CountedOperation]] = {}
    for op in itertools.chain(*passes):
        shape = " x ".join("[" + ", ".join(map(str, s)) + "]" for s in op.shape[:2])
        groups.setdefault((op.kind, op.name, shape), []).append(op)
    seconds = {of: sum(op.seconds for op in ops) for of, ops in groups.items()}
    total = sum(op.seconds for op in itertools.chain(*passes))
    check_bandwidth(f"{NAME} {name}", sum(op.cold for op in itertools.chain(*passes)) / total, setting)
    for of in sorted(groups, key=lambda of: -seconds[of]):
        (kind, operation, shape), ops = of, groups[of]
        # an operation without products counts one FLOP for each element that it writes
        flops = sum(op.flops or op.written // op.dtype.itemsize for op in ops)
        moved = sum(op.bytes for op in ops)
        if seconds[of] < 0.002 * total or not moved or not flops:
            continue
        case = {"step": name, "kind": kind, "operation": operation, "shape": shape, "intensity": flops / moved}
        predicted = flops / sum(operation_seconds(op, setting.roofs) for op in ops)
        yield figure("flop_rate", case, flops / seconds[of], predicted=predicted)
        yield figure("share_of_time", case, seconds[of] / total)
    peak = setting.roofs.peak[dtype_name(setting.dtype)]
    yield figure("roof", {"step": name, "roof": "memory"}, setting.roofs.bandwidth)
    yield figure("roof", {"step": name, "roof": "arithmetic"}, peak)


def finding(figures: list[Figure]) -> str:
    memory, arithmetic = _roofs(figures)
    if not memory or not arithmetic:
        return ""
    ridge, parts = arithmetic / memory, []
    for step in STEPS:
        shares = pick(figures, "share_of_time", step=step)
        if total := sum(values(shares, "share_of_time")):
            left = sum(f.measured or 0 for f in shares if float(f.case["intensity"]) < ridge)
            parts.append(f"{left / total:.0%} of the time of a {step} step")
    text = f"Below {ridge:.0f} FLOPs a byte memory or caches limit this machine"
    return text + (f": this is {', '.join(parts)}." if parts else ".")


def _roofs(figures: list[Figure]) -> tuple[float, float]:
    """Return the roofs of memory and of arithmetic; 0 for one that was not measured."""
    roofs = {f.case["roof"]: f.measured or 0.0 for f in pick(figures, "roof")}
    return roofs.get("memory", 0.0), roofs.get("arithmetic", 0.0)


def plots(figures: list[Figure]) -> list[Plot]:
    memory, arithmetic = _roofs(figures)
    by_step = {step: pick(figures, "flop_rate", step=step) for step in STEPS}
    if not memory or not arithmetic:
        return []
    shares = {step: pick(figures, "share_of_time", step=step) for step in STEPS}
    return [_plot(step, found, shares[step], memory, arithmetic) for step, found in by_step.items() if found]


def _plot(step: str, found: list[Figure], shares: list[Figure], memory: float, arithmetic: float) -> Plot:
    ridge = arithmetic / memory
    at = [float(f.case["intensity"]) for f in found]
    low, high = min(at) / 2, max(4 * ridge, 2 * max(at))
    series = [Series(label="roof", x=[low, ridge, high], y=[low * memory, arithmetic, arithmetic], dashed=True)]
    seconds = {str(f.case["kind"]): 0.0 for f in (*found, *shares)}
    for f in shares:
        seconds[str(f.case["kind"])] += f.measured or 0.0
    kinds = sorted(seconds, key=lambda kind: -seconds[kind])
    named = {kind: [kind] for kind in kinds[:MOST_KINDS]} | {"others": kinds[MOST_KINDS:]}
    for kind, members in named.items():
        some = [f for f in found if f.case["kind"] in members]
        x, y = [float(f.case["intensity"]) for f in some], [f.measured or 0 for f in some]
        series += [Series(label=kind, kind="points", x=x, y=y)] if some else []
    caption = "Each point is an operation of one shape. Above the sloping roof its bytes come from a cache."
    title = f"Operations of a {step} step"
    return Plot(title=title, x="FLOPs a byte", y="FLOP/s", series=series, log_x=True, log_y=True, caption=caption)
