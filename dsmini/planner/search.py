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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmini.config import ModelConfig
from dsmini.planner.display import in_unit
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import Hardware, OnPart, quiet
from dsmini.planner.model import model_figures
from dsmini.planner.request import DTYPES, Layout, check_layout, divisors
from dsmini.planner.training import WITHOUT, training_figures

Values = npt.NDArray[np.float64]
SIZES = ("pipeline", "tensor", "expert", "micro_batch")
CHOICES = ("schedule", "zero", "recompute", "precision")
Options = Mapping[str, tuple[Any, ...]]
"""Values of the fields of a layout that may be taken, those first that need more memory; of a size that is not in it,
all that divide the GPUs."""
EVERY: Options = {
    "micro_batch": (1, 2, 4),
    "schedule": ("1f1b", "zb1p", "dualpipe"),
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"),
    "precision": ("bf16", "fp8"),
}
SHORT: Options = {
    "micro_batch": (1,),
    "schedule": ("1f1b", "dualpipe"),
    "zero": (0, 1),
    "recompute": ("none", "selective"),
}
"""Options of a layout that the user leaves open, and those that need less memory."""
LONGER: Options = {**SHORT, "zero": (0, 1, 3), "recompute": ("selective", "full")}
LEAST_STATE = 8.0
"""Bytes of training state that a parameter has at least, with which the search for enough GPUs begins."""
MOST_GPUS = 2**20
SLACK = 1.5
"""Memory that sizes may need with the leanest choice, over what there is: for some sizes another choice is leaner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Model, cluster and workload that a layout is searched for."""

    config: ModelConfig
    hardware: Hardware
    batch: int
    seq_len: int
    state: Layout
    """Layout with the optimizer, its moments, and the precision where the user leaves it open."""
    options: Options

    def of(self, **options: tuple[Any, ...]) -> "Problem":
        """Return the problem with some options in place of its own."""
        return replace(self, options={**self.options, **options})

    def lean(self) -> "Problem":
        """Return the problem with the options that need least memory; ZeRO also 0, since 1 to 3 divide a batch."""
        given = self.options
        zeros = tuple(dict.fromkeys((given["zero"][0], given["zero"][-1])))
        least = {"recompute": given["recompute"][-1:], "precision": given["precision"][-1:]}
        return self.of(schedule=given["schedule"][:1], zero=zeros, **least)

    @property
    def gpus(self) -> int:
        """Number of GPUs, where only one is left."""
        return self.options["gpus"][0]

    @property
    def most_gpus(self) -> float:
        """Most GPUs that the hardware's links connect."""
        return math.inf if self.hardware.networked else self.hardware.node

    def sheet(self) -> Sheet:
        """Return a sheet of plain numbers with the model, the hardware and the workload."""
        s = Sheet(explained=False)
        self.hardware.put(s)
        s.put("batch", self.batch, "")
        s.put("seq_len", float(self.seq_len), "")  # not whole: means are not rounded
        model_figures(s, self.config)
        return s

    def layout(self, sizes: tuple[int, ...], choice: tuple[Any, ...]) -> Layout:
        """Return a layout from its sizes and choices. Raises: ValueError for what contradicts itself."""
        return replace(self.state, gpus=self.gpus, **dict(zip((*SIZES, *CHOICES), (*sizes, *choice), strict=True)))

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
    sizes: list[tuple[int, ...]]
    """Pipeline, tensor, expert and micro-batch."""
    choices: list[tuple[Any, ...]]
    """Schedule, ZeRO, recomputation and precision."""
    time: Values
    memory: Values

    @property
    def fitting(self) -> Values:
        """Time of what fits; infinite elsewhere."""
        return np.where(self.memory <= self.problem.hardware.value("gpu_memory"), self.time, np.inf)

    def smallest(self, values: Values) -> Layout:
        """Return the layout of the smallest value; of equal ones those of least memory, then of first sizes."""
        order = np.lexsort((self.memory.T.ravel(), values.T.ravel()))
        row, choice = divmod(int(order[0]), len(self.choices))
        return self.problem.layout(self.sizes[row], self.choices[choice])


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout that fits."""

    layout: Layout
    memory: float
    step_seconds: float
    """Seconds of a step from its parts."""
    utilization: float
    """Share of the peak of BF16, or FP32 where products are."""
    binds: str
    """Part that gains most if it took no time, or "memory" if its limit costs more than any part but computing."""


def search(problem: Problem, most: int = 12, on_part: OnPart = quiet) -> list[Candidate]:
    """Return the fastest layouts that fit, fastest first; one for each sizes of parallelism.

    Raises: ValueError if no layout fits, with what would fit: other choices, or a number of GPUs.
    """
    wanted, peaks = problem.options["precision"], problem.hardware.peaks
    precisions = tuple(p for p in wanted if DTYPES[p] in peaks)
    if not precisions:
        raise ValueError(f"{problem.hardware.title} has no units for {', '.join(wanted)}; allow another precision")
    table = evaluate(problem.of(precision=precisions), on_part)
    fitting = table.fitting
    if not np.isfinite(fitting).any():
        raise ValueError(what_would_fit(table))
    rows = np.arange(len(table.sizes))
    choice = np.lexsort((table.memory, fitting), axis=0)[0]  # of equal times the one with less memory
    best = fitting[choice, rows]
    order = [row for row in np.lexsort((table.memory[choice, rows], best))[:most] if np.isfinite(best[row])]
    layouts = {row: problem.layout(table.sizes[row], table.choices[choice[row]]) for row in order}
    return [_candidate(problem, layouts[row], float(best[row] - table.time[:, row].min())) for row in order]


def _candidate(problem: Problem, layout: Layout, costs: float) -> Candidate:
    """Return a layout with what binds it; `costs` are the seconds that the limit of memory costs at its sizes."""
    s = problem.planned(layout)
    gains = {words: float(s.roof_step_seconds - getattr(s, f"step_without_{part}")) for part, words in WITHOUT.items()}
    others = max(gain for words, gain in gains.items() if words != "compute")
    peak = problem.hardware.value("peak_float32" if layout.precision == "fp32" else "peak_bfloat16")
    flops = s.training_flops * s.batch * s.seq_len / layout.gpus
    return Candidate(
        layout=layout,
        memory=float(s.memory_needed),
        step_seconds=float(s.roof_step_seconds),
        utilization=float(flops) / peak / float(s.roof_step_seconds),
        binds="memory" if costs > others else max(gains, key=lambda words: gains[words]),
    )


# --- all layouts at once


def evaluate(problem: Problem, on_part: OnPart = quiet, sizes: list[tuple[int, ...]] | None = None) -> Table:
    """Return the time and the memory of all choices; without `sizes`, for all sizes that the GPUs allow."""
    sizes = list(all_sizes(problem)) if sizes is None else sizes
    choices = list(itertools.product(*(problem.options[name] for name in CHOICES)))
    time, memory = (np.full((len(choices), len(sizes)), np.inf) for _ in range(2))
    base, groups = problem.sheet(), {name: _groups(problem, name, sizes) for name in problem.options["schedule"]}
    for number, choice in enumerate(choices):
        schedule, zero, *_ = choice
        copies = 2 if schedule == "dualpipe" else 1
        for rows in groups[schedule]:
            if zero:  # which needs GPUs to divide the state over
                rows = [row for row in rows if problem.gpus * copies > sizes[row][0] * sizes[row][1]]
            if rows:
                s = _planned(problem, base, [sizes[row] for row in rows], choice)
                time[number, rows], memory[number, rows] = s.roof_step_seconds, s.memory_needed
        on_part((number + 1) / len(choices), f"{schedule}, ZeRO {', '.join(map(str, choice[1:]))}")
    return Table(problem=problem, sizes=sizes, choices=choices, time=time, memory=memory)


def _planned(problem: Problem, base: Sheet, sizes: list[tuple[int, ...]], choice: tuple[Any, ...]) -> Sheet:
    """Return the training figures of a choice for several sizes that have one formula, as arrays."""
    # a formula with tensor parallelism holds for tensor=1 too, and one with several nodes for one
    layout, s = problem.layout(max(sizes, key=lambda each: each[1]), choice), base.copy()
    s.put("gpus", problem.gpus, "")
    for name, column in zip(SIZES, np.array(sizes, dtype=np.float64).T, strict=True):
        s.put(name, column, "")
    training_figures(s, problem.config, problem.hardware, layout)
    return s


def all_sizes(problem: Problem) -> Iterator[tuple[int, ...]]:
    """Yield the sizes of parallelism that divide the GPUs, the heads, the experts and the batch."""
    config, options, gpus, batch = problem.config, problem.options, problem.gpus, problem.batch
    node = round(problem.hardware.value("gpus_per_node"))
    moe = config.n_dense_layers < config.n_layers + config.n_mtp_layers

    def sizes(name: str, number: int, most: int) -> list[int]:
        return [n for n in divisors(number, most) if n in options.get(name, (n,))]

    for pipeline in sizes("pipeline", gpus, config.n_layers):
        for tensor in sizes("tensor", gpus // pipeline, node):
            if config.n_heads % tensor or config.kv_heads % tensor:
                continue
            data = gpus // (pipeline * tensor)
            for expert in sizes("expert", gpus // pipeline, config.n_routed_experts if moe else 1):
                fills = config.n_routed_experts % expert == 0 and (expert % node == 0 or node % expert == 0)
                for micro_batch in options["micro_batch"] if fills else ():
                    if batch % (data * micro_batch) == 0:
                        yield pipeline, tensor, expert, micro_batch


def _groups(problem: Problem, schedule: str, sizes: list[tuple[int, ...]]) -> list[list[int]]:
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


def choose_layout(
    problem: Problem, given: Mapping[str, Any], preset: Mapping[str, Any], how: str
) -> tuple[Layout, str, str]:
    """Return the layout with the given fields and what is best for the others, how it was chosen, and what would fit.

    Args:
        problem: with SHORT options.
        preset: layout of a published run of this model; empty for other models.
        how: words for that.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch.
    """
    if preset and (layout := _published(problem, preset, given)):
        but = ", ".join(f"{name}={value}" for name, value in given.items())
        return layout, f"{how}{but and f', but {but}'}", ""
    held = {name: (value,) for name, value in given.items()}
    lists = [problem.of(**{**options, "precision": (problem.state.precision,), **held}) for options in (SHORT, LONGER)]
    table = None
    for gpus in held.get("gpus") or _gpu_counts(problem, given):
        table = evaluate(lists[-1].lean().of(gpus=(gpus,)))
        most = SLACK * problem.hardware.value("gpu_memory")
        hopeful = [table.sizes[row] for row in np.flatnonzero((table.memory <= most).any(axis=0))]
        for options in lists if hopeful else ():
            found = evaluate(options.of(gpus=(gpus,)), sizes=hopeful)
            if np.isfinite(found.fitting).any():
                fewest = "" if "gpus" in given else ", on the fewest GPUs"
                return found.smallest(found.fitting), f"the fastest of a short list that fits{fewest}", ""
    assert table is not None, "there is at least one GPU"
    if not np.isfinite(table.memory).any():
        problem.check(replace(problem.state, **{"gpus": _least_gpus(given)} | dict(given)))  # raises what contradicts
        raise ValueError(what_would_fit(table))
    leanest = table.smallest(table.memory)
    return leanest, "the one that needs least memory, since none fits", what_would_fit(table)


def _published(problem: Problem, preset: Mapping[str, Any], given: Mapping[str, Any]) -> Layout | None:
    """Return a published layout with the given fields, or None where they or the hardware do not go with it."""
    precision = "fp8" if "fp8" in problem.hardware.peaks else problem.state.precision
    if not problem.hardware.networked:
        return None
    try:
        layout = Layout(**{"precision": precision, **preset, **given})
        needed = problem.planned(layout).memory_needed
    except ValueError:
        return None
    return layout if needed <= problem.hardware.value("gpu_memory") else None


def _least_gpus(given: Mapping[str, Any]) -> int:
    """Return the fewest GPUs that the given sizes divide."""
    return given.get("pipeline", 1) * math.lcm(given.get("tensor", 1), given.get("expert", 1))


def _gpu_counts(problem: Problem, given: Mapping[str, Any]) -> list[int]:
    """Return the numbers of GPUs to try, from the first that might hold the training state.

    The given sizes divide them, and a step has a sequence for each pipeline stage and part of the batch.
    """
    config, least = problem.config, _least_gpus(given)
    node, memory = (round(problem.hardware.value(name)) for name in ("gpus_per_node", "gpu_memory"))
    most = min(MOST_GPUS, problem.most_gpus, problem.batch * given.get("tensor", node))
    counts = [2**i for i in range(node.bit_length()) if 2**i < node]
    counts += [node * 2**i for i in range(MOST_GPUS.bit_length())]
    experts = (config.n_layers + config.n_mtp_layers - config.n_dense_layers) * config.n_routed_experts
    allowed = sorted({count for each in counts if (count := math.lcm(each, least)) <= most}) or [least]
    state = experts * 3 * config.dim * config.moe_inter_dim * LEAST_STATE
    return [count for count in allowed if count * memory >= state] or allowed[-1:]


# --- what would fit


def what_would_fit(table: Table) -> str:
    """Return one sentence for a problem that no layout fits: the least memory there is, and what would fit."""
    problem = table.problem
    gpus, memory = problem.gpus, problem.hardware.value("gpu_memory")
    if not np.isfinite(table.memory).any():
        return (
            f"gpus={gpus} allow no layout for a step of batch={problem.batch} sequences; "
            "use a batch that the GPUs divide"
        )
    layout = table.smallest(table.memory)
    needs = (
        f"no layout on gpus={gpus} fits {in_unit(memory, 'B')} a GPU: the smallest needs "
        f"{in_unit(float(table.memory.min()), 'B')}, with pipeline={layout.pipeline}, tensor={layout.tensor}, "
        f"expert={layout.expert}, zero={layout.zero}, recompute={layout.recompute!r}, precision={layout.precision!r}"
    )
    return f"{needs}; {' or '.join(_remedies(problem)) or 'use hardware with more memory'}"


def _remedies(p: Problem) -> Iterator[str]:
    """Yield what would make some layout fit: a choice that was not allowed, more GPUs, or with them a larger batch."""
    freed = {
        "allow ZeRO 3": p.of(zero=EVERY["zero"]),
        "allow recomputation": p.of(recompute=EVERY["recompute"]),
        "use moments='bfloat16'": replace(p, state=replace(p.state, moments="bfloat16")),
    }
    if "fp8" in p.hardware.peaks:
        freed["allow precision='fp8'"] = p.of(precision=("fp8",))
    for name in ("pipeline", "tensor", "expert"):
        if name in p.options:
            freed[f"leave out {name}"] = replace(p, options={n: held for n, held in p.options.items() if n != name})
    yield from (remedy for remedy, other in freed.items() if other != p and _fits(other))
    factors = [2**i for i in range(1, 21) if 2**i * p.gpus <= p.most_gpus]
    more = {
        f"use gpus={f * p.gpus}": p.of(gpus=(f * p.gpus,)) for f in factors if f <= p.batch * p.config.n_layers / p.gpus
    }
    for f in factors:
        more[f"use gpus={f * p.gpus} and batch={f * p.batch}"] = replace(p.of(gpus=(f * p.gpus,)), batch=f * p.batch)
    yield from itertools.islice((remedy for remedy, other in more.items() if _fits(other)), 1)


def _fits(problem: Problem) -> bool:
    """Return True if some layout fits, by the choices that need least memory."""
    return bool(np.isfinite(evaluate(problem.lean()).fitting).any())
