"""Search for layouts: which divisions of a number of GPUs fit a model in their memory, and which is fastest.

layout_table.py evaluates all sizes of parallelism with all choices of schedule, ZeRO, recomputation and precision. For
each sizes the fastest choice that fits remains.

Worked example, DeepSeek-V3 on 2048 H800 with BF16 moments: 35,000 layouts in 2 seconds. The fastest has 32 stages and
experts over 16 GPUs, 19.3 s a step; the published one, 16 stages and experts over 64, takes 20.0 s and is the ninth.

Estimates: the time is that of step.py. Memory is a lower bound: a layout that fills it will not run.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.display import rounded
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import BYTES
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.layout import DTYPES, Layout
from dsmini.planner.training.layout_table import Choices, LayoutTable, Problem, evaluate_layouts, layout_of
from dsmini.planner.training.step import StepFigures
from dsmini.planner.training.training_plan import TrainingPlan, training_plan
from dsmini.planner.training.workload import Workload

BINDS = ("compute", "links between nodes", "links within a node", "bubble", "update")
"""Parts that keep a layout from being faster, in the order of StepFigures.without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout that fits."""

    layout: Layout
    plan: TrainingPlan
    binds: str
    """One of BINDS, or "memory"."""
    memory_costs: float
    """Seconds by which another choice would be faster at the same sizes, if it fitted."""


def search(
    m: ModelInputs,
    hardware: Hardware,
    workload: Workload,
    gpus: int,
    *,
    choices: Choices | None = None,
    assumptions: Assumptions | None = None,
    most: int = 12,
    on_part: Callable[[float, str], None] | None = None,
) -> list[Candidate]:
    """Return the fastest layouts that fit, each with its plan, fastest first; one for each sizes of parallelism.

    Raises: ValueError if no layout fits, with what would fit: other choices, or a number of GPUs.
    """
    given = choices or Choices()
    precisions = tuple(p for p in given.precisions if DTYPES[p] in hardware.peaks)
    if not precisions:
        raise ValueError(f"{hardware.title} has no units for {', '.join(given.precisions)}; allow another precision")
    problem = Problem(
        m=m,
        hardware=hardware,
        workload=workload,
        gpus=gpus,
        choices=replace(given, precisions=precisions),
        assumptions=assumptions or Assumptions.of(),
    )
    table = evaluate_layouts(problem, on_part)
    rows = np.lexsort((table.memory, table.best))[:most]
    rows = [int(row) for row in rows if np.isfinite(table.best[row])]
    if not rows:
        raise ValueError(what_would_fit(problem, table))
    return [_candidate(problem, table, row) for row in rows]


def allowed_choices(layout: Layout, given: Mapping[str, Any]) -> Choices:
    """Return the choices of a search in which those that the user made are held; optimizer states count as AdamW's."""
    every = Choices()

    def of(name: str, all_: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[name],) if name in given else all_

    return Choices(
        schedules=of("schedule", every.schedules),
        zeros=of("zero", every.zeros),
        recomputes=of("recompute", every.recomputes),
        precisions=of("precision", (layout.precision,) if layout.precision == "fp32" else every.precisions),
        micro_batches=of("micro_batch", every.micro_batches),
        moments=layout.moments,
    )


def what_would_fit(problem: Problem, table: LayoutTable) -> str:
    """Return one sentence for a problem that no layout fits: the least memory there is, and what would fit."""
    capacity, gpus = rounded(problem.hardware.memory), problem.gpus
    if not np.isfinite(table.least).any():
        return (
            f"gpus={gpus} allow no layout for a step of batch={problem.workload.batch.value:.0f} sequences; "
            "use a batch that the GPUs divide"
        )
    row = int(np.argmin(table.least))
    layout = layout_of(problem, table.sizes[row], table.choices[int(table.leanest[row])])
    needs = (
        f"no layout on gpus={gpus} fits {capacity} a GPU: the smallest needs "
        f"{rounded(BYTES(float(table.least[row])))}, with pipeline={layout.pipeline}, tensor={layout.tensor}, "
        f"expert={layout.expert}, zero={layout.zero}, recompute={layout.recompute!r}, precision={layout.precision!r}"
    )
    return f"{needs}; {' or '.join(_remedies(problem)) or 'use hardware with more memory'}"


def most_gpus(hardware: Hardware) -> float:
    """Return the most GPUs that the hardware's links connect."""
    if hardware.slow_link is not None:
        return math.inf
    return 1 if hardware.fast_link is None else hardware.gpus_per_node.value


def _remedies(problem: Problem) -> Iterator[str]:
    """Yield what would make some layout fit: a choice that was not allowed, more GPUs, or with them a larger batch."""
    every, given, p = Choices(), problem.choices, problem
    freed: list[tuple[str, Problem]] = [
        ("allow ZeRO 3", replace(p, choices=replace(given, zeros=every.zeros))),
        ("allow recomputation", replace(p, choices=replace(given, recomputes=every.recomputes))),
        ("use moments='bfloat16'", replace(p, choices=replace(given, moments="bfloat16"))),
    ]
    if "fp8" in p.hardware.peaks:
        freed.append(("allow precision='fp8'", replace(p, choices=replace(given, precisions=("fp8",)))))
    for name in p.held:
        freed.append((f"leave out {name}", replace(p, held={n: size for n, size in p.held.items() if n != name})))
    for remedy, other in freed:
        if other != p and _fits(other):
            yield remedy
    batch = round(p.workload.batch.value)
    factors = [2**i for i in range(1, 21) if 2**i * p.gpus <= most_gpus(p.hardware)]
    most, text = batch * p.m.n_layers.value, "use gpus={}"
    more = [(text.format(f * p.gpus), replace(p, gpus=f * p.gpus)) for f in factors if f * p.gpus <= most]
    larger = [(f, replace(p.workload, batch=f * p.workload.batch)) for f in factors]
    text += " and batch={}"
    more += [(text.format(f * p.gpus, f * batch), replace(p, gpus=f * p.gpus, workload=w)) for f, w in larger]
    yield from itertools.islice((remedy for remedy, other in more if _fits(other)), 1)


def _fits(problem: Problem) -> bool:
    """Return True if some layout fits, by the choices that need least memory."""
    given = problem.choices
    zeros = tuple({min(given.zeros), max(given.zeros)})  # from 1 on they need GPUs that divide a batch
    least = replace(given, zeros=zeros, recomputes=given.recomputes[-1:], precisions=given.precisions[-1:])
    return bool(np.isfinite(evaluate_layouts(replace(problem, choices=least)).best).any())


def _candidate(problem: Problem, table: LayoutTable, row: int) -> Candidate:
    layout = layout_of(problem, table.sizes[row], table.choices[int(table.choice[row])])
    plan = training_plan(problem.m, problem.hardware, layout, problem.workload, problem.assumptions)
    costs = float(table.best[row] - table.fastest[row])
    return Candidate(layout=layout, plan=plan, binds=binds(plan.step, costs), memory_costs=costs)


def binds(step: StepFigures, memory_costs: float = 0.0) -> str:
    """Return what gains most if it took no time, or "memory" if its limit costs more than any part but computing."""
    gains = dict(zip(BINDS, (step.roof_step.value - left.value for left in step.without), strict=True))
    others = max(gain for name, gain in gains.items() if name != BINDS[0])
    return "memory" if memory_costs > others else max(BINDS, key=lambda name: gains[name])
