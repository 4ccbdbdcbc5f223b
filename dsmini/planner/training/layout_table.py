"""Table of all layouts that a number of GPUs allows, each with its memory and its time.

    sizes      pipeline, tensor, expert, micro_batch
    choices    schedule, ZeRO, recomputation, precision

A choice has a formula of its own, which is built once and evaluated for all sizes at once (grid.py). Sizes of which the
formula differs are groups: one, two or more stages, with and without expert parallelism. The formula with tensor
parallelism holds without it too.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.parameters import ModelFigures, model_figures
from dsmini.planner.quantities.grid import Values, evaluate_many
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.layout import Layout, Moments, Precision, Recompute, Schedule, Zero, check_layout
from dsmini.planner.training.training_plan import plan_unchecked
from dsmini.planner.training.workload import Workload

Sizes = tuple[int, int, int, int]
"""Pipeline, tensor, expert, micro_batch."""
SIZES: tuple[str, ...] = ("pipeline", "tensor", "expert", "micro_batch")
Choice = tuple[Schedule, Zero, Recompute, Precision]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Choices that a search may make."""

    schedules: tuple[Schedule, ...] = ("1f1b", "zb1p", "dualpipe")
    zeros: tuple[Zero, ...] = (0, 1, 2, 3)
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    precisions: tuple[Precision, ...] = ("bf16", "fp8")
    """Dtypes that the hardware lacks are left out."""
    moments: Moments = "float32"
    micro_batches: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Model, cluster and workload that a layout is searched for."""

    m: ModelInputs
    hardware: Hardware
    workload: Workload
    gpus: int
    choices: Choices
    assumptions: Assumptions
    held: Mapping[str, int] = field(default_factory=dict[str, int])
    """Sizes that the user chose, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutTable:
    """Best choice for each sizes: arrays of one row for each."""

    sizes: list[Sizes]
    choices: list[Choice]
    best: Values
    """Time of the fastest choice that fits; infinite where none does."""
    memory: Values
    """Memory of that choice."""
    choice: Values
    """Number of that choice."""
    fastest: Values
    """Time of the fastest choice, also where it does not fit."""
    least: Values
    """Least memory of all choices."""
    leanest: Values
    """Number of the choice with the least memory."""

    def sizes_below(self, memory: float) -> list[Sizes]:
        """Return the sizes that some choice needs at most this memory for."""
        return [sizes for sizes, least in zip(self.sizes, self.least, strict=True) if least <= memory]


def evaluate_layouts(
    problem: Problem, on_part: Callable[[float, str], None] | None = None, sizes: list[Sizes] | None = None
) -> LayoutTable:
    """Return the best choice for each sizes of parallelism; without `sizes`, for all that the GPUs allow."""
    p = problem
    model = model_figures(p.m, p.workload.seq_len)
    if sizes is None:
        found = ((each, dict(zip(SIZES, each, strict=True))) for each in all_sizes(p))
        sizes = [each for each, named in found if all(named[name] == size for name, size in p.held.items())]
    given = p.choices
    choices = list(itertools.product(given.schedules, given.zeros, given.recomputes, given.precisions))
    infinite, nothing = np.full(len(sizes), np.inf), np.zeros(len(sizes))
    table = LayoutTable(
        sizes=sizes,
        choices=choices,
        best=infinite,
        memory=infinite.copy(),
        choice=nothing,
        fastest=infinite.copy(),
        least=infinite.copy(),
        leanest=nothing.copy(),
    )
    groups = {schedule: _groups(p, schedule, sizes) for schedule in given.schedules}
    for number, choice in enumerate(choices):
        for rows in groups[choice[0]]:
            _add(p, model, table, number, rows)
        if on_part is not None:
            on_part((number + 1) / len(choices), f"{choice[0]}, ZeRO {choice[1]}, {choice[2]}, {choice[3]}")
    return table


def all_sizes(problem: Problem) -> Iterator[Sizes]:
    """Yield the sizes of parallelism that divide the GPUs, the heads, the experts and the batch."""
    config, gpus = problem.m.config, problem.gpus
    node, batch = round(problem.hardware.gpus_per_node.value), round(problem.workload.batch.value)
    moe = config.n_dense_layers < config.n_layers + config.n_mtp_layers
    for pipeline in _divisors(gpus, config.n_layers):
        for tensor in _divisors(gpus // pipeline, node):
            if config.n_heads % tensor or config.kv_heads % tensor:
                continue
            data = gpus // (pipeline * tensor)
            for expert in _divisors(gpus // pipeline, config.n_routed_experts if moe else 1):
                fills = expert % node == 0 or node % expert == 0
                for micro_batch in problem.choices.micro_batches if fills else ():
                    if config.n_routed_experts % expert == 0 and batch % (data * micro_batch) == 0:
                        yield pipeline, tensor, expert, micro_batch


def layout_of(problem: Problem, sizes: Sizes, choice: Choice) -> Layout:
    """Return a layout from its sizes and choices. Raises: ValueError for what contradicts itself."""
    (pipeline, tensor, expert, micro_batch), (schedule, zero, recompute, precision) = sizes, choice
    return Layout(
        gpus=problem.gpus,
        pipeline=pipeline,
        tensor=tensor,
        expert=expert,
        micro_batch=micro_batch,
        schedule=schedule,
        zero=zero,
        recompute=recompute,
        precision=precision,
        moments=problem.choices.moments,
    )


def _groups(problem: Problem, schedule: Schedule, sizes: list[Sizes]) -> list[list[int]]:
    """Return the rows that a schedule allows, in groups that have one formula for each choice."""
    node, batch = round(problem.hardware.gpus_per_node.value), round(problem.workload.batch.value)
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, one in enumerate(sizes):
        pipeline, _, expert, _ = one
        try:
            layout = layout_of(problem, one, (schedule, 0, "none", "bf16"))
            check_layout(layout, problem.m.config, node, batch)
        except ValueError:
            continue
        groups.setdefault((min(pipeline, 3), expert > 1), []).append(row)
    return list(groups.values())


def _add(problem: Problem, model: ModelFigures, table: LayoutTable, number: int, rows: list[int]) -> None:
    """Evaluate a choice for a group of rows, and note where it is better than those before."""
    choice, p = table.choices[number], problem
    copies = 2 if choice[0] == "dualpipe" else 1
    if choice[1]:  # ZeRO needs GPUs to divide the state over
        rows = [row for row in rows if p.gpus * copies > table.sizes[row][0] * table.sizes[row][1]]
    if not rows:
        return
    # a formula with tensor parallelism holds for tensor=1 too
    layout = layout_of(p, table.sizes[max(rows, key=lambda row: table.sizes[row][1])], choice)
    plan = plan_unchecked(p.m, p.hardware, layout, p.workload, p.assumptions, model)
    columns = np.array([table.sizes[row] for row in rows], dtype=np.float64).T
    changed: dict[str, Values] = dict(zip(SIZES, columns, strict=True))
    memory, step = evaluate_many([plan.memory_needed, plan.step.roof_step], changed)
    at = np.array(rows)
    table.fastest[at] = np.minimum(table.fastest[at], step)
    lean = memory < table.least[at]
    table.leanest[at[lean]], table.least[at[lean]] = number, memory[lean]
    tie = (step == table.best[at]) & (memory < table.memory[at])
    better = (memory <= p.hardware.memory.value) & ((step < table.best[at]) | tie)
    table.best[at[better]], table.memory[at[better]] = step[better], memory[better]
    table.choice[at[better]] = number


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
