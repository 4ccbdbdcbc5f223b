"""Search for layouts: which divisions of a number of GPUs fit a model in their memory, and which is fastest.

layout_table.py evaluates all sizes of parallelism with all choices of schedule, ZeRO, recomputation and precision. For
each sizes the fastest choice that fits remains.

Worked example, DeepSeek-V3 on 2048 H800 with BF16 moments: 35,000 layouts in 2 seconds. The fastest has 32 stages and
experts over 16 GPUs, 19.3 s a step; the published one, 16 stages and experts over 64, takes 20.0 s and is the ninth.

Estimates: the time is that of step.py. Memory is a lower bound: a layout that fills it will not run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.layout import DTYPES, Layout
from dsmini.planner.training.layout_table import Choices, LayoutTable, Problem, evaluate_layouts, layout_of
from dsmini.planner.training.step import StepFigures
from dsmini.planner.training.training_plan import TrainingPlan, training_plan
from dsmini.planner.training.workload import Workload

Binding = Literal["compute", "all-to-all", "bubble", "memory", "gradients", "tensor"]
"""Part of the hardware or the layout that keeps a layout from being faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout that fits."""

    layout: Layout
    plan: TrainingPlan
    binds: Binding
    """Longest part of the step; "memory" if the memory's limit costs more than each part but computing."""
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
    most: int = 10,
    on_part: Callable[[float, str], None] | None = None,
) -> list[Candidate]:
    """Return the fastest layouts that fit, each with its plan, fastest first; one for each sizes of parallelism.

    Args:
        most: number of layouts to return.
        on_part: is told the share that is done and a short text, now and then.

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


def what_would_fit(problem: Problem, table: LayoutTable) -> str:
    """Return one sentence for a problem that no layout fits: the least memory there is, and what would fit."""
    capacity, gpus = problem.hardware.memory.value, problem.gpus
    if not np.isfinite(table.least).any():
        return (
            f"gpus={gpus} allow no layout for a step of batch={problem.workload.batch.value:.0f} sequences; "
            "use a batch that the GPUs divide"
        )
    row = int(np.argmin(table.least))
    layout = layout_of(problem, table.sizes[row], table.choices[int(table.leanest[row])])
    needs = (
        f"no layout on gpus={gpus} fits {capacity / 1e9:.0f} GB a GPU: the smallest needs "
        f"{table.least[row] / 1e9:.0f} GB, with pipeline={layout.pipeline}, tensor={layout.tensor}, "
        f"expert={layout.expert}, zero={layout.zero}, recompute={layout.recompute!r}, precision={layout.precision!r}"
    )
    return f"{needs}; {' or '.join(_remedies(problem)) or 'use hardware with more memory'}"


def _remedies(problem: Problem) -> Iterator[str]:
    """Yield what would make some layout fit: a choice that was not allowed, or more GPUs."""
    every, given = Choices(), problem.choices
    freed: list[tuple[str, Choices]] = [
        ("allow ZeRO 3", replace(given, zeros=every.zeros)),
        ("allow recomputation", replace(given, recomputes=every.recomputes)),
        ("use moments='bfloat16'", replace(given, moments="bfloat16")),
    ]
    if "fp8" in problem.hardware.peaks:
        freed.append(("allow precision='fp8'", replace(given, precisions=("fp8",))))
    for remedy, choices in freed:
        if choices != given and _fits(replace(problem, choices=choices)):
            yield remedy
    gpus = 2 * problem.gpus
    while gpus <= problem.workload.batch.value * problem.m.n_layers.value:
        if _fits(replace(problem, gpus=gpus)):
            yield f"use gpus={gpus}"
            return
        gpus *= 2


def _fits(problem: Problem) -> bool:
    """Return True if some layout fits, by the choices that need least memory."""
    given = problem.choices
    least = replace(
        given, zeros=(max(given.zeros),), recomputes=given.recomputes[-1:], precisions=given.precisions[-1:]
    )
    return bool(np.isfinite(evaluate_layouts(replace(problem, choices=least)).best).any())


def _candidate(problem: Problem, table: LayoutTable, row: int) -> Candidate:
    layout = layout_of(problem, table.sizes[row], table.choices[int(table.choice[row])])
    plan = training_plan(problem.m, problem.hardware, layout, problem.workload, problem.assumptions)
    costs = float(table.best[row] - table.fastest[row])
    return Candidate(layout=layout, plan=plan, binds=binding(plan.step, layout, costs), memory_costs=costs)


def binding(step: StepFigures, layout: Layout, memory_costs: float = 0.0) -> Binding:
    """Return what binds a step; a pair of DualPipe that waits for its rows counts as all-to-all."""
    ratio = step.compute_to_dispatch
    waits = layout.schedule == "dualpipe" and ratio is not None and ratio.value < 1
    parts: dict[Binding, float] = {
        "all-to-all": step.dispatching.value + step.computing.value * waits,
        "bubble": step.bubble.value,
        "gradients": step.exchange.value + step.update.value,
        "tensor": step.reducing.value,
    }
    longest = max(parts, key=lambda part: parts[part])
    if memory_costs > parts[longest]:
        return "memory"
    return longest if waits or parts[longest] > step.computing.value else "compute"
