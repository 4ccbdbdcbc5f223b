"""Which roof is each operation under: that of memory, or that of arithmetic?"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.question import Case, Figure, Plot, Question, Series, Setting
from benchmarks.questions.decode import decoding_step
from benchmarks.questions.prefill import reading_step
from benchmarks.questions.train import training_step
from benchmarks.steps import check_bandwidth
from dsmini.measure.counting import Operation, count
from dsmini.measure.prediction import operation_seconds

NAME = "roofline"
PASSES = 5


def cases(setting: Setting) -> list[Case]:
    steps = {"decode": _decode, "prefill": _prefill, "train": _train}
    return [
        Case(key=f"step={name}", seconds=6.0, run=lambda n=name, m=make: measure(setting, n, m(setting)))
        for name, make in steps.items()
    ]


def _decode(setting: Setting) -> Callable[[], object]:
    return partial(decoding_step(setting, 1, 1024)[2], None)


def _prefill(setting: Setting) -> Callable[[], object]:
    return reading_step(setting, 1, 512)[1]


def _train(setting: Setting) -> Callable[[], object]:
    config = dataclasses.replace(shapes.TRAINED, n_layers=3) if setting.quick else shapes.TRAINED
    return training_step(config, setting, 8, config.max_seq_len)


def measure(setting: Setting, name: str, step: Callable[[], object]) -> Iterator[Figure]:
    grad = name == "train"
    with torch.set_grad_enabled(grad):
        step()
        passes = [count(step, setting.roofs.cache_bytes).operations for _ in range(PASSES)]
    groups: dict[tuple[str, str, str], list[Operation]] = {}
    for operations in passes:
        for op in operations:
            shape = " x ".join("[" + ", ".join(map(str, s)) + "]" for s in op.shape[:2])
            groups.setdefault((op.kind, op.name, shape), []).append(op)
    total = sum(op.seconds for operations in passes for op in operations)
    check_bandwidth(f"{NAME} {name}", sum(op.cold for operations in passes for op in operations) / total, setting)
    for (kind, operation, shape), ops in sorted(groups.items(), key=lambda item: -sum(op.seconds for op in item[1])):
        seconds = sum(op.seconds for op in ops)
        # an operation that multiplies nothing is counted as one FLOP for every element that it writes
        flops = sum(op.flops or op.written // op.dtype.itemsize for op in ops)
        moved = sum(op.bytes for op in ops)
        if seconds < 0.002 * total or not moved or not flops:
            continue
        case = {"step": name, "kind": kind, "operation": operation, "shape": shape, "intensity": flops / moved}
        predicted = flops / sum(operation_seconds(op, setting.roofs) for op in ops)
        yield Figure(
            question=NAME, case=case, metric="flop_rate", unit="FLOP/s", measured=flops / seconds, predicted=predicted
        )
        yield Figure(question=NAME, case=case, metric="share_of_time", unit="", measured=seconds / total)
    dtype = str(setting.dtype).removeprefix("torch.")
    for roof, value, unit in (
        ("memory", setting.roofs.bandwidth, "bytes/s"),
        ("arithmetic", setting.roofs.peak[dtype], "FLOP/s"),
    ):
        yield Figure(question=NAME, case={"step": name, "roof": roof}, metric="roof", unit=unit, measured=value)


def finding(figures: list[Figure]) -> str:
    ridge = _ridge(figures)
    if ridge is None:
        return "Nothing was measured yet."
    parts = []
    for step in ("decode", "prefill", "train"):
        shares = [f for f in figures if f.metric == "share_of_time" and f.case["step"] == step]
        total = sum(f.measured or 0 for f in shares)
        if total:
            left = sum(f.measured or 0 for f in shares if float(f.case["intensity"]) < ridge)
            parts.append(f"{left / total:.0%} of a {step} step")
    text = f"Below {ridge:.0f} FLOPs a byte this machine can only be as fast as its memory or caches"
    return text + (f": by time {', '.join(parts)} lie there." if parts else ".")


def _ridge(figures: list[Figure]) -> float | None:
    roofs = {f.case["roof"]: f.measured for f in figures if f.metric == "roof"}
    if not roofs.get("memory") or not roofs.get("arithmetic"):
        return None
    return (roofs["arithmetic"] or 0) / (roofs["memory"] or 1)


def plots(figures: list[Figure]) -> list[Plot]:
    roofs = {f.case["roof"]: f.measured for f in figures if f.metric == "roof"}
    out = []
    for step in ("decode", "prefill", "train"):
        points = [f for f in figures if f.metric == "flop_rate" and f.case["step"] == step]
        if not points or len(roofs) < 2:
            continue
        memory, arithmetic = roofs["memory"] or 1.0, roofs["arithmetic"] or 1.0
        ridge = arithmetic / memory
        at = [float(f.case["intensity"]) for f in points]
        low, high = min(at) / 2, max(4 * ridge, 2 * max(at))
        series = [Series(label="roof", x=[low, ridge, high], y=[low * memory, arithmetic, arithmetic], dashed=True)]
        for kind in sorted({str(f.case["kind"]) for f in points}):
            some = [f for f in points if f.case["kind"] == kind]
            series.append(
                Series(
                    label=kind,
                    kind="points",
                    x=[float(f.case["intensity"]) for f in some],
                    y=[f.measured or 0 for f in some],
                )
            )
        out.append(
            Plot(
                title=f"Operations of a {step} step",
                x="FLOPs a byte",
                y="FLOP/s",
                series=series,
                log_x=True,
                log_y=True,
                caption="A point is an operation of one shape. Above the sloping roof, its bytes come from a cache.",
            )
        )
    return out


QUESTION = Question(
    name=NAME,
    title="Which roof is each operation under, memory's or arithmetic's?",
    cases=cases,
    finding=finding,
    plots=plots,
    about="Each operation is timed by itself while it is counted, five passes; the call is part of its time. A train "
    "step is forward, backward, clipping and AdamW. Operations below 0.2 % of the time are left out; what multiplies "
    "nothing counts one FLOP for an element written.",
)
