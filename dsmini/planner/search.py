"""Layouts for a number of GPUs: which fit a model in their memory, which is fastest, and what would fit if none does.

    sizes      pipeline, tensor, expert, micro_batch
    choices    schedule, ZeRO, recomputation, precision

The formulas of training.py are evaluated for all sizes at once, as arrays, once for each choice and group of sizes
for which they differ: one, two or more stages, with and without expert parallelism. For each sizes the fastest choice
that fits remains. So a search cannot differ from the plans that it finds.

Where the user leaves the layout open it is the fastest of a short list that fits, on the fewest GPUs: 1, 2, 4, ... up
to a node, then 1, 2, 4, ... nodes. If none fits, it is the one that needs least memory, with what would fit.

Worked example, DeepSeek-V3 on 2048 H800 with BF16 moments: 35,000 layouts in 2 seconds. The published one, 16 stages
and experts over 64 GPUs, is within 5 % of the fastest.

Estimates: the time is that of training.py. Memory is a lower bound: a layout that fills it will not run.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmini.accounting.activations import Recompute
from dsmini.config import ModelConfig
from dsmini.planner.display import in_unit
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import Hardware
from dsmini.planner.layout import DTYPES, Layout, Precision, Schedule, Zero, check_layout
from dsmini.planner.model import model_figures
from dsmini.planner.training import WITHOUT, training_figures

OnPart = Callable[[float, str], None]
Values = npt.NDArray[np.float64]
Sizes = tuple[int, int, int, int]
"""Pipeline, tensor, expert, micro_batch."""
SIZES: tuple[str, ...] = ("pipeline", "tensor", "expert", "micro_batch")
Choice = tuple[Schedule, Zero, Recompute, Precision]
LEAST_STATE = 8.0
"""Bytes of training state that a parameter has at least, with which the search for enough GPUs begins."""
MOST_GPUS = 2**20
SLACK = 1.5
"""Memory that sizes may need with the leanest choice, over what there is: for some sizes another choice is leaner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Choices that a search may make. Precisions that the hardware lacks are left out."""

    schedules: tuple[Schedule, ...] = ("1f1b", "zb1p", "dualpipe")
    zeros: tuple[Zero, ...] = (0, 1, 2, 3)
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    precisions: tuple[Precision, ...] = ("bf16", "fp8")
    micro_batches: tuple[int, ...] = (1, 2, 4)

    def held(self, given: Mapping[str, Any]) -> "Choices":
        """Return these choices, in which those that the user made are the only ones."""
        names = {"schedule": "schedules", "zero": "zeros", "recompute": "recomputes", "precision": "precisions"}
        names["micro_batch"] = "micro_batches"
        return replace(self, **{many: (given[one],) for one, many in names.items() if one in given})


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Model, cluster and workload that a layout is searched for."""

    config: ModelConfig
    hardware: Hardware
    batch: int
    seq_len: int
    state: Layout
    """Layout with the optimizer, its moments, and the precision where the user leaves it open."""
    gpus: int = 1
    choices: Choices = field(default_factory=Choices)
    held: Mapping[str, int] = field(default_factory=dict[str, int])
    """Sizes that the user chose, by name."""

    def sheet(self) -> Sheet:
        """Return a sheet of plain numbers with the model, the hardware and the workload."""
        s = Sheet(explained=False)
        self.hardware.put(s)
        s.put("batch", self.batch, "")
        s.put("seq_len", self.seq_len, "")
        model_figures(s, self.config)
        return s

    def layout(self, sizes: Sizes, choice: Choice) -> Layout:
        """Return a layout from its sizes and choices. Raises: ValueError for what contradicts itself."""
        (pipeline, tensor, expert, micro_batch), (schedule, zero, recompute, precision) = sizes, choice
        named: dict[str, Any] = {"pipeline": pipeline, "tensor": tensor, "expert": expert, "micro_batch": micro_batch}
        named |= {"schedule": schedule, "zero": zero, "recompute": recompute, "precision": precision}
        return replace(self.state, gpus=self.gpus, **named)

    def check(self, layout: Layout) -> None:
        """Raise ValueError for a layout that the model, the nodes or the batch cannot have."""
        check_layout(layout, self.config, round(self.hardware.value("gpus_per_node")), self.batch)

    def planned(self, layout: Layout) -> Sheet:
        """Return the training figures of one layout as plain numbers. Raises: ValueError as a plan does."""
        self.check(layout)
        s = self.sheet()
        for name in ("gpus", *SIZES):
            s.put(name, getattr(layout, name), "")
        training_figures(s, self.config, self.hardware, layout)
        return s


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Time and memory of all layouts: arrays [choice, sizes], infinite where there is no such layout."""

    problem: Problem
    sizes: list[Sizes]
    choices: list[Choice]
    time: Values
    memory: Values

    @property
    def fitting(self) -> Values:
        """Time of what fits; infinite elsewhere."""
        return np.where(self.memory <= self.problem.hardware.value("gpu_memory"), self.time, np.inf)

    def layout(self, choice: int, row: int) -> Layout:
        """Return the layout of a place in the arrays."""
        return self.problem.layout(self.sizes[row], self.choices[choice])


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout that fits."""

    layout: Layout
    memory: float
    step: float
    """Seconds of a step from its parts."""
    flops: float
    """Operations of a GPU in a step, which a utilization counts."""
    binds: str
    """Part that gains most if it took no time, or "memory" if its limit costs more than any part but computing."""


def search(problem: Problem, most: int = 12, on_part: OnPart | None = None) -> list[Candidate]:
    """Return the fastest layouts that fit, fastest first; one for each sizes of parallelism.

    Raises: ValueError if no layout fits, with what would fit: other choices, or a number of GPUs.
    """
    wanted, peaks = problem.choices.precisions, problem.hardware.peaks
    precisions = tuple(p for p in wanted if DTYPES[p] in peaks)
    if not precisions:
        raise ValueError(f"{problem.hardware.title} has no units for {', '.join(wanted)}; allow another precision")
    problem = replace(problem, choices=replace(problem.choices, precisions=precisions))
    table = evaluate(problem, on_part)
    fitting = table.fitting
    if not np.isfinite(fitting).any():
        raise ValueError(what_would_fit(table))
    rows = np.arange(len(table.sizes))
    choice = np.lexsort((table.memory, fitting), axis=0)[0]  # of equal times the one with less memory
    best = fitting[choice, rows]
    order = [row for row in np.lexsort((table.memory[choice, rows], best))[:most] if np.isfinite(best[row])]
    costs = {row: float(best[row] - table.time[:, row].min()) for row in order}
    return [_candidate(problem, table.layout(choice[row], row), costs[row]) for row in order]


def _candidate(problem: Problem, layout: Layout, costs: float) -> Candidate:
    """Return a layout with what binds it; `costs` are the seconds that the limit of memory costs at its sizes."""
    s = problem.planned(layout)
    gains = {words: float(s.roof_step_seconds - getattr(s, f"step_without_{part}")) for part, words in WITHOUT.items()}
    others = max(gain for words, gain in gains.items() if words != "compute")
    return Candidate(
        layout=layout,
        memory=float(s.memory_needed),
        step=float(s.roof_step_seconds),
        flops=float(s.training_flops * s.batch * s.seq_len / layout.gpus),
        binds="memory" if costs > others else max(gains, key=lambda words: gains[words]),
    )


# --- all layouts at once


def evaluate(problem: Problem, on_part: OnPart | None = None, sizes: list[Sizes] | None = None) -> Table:
    """Return the time and the memory of all choices; without `sizes`, for all sizes that the GPUs allow."""
    if sizes is None:
        sizes = [each for each in all_sizes(problem) if _held(problem, each)]
    given = problem.choices
    choices = list(itertools.product(given.schedules, given.zeros, given.recomputes, given.precisions))
    time, memory = (np.full((len(choices), len(sizes)), np.inf) for _ in range(2))
    base = problem.sheet()
    groups = {schedule: _groups(problem, schedule, sizes) for schedule in given.schedules}
    for number, choice in enumerate(choices):
        for rows in groups[choice[0]]:
            copies = 2 if choice[0] == "dualpipe" else 1
            if choice[1]:  # ZeRO needs GPUs to divide the state over
                rows = [row for row in rows if problem.gpus * copies > sizes[row][0] * sizes[row][1]]
            if rows:
                s = _planned(problem, base, [sizes[row] for row in rows], choice)
                time[number, rows], memory[number, rows] = s.roof_step_seconds, s.memory_needed
        if on_part is not None:
            on_part((number + 1) / len(choices), f"{choice[0]}, ZeRO {choice[1]}, {choice[2]}, {choice[3]}")
    return Table(problem=problem, sizes=sizes, choices=choices, time=time, memory=memory)


def _planned(problem: Problem, base: Sheet, sizes: list[Sizes], choice: Choice) -> Sheet:
    """Return the training figures of a choice for several sizes that have one formula, as arrays."""
    # a formula with tensor parallelism holds for tensor=1 too, and one with several nodes for one
    layout, s = problem.layout(max(sizes, key=lambda each: each[1]), choice), base.copy()
    s.put("gpus", problem.gpus, "")
    for name, column in zip(SIZES, np.array(sizes, dtype=np.float64).T, strict=True):
        s.put(name, column, "")
    training_figures(s, problem.config, problem.hardware, layout)
    return s


def all_sizes(problem: Problem) -> Iterator[Sizes]:
    """Yield the sizes of parallelism that divide the GPUs, the heads, the experts and the batch."""
    config, gpus, batch = problem.config, problem.gpus, problem.batch
    node = round(problem.hardware.value("gpus_per_node"))
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


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _held(problem: Problem, sizes: Sizes) -> bool:
    named = dict(zip(SIZES, sizes, strict=True))
    return all(named[name] == size for name, size in problem.held.items())


def _groups(problem: Problem, schedule: Schedule, sizes: list[Sizes]) -> list[list[int]]:
    """Return the rows that a schedule allows, in groups that have one formula for each choice."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, one in enumerate(sizes):
        try:
            problem.check(problem.layout(one, (schedule, 0, "none", "bf16")))
        except ValueError:
            continue
        groups.setdefault((min(one[0], 3), one[2] > 1), []).append(row)
    return list(groups.values())


# --- the layout that a user leaves open


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A layout or a deployment, and how it was chosen, in words."""

    made: Any
    how: str
    misfit: str = ""
    """One sentence for what does not fit, with what would; "" for what fits."""


def choose_layout(problem: Problem, given: Mapping[str, Any], preset: Mapping[str, Any], how: str) -> Chosen:
    """Return the layout with the given fields, and what is best for the others.

    Args:
        problem: with the numbers of GPUs, choices and sizes still open.
        preset: layout of a published run of this model; empty for other models.
        how: words for that.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch.
    """
    if preset and (layout := _published(problem, preset, given)):
        but = ", ".join(f"{name}={value}" for name, value in given.items())
        return Chosen(made=layout, how=f"{how}{but and f', but {but}'}")
    held = {name: given[name] for name in SIZES if name in given}
    lean = table = None
    for gpus in [given["gpus"]] if "gpus" in given else _gpu_counts(problem, given):
        lean = replace(problem, gpus=gpus, held=held, choices=_leanest(problem.state, given, gpus))
        table = evaluate(lean)
        most = SLACK * problem.hardware.value("gpu_memory")
        hopeful = [table.sizes[row] for row in np.flatnonzero((table.memory <= most).any(axis=0))]
        for choices in _lists(problem.state, given) if hopeful else ():
            found = evaluate(replace(lean, choices=choices), sizes=hopeful)
            if np.isfinite(found.fitting).any():
                fewest = "" if "gpus" in given else ", on the fewest GPUs"
                best = found.layout(*_smallest(found.fitting, found.memory))
                return Chosen(made=best, how=f"the fastest of a short list that fits{fewest}")
    assert lean is not None and table is not None, "there is at least one GPU"
    if not np.isfinite(table.memory).any():
        problem.check(replace(problem.state, **{"gpus": _least_gpus(given)} | dict(given)))  # raises what contradicts
        raise ValueError(what_would_fit(table))
    how = "the one that needs least memory, since none fits"
    return Chosen(made=table.layout(*_smallest(table.memory, table.memory)), how=how, misfit=what_would_fit(table))


def _smallest(values: Values, memory: Values) -> tuple[int, int]:
    """Return the choice and the row of the smallest value; of equal ones those of least memory, then of first sizes."""
    row, choice = np.unravel_index(np.lexsort((memory.T.ravel(), values.T.ravel()))[0], values.T.shape)
    return int(choice), int(row)


def _published(problem: Problem, preset: Mapping[str, Any], given: Mapping[str, Any]) -> Layout | None:
    """Return a published layout with the given fields, or None where they or the hardware do not go with it."""
    precision = "fp8" if "fp8" in problem.hardware.peaks else problem.state.precision
    if not problem.hardware.networked:
        return None
    try:
        fields: dict[str, Any] = {"precision": precision, **preset, **given}
        layout = Layout(**fields)
        needed = problem.planned(layout).memory_needed
    except ValueError:
        return None
    return layout if needed <= problem.hardware.value("gpu_memory") else None


def _least_gpus(given: Mapping[str, Any]) -> int:
    """Return the fewest GPUs that the given sizes divide."""
    return given.get("pipeline", 1) * math.lcm(given.get("tensor", 1), given.get("expert", 1))


def _gpu_counts(problem: Problem, given: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of GPUs to try, from the first that might hold the training state.

    The given sizes divide them, and a step has a sequence for each pipeline stage and part of the batch.
    """
    config, least = problem.config, _least_gpus(given)
    node, memory = (round(problem.hardware.value(name)) for name in ("gpus_per_node", "gpu_memory"))
    most = min(MOST_GPUS, most_gpus(problem.hardware), problem.batch * given.get("tensor", node))
    counts = [2**i for i in range(node.bit_length()) if 2**i < node]
    counts += [node * 2**i for i in range(MOST_GPUS.bit_length())]
    experts = (config.n_layers + config.n_mtp_layers - config.n_dense_layers) * config.n_routed_experts
    allowed = sorted({count for each in counts if (count := math.lcm(each, least)) <= most}) or [least]
    state = experts * 3 * config.dim * config.moe_inter_dim * LEAST_STATE
    yield from [count for count in allowed if count * memory >= state] or allowed[-1:]


def _lists(state: Layout, given: Mapping[str, Any]) -> list[Choices]:
    """Return the short list of choices, and the longer one."""
    every = Choices(schedules=("1f1b", "dualpipe"), precisions=(state.precision,), micro_batches=(1,))
    short = replace(every, zeros=(0, 1), recomputes=("none", "selective"))
    longer = replace(every, zeros=(0, 1, 3), recomputes=("selective", "full"))
    return [short.held(given), longer.held(given)]


def _leanest(state: Layout, given: Mapping[str, Any], gpus: int) -> Choices:
    """Return the choices that need least memory, by which numbers of GPUs that are too few are left out early.

    ZeRO 0 is one of them, since other stages need GPUs that divide a batch.
    """
    longer = _lists(state, given)[-1]
    zeros = (longer.zeros[0], longer.zeros[-1]) if gpus > 1 and len(longer.zeros) > 1 else longer.zeros[:1]
    return replace(longer, schedules=longer.schedules[:1], zeros=zeros, recomputes=longer.recomputes[-1:])


# --- what would fit


def most_gpus(hardware: Hardware) -> float:
    """Return the most GPUs that the hardware's links connect."""
    return math.inf if hardware.networked else hardware.node


def what_would_fit(table: Table) -> str:
    """Return one sentence for a problem that no layout fits: the least memory there is, and what would fit."""
    problem = table.problem
    gpus, memory = problem.gpus, problem.hardware.value("gpu_memory")
    if not np.isfinite(table.memory).any():
        return (
            f"gpus={gpus} allow no layout for a step of batch={problem.batch} sequences; "
            "use a batch that the GPUs divide"
        )
    layout = table.layout(*_smallest(table.memory, table.memory))
    needs = (
        f"no layout on gpus={gpus} fits {in_unit(memory, 'B')} a GPU: the smallest needs "
        f"{in_unit(float(table.memory.min()), 'B')}, with pipeline={layout.pipeline}, tensor={layout.tensor}, "
        f"expert={layout.expert}, zero={layout.zero}, recompute={layout.recompute!r}, precision={layout.precision!r}"
    )
    return f"{needs}; {' or '.join(_remedies(problem)) or 'use hardware with more memory'}"


def _remedies(problem: Problem) -> Iterator[str]:
    """Yield what would make some layout fit: a choice that was not allowed, more GPUs, or with them a larger batch."""
    every, given, p = Choices(), problem.choices, problem
    freed: list[tuple[str, Problem]] = [
        ("allow ZeRO 3", replace(p, choices=replace(given, zeros=every.zeros))),
        ("allow recomputation", replace(p, choices=replace(given, recomputes=every.recomputes))),
        ("use moments='bfloat16'", replace(p, state=replace(p.state, moments="bfloat16"))),
    ]
    if "fp8" in p.hardware.peaks:
        freed.append(("allow precision='fp8'", replace(p, choices=replace(given, precisions=("fp8",)))))
    for name in p.held:
        freed.append((f"leave out {name}", replace(p, held={n: size for n, size in p.held.items() if n != name})))
    for remedy, other in freed:
        if other != p and _fits(other):
            yield remedy
    factors = [2**i for i in range(1, 21) if 2**i * p.gpus <= most_gpus(p.hardware)]
    most, words = p.batch * p.config.n_layers, "use gpus={}"
    more = [(words.format(f * p.gpus), replace(p, gpus=f * p.gpus)) for f in factors if f * p.gpus <= most]
    words += " and batch={}"
    more += [(words.format(f * p.gpus, f * p.batch), replace(p, gpus=f * p.gpus, batch=f * p.batch)) for f in factors]
    yield from itertools.islice((remedy for remedy, other in more if _fits(other)), 1)


def _fits(problem: Problem) -> bool:
    """Return True if some layout fits, by the choices that need least memory."""
    given = problem.choices
    zeros = tuple({min(given.zeros), max(given.zeros)})  # from 1 on they need GPUs that divide a batch
    least = replace(given, zeros=zeros, recomputes=given.recomputes[-1:], precisions=given.precisions[-1:])
    return bool(np.isfinite(evaluate(replace(problem, choices=least)).fitting).any())
