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

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmini.accounting.tensors import divisors
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.model import model_figures
from dsmini.planner.request import DTYPES, ONE_PROCESS, Setup, rules
from dsmini.planner.training import PARTS, training_figures
from dsmini.planner.words import in_unit

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
SHORT: Options = {**EVERY, "micro_batch": (1,), "schedule": ("1f1b", "dualpipe"), "zero": (0, 1, 3)}
"""Options of a layout that the user leaves open."""
MOST_GPUS = 2**20


def lean(options: Options) -> Options:
    """Return the options that need least memory; ZeRO also 0, since 1 to 3 divide a batch."""
    zeros = tuple(dict.fromkeys((options["zero"][0], options["zero"][-1])))
    last = {name: options[name][-1:] for name in ("recompute", "precision")}
    return {**options, "schedule": options["schedule"][:1], "zero": zeros, **last}


# --- the formulas for one layout, or for all at once


def base_sheet(made: Setup) -> Sheet:
    """Return a sheet of plain numbers with the model, the hardware and the workload."""
    s, r = Sheet(explained=False), made.request
    made.hardware.put(s)
    s.put("gpus", r.gpus, "")
    s.put("batch", r.batch, "")
    s.put("seq_len", float(r.seq_len or 1), "")  # not whole: means are not rounded
    model_figures(s, made.model.config)
    return s


def layout_figures(made: Setup) -> Sheet:
    """Return the training figures of a setup's layout as plain numbers. Raises: ValueError as a plan does."""
    made.check_layout()
    s = base_sheet(made)
    for name in SIZES:
        s.put(name, getattr(made.request, name), "")
    training_figures(s, made.model.config, made.hardware, made.request)
    return s


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Time and memory of all layouts: arrays [choice, sizes], infinite where there is no such layout."""

    made: Setup
    """Setup with the number of GPUs."""
    options: Options
    sizes: npt.NDArray[np.int64]
    """[sizes, 4]: pipeline, tensor, expert and micro-batch."""
    choices: list[tuple[Any, ...]]
    """Schedule, ZeRO, recomputation and precision."""
    time: Values
    memory: Values

    @property
    def fitting(self) -> Values:
        """Time of what fits; infinite elsewhere."""
        return np.where(self.memory <= self.made.hardware.value("gpu_memory"), self.time, np.inf)

    def at(self, row: int, choice: int) -> Setup:
        """Return the setup of a layout."""
        sizes = dict(zip(SIZES, map(int, self.sizes[row]), strict=True))
        return self.made.asking(**sizes, **dict(zip(CHOICES, self.choices[choice], strict=True)))

    def smallest(self, values: Values) -> Setup:
        """Return the layout of the smallest value; of equal ones those of least memory, then of first sizes."""
        order = np.lexsort((self.memory.T.ravel(), values.T.ravel()))
        return self.at(*divmod(int(order[0]), len(self.choices)))


def evaluate(made: Setup, options: Options, on_part: OnPart = quiet) -> Table:
    """Return the time and the memory of all choices, for all sizes that the GPUs allow."""
    sizes = _sizes(made, options)
    choices = list(itertools.product(*(options[name] for name in CHOICES)))
    time, memory = (np.full((len(choices), len(sizes)), np.inf) for _ in range(2))
    table = Table(made=made, options=options, sizes=sizes, choices=choices, time=time, memory=memory)
    base = base_sheet(made)
    kinds = np.minimum(sizes[:, 0], 3) * 2 + (sizes[:, 2] > 1)  # each with one formula
    for number, choice in enumerate(choices):
        allowed = _allowed(made, sizes, choice)
        for kind in np.unique(kinds[allowed]):
            rows, s = np.flatnonzero(allowed & (kinds == kind)), base.copy()
            for name, column in zip(SIZES, sizes[rows].T.astype(np.float64), strict=True):
                s.put(name, column, "")
            # a formula with tensor parallelism holds for tensor=1 too, and one with several nodes for one
            one = table.at(rows[np.argmax(sizes[rows, 1])], number).request
            training_figures(s, made.model.config, made.hardware, one)
            time[number, rows], memory[number, rows] = s.parts_seconds, s.memory_needed
        on_part((number + 1) / len(choices), f"{choice[0]}, ZeRO {', '.join(map(str, choice[1:]))}")
    return table


def _sizes(made: Setup, options: Options) -> npt.NDArray[np.int64]:
    """Return sizes of parallelism of which some may be allowed."""
    c, gpus = made.model.config, made.request.gpus or 1
    most = {"pipeline": c.n_layers, "tensor": made.hardware.gpus_per_node, "expert": c.n_routed_experts}
    lists = [options[name] if name in options else divisors(gpus, most[name]) for name in SIZES]
    return np.array(list(itertools.product(*lists)))


def _allowed(made: Setup, sizes: Any, choice: tuple[Any, ...]) -> Any:
    """Return for which sizes a choice is allowed."""
    columns = zip((*SIZES, *CHOICES), (*sizes.T, *choice), strict=True)
    r = SimpleNamespace(**dict(columns), gpus=made.request.gpus, batch=made.request.batch)
    with np.errstate(divide="ignore"):
        found = [holds for holds, _ in rules(r, made.model.config, made.hardware.gpus_per_node)]
    return functools.reduce(np.logical_and, found)


def search(made: Setup, most: int = 12, on_part: OnPart = quiet) -> list[tuple[Setup, dict[str, Any]]]:
    """Return the fastest layouts that fit, one for each sizes of parallelism, fastest first, each with its figures.

    These are the memory, the seconds of a step, the share of the peak of BF16, or FP32 where products are, and what
    binds: the longest part of a step.

    Raises: ValueError if no layout fits, with what would fit.
    """
    has_units = tuple(p for p in EVERY["precision"] if DTYPES[p] in made.hardware.peaks)
    precisions = ("fp32",) if made.request.precision == "fp32" else has_units
    held = {name: (value,) for name, value in made.asked.given().items()}
    table = evaluate(made, {**EVERY, "precision": precisions, **held}, on_part)
    fitting = table.fitting
    if not np.isfinite(fitting).any():
        raise ValueError(what_would_fit(table))
    rows = np.arange(len(table.sizes))
    choice = np.lexsort((table.memory, fitting), axis=0)[0]  # of equal times the one with less memory
    best = fitting[choice, rows]
    order = [row for row in np.lexsort((table.memory[choice, rows], best))[:most] if np.isfinite(best[row])]
    return [_candidate(table.at(row, choice[row])) for row in order]


def _candidate(made: Setup) -> tuple[Setup, dict[str, Any]]:
    s, r = layout_figures(made), made.request
    peak = made.hardware.value("peak_float32" if r.precision == "fp32" else "peak_bfloat16") * s.gpus
    return made, {
        **r.given(),
        "memory": float(s.memory_needed),
        "step_seconds": float(s.parts_seconds),
        "mfu": float(s.training_flops * s.batch * s.seq_len / peak / s.parts_seconds),
        "binds": PARTS[max(PARTS, key=lambda part: float(getattr(s, part)))],
    }


# --- the layout that a user leaves open


def choose_layout(made: Setup, state: Mapping[str, Any], preset: Mapping[str, Any], how: str) -> tuple[Setup, str, str]:
    """Return the setup with a complete layout, how what is left open was chosen, and what would fit if it does not.

    Args:
        state: precision, optimizer and moments where the user leaves them open.
        preset: layout of a published run of this model; empty for other models.
        how: words for that.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch.
    """
    given = made.request.given()
    if len(given) == len(ONE_PROCESS):
        fits = layout_figures(made).memory_needed <= made.hardware.value("gpu_memory")
        return made, "", "" if fits else "use more GPUs, ZeRO, recomputation, or --search"
    if preset and made.hardware.networked:
        precision = "fp8" if "fp8" in made.hardware.peaks else state["precision"]
        published = made.asking(**{"precision": precision, **preset, **given})
        if _holds(published):
            but = ", ".join(f"{name}={value}" for name, value in given.items())
            return published, f"{how}{but and f', but {but}'}", ""
    made, held = made.asking(**{**ONE_PROCESS, **state, **given}), {name: (value,) for name, value in given.items()}
    options, table = {**SHORT, "precision": (state["precision"],), **held}, None
    for gpus in held.get("gpus") or _gpu_counts(made, given):
        table = evaluate(made.asking(gpus=gpus), lean(options))
        if np.isfinite(table.fitting).any():
            found = evaluate(table.made, options)
            fewest = "" if "gpus" in given else ", on the fewest GPUs"
            return found.smallest(found.fitting), f"the fastest of a short list that fits{fewest}", ""
    assert table is not None, "there is at least one GPU"
    if not np.isfinite(table.memory).any():
        made.asking(gpus=given.get("gpus", _least_gpus(given))).check_layout()  # raises what contradicts
        raise ValueError(what_would_fit(table))
    return table.smallest(table.memory), "the one that needs least memory, since none fits", what_would_fit(table)


def _holds(made: Setup) -> bool:
    """Return whether a layout is one, and fits."""
    try:
        return bool(layout_figures(made).memory_needed <= made.hardware.value("gpu_memory"))
    except ValueError:
        return False


def _least_gpus(given: Mapping[str, Any]) -> int:
    """Return the fewest GPUs that the given sizes divide."""
    return given.get("pipeline", 1) * math.lcm(given.get("tensor", 1), given.get("expert", 1))


def _gpu_counts(made: Setup, given: Mapping[str, Any]) -> list[int]:
    """Return the numbers of GPUs to try: up to a node, then nodes, so that the given sizes divide them.

    A step has a sequence for each pipeline stage and part of the batch.
    """
    least, node = _least_gpus(given), made.hardware.gpus_per_node
    most = min(MOST_GPUS, made.hardware.most_gpus, (made.request.batch or 1) * given.get("tensor", node))
    counts = [2**i for i in range(node.bit_length()) if 2**i < node]
    counts += [node * 2**i for i in range(MOST_GPUS.bit_length())]
    return sorted({count for each in counts if (count := math.lcm(each, least)) <= most}) or [least]


def what_would_fit(table: Table) -> str:
    """Return one sentence for a setup that no layout fits: the least memory there is, and how many GPUs would do."""
    made, memory = table.made, table.made.hardware.value("gpu_memory")
    gpus, batch = made.request.gpus or 1, made.request.batch or 1
    if not np.isfinite(table.memory).any():
        return f"gpus={gpus} allow no layout for a step of batch={batch} sequences; use a batch that they divide"
    least, names = table.smallest(table.memory).request, ("pipeline", "tensor", "expert", *CHOICES[1:])
    fix = "use hardware with more memory, or leave out a choice"
    factors = [2**i for i in range(1, 21) if 2**i * gpus <= made.hardware.most_gpus]
    more = [(f, 1) for f in factors if f <= batch * made.model.config.n_layers / gpus] + [(f, f) for f in factors]
    for f, rows in more:
        larger = made.asking(gpus=f * gpus, batch=rows * batch)
        if np.isfinite(evaluate(larger, lean(table.options)).fitting).any():
            fix = f"use gpus={f * gpus}" + (f" and batch={rows * batch}" if rows > 1 else "")
            break
    needs, sizes = float(table.memory.min()), ", ".join(f"{n}={getattr(least, n)!r}" for n in names)
    of = f"no layout on gpus={gpus} fits {in_unit(memory, 'B')} a GPU"
    return f"{of}: the smallest needs {in_unit(needs, 'B')}, with {sizes}; {fix}"
