"""How large are the bubbles of pipeline schedules, next to the published formulas and to the simulation?

Two processes of one thread each, on the CPU and in FP32, train a small model of eight equal MoE blocks through each
schedule, with eight micro-batches a step. They send by gloo on the loopback interface. The simulation takes the median
seconds of forwards and backwards from the record, and sends in no time. The formulas are those of table 2 of the
DeepSeek-V3 report, with the same seconds. A bubble is the share of the time in which a rank computes nothing.
The first stage's backward of the input computes nothing, because tokens have no gradient. That of its weights is all.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch.distributed as dist

from benchmarks import pipeline_steps, replay
from benchmarks.case import Case, Figure, Figures, Plot, Setting, pick
from benchmarks.pipeline_steps import PARTS, RANKS, Size, Step
from benchmarks.schedules import Programs, Row, Timeline, bubble_formula, draw, programs, simulate
from dsmini.config.parallel import CHUNKS
from dsmini.report.charts import over_labels

NAME = "pipeline"
FULL, QUICK = Size(), Size(sequences=1, tokens=128, warm=1)
KINDS = {"F": "forward", "B": "backward", "I": "backward of the input", "W": "backward of the weights"}
PREDICTIONS = ("simulation", "formula")

figure = Figures(
    NAME, lower={"bubble": "", "pipeline_seconds": "s", "step_seconds": "s"}, neither={"action_seconds": "s", "gap": ""}
)


def cases(setting: Setting) -> list[Case]:
    size = QUICK if setting.quick else FULL
    key = f"ranks={RANKS} parts={PARTS} dim={size.model.dim} layers={size.model.n_layers} "
    key += f"sequences={size.sequences} tokens={size.tokens} steps={size.steps}"
    return [Case(key=key, seconds=25.0 if setting.quick else 60.0, run=partial(measure, setting, size))]


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def why_not() -> str:
    """Return the reason why no pipeline runs here; empty if it does."""
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch has no torch.distributed with gloo"
    if cores() < RANKS:
        return f"{RANKS} ranks need {RANKS} processor cores, and there is {cores()}"
    return ""


def measure(setting: Setting, size: Size) -> Iterator[Figure]:
    if reason := why_not():
        yield from (figure.left_out("bubble", {"schedule": name}, reason) for name in CHUNKS)
        return
    folder = setting.out / NAME
    folder.mkdir(parents=True, exist_ok=True)
    for name, steps in pipeline_steps.record(size).items():
        program = programs(name, RANKS, PARTS)
        lines = [Timeline.measured(step.rows) for step in steps]
        by_kind = replay.medians([row for step in steps for row in step.rows])
        simulated = simulate(program, *replay.times_for_simulation(by_kind))
        middle = sorted(lines, key=lambda line: line.total)[len(lines) // 2]
        draw({f"{name}, measured": middle, f"{name}, simulated": simulated}, folder / f"{name}.png")
        yield from _figures(name, program, steps, simulated, f"time lines: {folder / name}.png")


def _figures(name: str, program: Programs, steps: Sequence[Step], simulated: Timeline, note: str) -> Iterator[Figure]:
    """Yield the figures of a schedule."""
    every = [row for step in steps for row in step.rows]
    lines = [Timeline.measured(step.rows) for step in steps]
    by_kind = replay.medians(every)
    formula = bubble_formula(name, RANKS, *replay.times_for_simulation(by_kind))
    busy = simulated.total - replay.mean_bubble(simulated)
    shares = [line.bubble_share for line in lines]
    predicted = dict(zip(PREDICTIONS, (simulated.bubble_share, formula / (busy + formula)), strict=True))
    for of, share in predicted.items():
        yield figure("bubble", {"schedule": name, "predicted by": of}, shares, predicted=share, note=note)
    case = {"schedule": name}
    totals = [line.total for line in lines]
    yield figure("pipeline_seconds", case, totals, predicted=simulated.total)
    yield figure("step_seconds", case, [step.seconds for step in steps], note="with the optimizer")
    for kind, words in KINDS.items():
        if times := [row[5] - row[4] for row in every if row[1] == kind]:
            yield figure("action_seconds", {**case, "action": words}, times, note="a stage on one micro-batch")
    found = [replay.causes(program, step.rows, every, simulated) for step in steps]
    for cause in replay.CAUSES:
        part = [of[cause] / total for of, total in zip(found, totals, strict=True)]
        note = f"share of the time that it adds to the simulated bubble; {_stages(every)}" if "stages" in cause else ""
        yield figure("gap", {**case, "cause": cause}, part, note=note)


def _stages(every: Sequence[Row]) -> str:
    """Return the median milliseconds of each kind of action, stage by stage."""
    times = replay.medians_by_stage(every)
    kinds = [kind for kind in KINDS if (kind, 0) in times]
    stages = range(1 + max(stage for _, stage in times))
    told = [
        f"{kind} {', '.join(f'{times[kind, s] * 1e3:.1f}' for s in stages if (kind, s) in times)}" for kind in kinds
    ]
    return f"ms by stage: {'; '.join(told)}"


def finding(figures: list[Figure]) -> str:
    told = []
    for name in CHUNKS:
        by = {of: pick(figures, "bubble", **{"schedule": name, "predicted by": of}) for of in PREDICTIONS}
        measured = next((f.measured for found in by.values() for f in found), None)
        if measured is not None:
            words = [f"{of} {found[0].predicted:.0%}" for of, found in by.items() if found]
            told.append(f"{name} {measured:.0%} ({', '.join(words)})")
    causes = {c: [f.measured or 0.0 for f in pick(figures, "gap", cause=c)] for c in replay.CAUSES}
    sizes = {cause: statistics.mean(parts) for cause, parts in causes.items() if parts}
    if sizes:
        largest = max(sizes, key=lambda cause: abs(sizes[cause]))
        told.append(f"most of what the simulation leaves out is: {largest}, {sizes[largest]:+.0%} on average")
    halves = [f.measured or 0.0 for k in "IW" for f in pick(figures, "action_seconds", schedule="zbv", action=KINDS[k])]
    whole = pick(figures, "action_seconds", schedule="interleaved1f1b", action=KINDS["B"])  # of as many stages
    if len(halves) == 2 and whole and whole[0].measured:
        told.append(f"a backward in two halves takes {sum(halves) / whole[0].measured:.3g} times one in one piece")
    seconds = {str(f.case["schedule"]): f.measured for f in pick(figures, "step_seconds") if f.measured}
    if seconds:
        fastest = min(seconds, key=lambda name: seconds[name])
        told.append(f"the fastest step is that of {fastest}, {seconds[fastest]:.3g} s")
    return f"Bubbles on {RANKS} ranks: {'; '.join(told)}." if told else ""


def plots(figures: list[Figure]) -> list[Plot]:
    bubbles = {
        of: {str(f.case["schedule"]): f for f in pick(figures, "bubble", **{"predicted by": of})} for of in PREDICTIONS
    }
    gaps = {c: {str(f.case["schedule"]): f for f in pick(figures, "gap", cause=c)} for c in replay.CAUSES}
    title = "What the simulation leaves out, by cause"
    return [
        *over_labels("Bubbles, measured and predicted", "share of the time", bubbles, predicted=True),
        *over_labels(title, "share of the time", gaps, kind="bars"),
    ]
