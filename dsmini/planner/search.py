"""Layouts for a number of GPUs: which fit a model in their memory, which is fastest, and what would fit if none does.

    sizes      pipeline, tensor, expert, micro_batch
    choices    schedule, ZeRO, recomputation, precision

The formulas of training.py are evaluated for all sizes at once, as arrays, once for each choice and group of sizes
for which they differ: one, two or more stages, with and without expert parallelism. For each combination of sizes
the fastest choice that fits remains. So a search cannot differ from the plans that it finds.

Where the user leaves the layout open it is the fastest of a short list that fits, on the fewest GPUs: 1, 2, 4, ... up
to a node, then 1, 2, 4, ... nodes. If none fits, it is the one that needs least memory, with what would fit.

Worked example, DeepSeek-V3 on 2048 H800 with BF16 moments: 35,000 layouts in 2 seconds. The published one, 16 stages
and experts over 64 GPUs, is within 5 % of the fastest.

Estimates: the time is that of training.py. Memory is a lower bound: a layout that fills it will not run.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from dsmini.accounting.tensors import divisors
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.model import model_figures
from dsmini.planner.request import DTYPES, ONE_PROCESS, Setup, is_v3, presets, rules
from dsmini.planner.training import PARTS, training_figures
from dsmini.report.units import human

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


class Layout(NamedTuple):
    """Layout of some options. The order is that of time, then memory, sizes and choices."""

    seconds: float
    memory: float
    sizes: tuple[float, ...]
    """Pipeline, tensor, expert and micro-batch."""
    choice: int
    """Place of schedule, ZeRO, recomputation and precision among all choices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layouts:
    """All layouts of some options for a number of GPUs."""

    made: Setup
    options: Options
    every: list[Layout]

    @property
    def fitting(self) -> list[Layout]:
        """Layouts whose memory is there."""
        return [one for one in self.every if one.memory <= self.made.memory]

    @property
    def smallest(self) -> Layout:
        """Layout of least memory, then of first sizes and choices."""
        return min(self.every, key=lambda one: (one.memory, one.sizes, one.choice))

    def at(self, one: Layout) -> Setup:
        """Return the setup of a layout."""
        return _asking(self.made, one.sizes, choices(self.options)[one.choice])


def choices(options: Options) -> list[tuple[Any, ...]]:
    """Return all choices of the options."""
    return list(itertools.product(*(options[name] for name in CHOICES)))


def _asking(made: Setup, sizes: Any, choice: tuple[Any, ...]) -> Setup:
    return made.asking(**dict(zip(SIZES, map(int, sizes), strict=True)), **dict(zip(CHOICES, choice, strict=True)))


def evaluate(made: Setup, options: Options, on_part: OnPart = quiet) -> Layouts:
    """Return the time and the memory of all choices, for all sizes that the GPUs allow."""
    c, gpus = made.model.config, made.request.gpus or 1
    most = {"pipeline": c.n_layers, "tensor": made.hardware.gpus_per_node, "expert": c.n_routed_experts}
    lists = [options[name] if name in options else divisors(gpus, most[name]) for name in SIZES]
    sizes = np.array(list(itertools.product(*lists)))
    base, found, every = base_sheet(made), list[Layout](), choices(options)
    kinds = np.minimum(sizes[:, 0], 3) * 2 + (sizes[:, 2] > 1)  # each with one formula
    for number, choice in enumerate(every):
        allowed = _allowed(made, sizes, choice)
        for kind in np.unique(kinds[allowed]):
            rows, s = sizes[allowed & (kinds == kind)].astype(np.float64), base.copy()
            for name, column in zip(SIZES, rows.T, strict=True):
                s.put(name, column, "")
            # a formula with tensor parallelism holds for tensor=1 too, and one with several nodes for one
            training_figures(s, c, made.hardware, _asking(made, rows[np.argmax(rows[:, 1])], choice).request)
            amounts = (np.broadcast_to(x, len(rows)).tolist() for x in (s.parts_seconds, s.memory_needed))
            found += map(Layout, *amounts, map(tuple, rows.tolist()), itertools.repeat(number))
        on_part((number + 1) / len(every), f"{choice[0]}, ZeRO {', '.join(map(str, choice[1:]))}")
    return Layouts(made=made, options=options, every=found)


def _allowed(made: Setup, sizes: Any, choice: tuple[Any, ...]) -> Any:
    """Return for which sizes a choice is allowed."""
    columns = zip((*SIZES, *CHOICES), (*sizes.T, *choice), strict=True)
    r = SimpleNamespace(**dict(columns), gpus=made.request.gpus, batch=made.request.batch)
    with np.errstate(divide="ignore"):
        found = [holds for holds, _ in rules(r, made.model.config, made.hardware.gpus_per_node)]
    return functools.reduce(np.logical_and, found)


def search(made: Setup, most: int = 12, on_part: OnPart = quiet) -> list[tuple[Setup, dict[str, Any]]]:
    """Return the fastest layouts that fit, one for each combination of sizes, fastest first, each with its figures.

    These are the memory, the seconds of a step, the share of the peak of BF16, or FP32 where products are, and what
    binds: the longest part of a step.

    Raises: ValueError if no layout fits, with what would fit.
    """
    has_units = tuple(p for p in EVERY["precision"] if DTYPES[p] in made.hardware.peaks)
    precisions = ("fp32",) if made.request.precision == "fp32" else has_units
    held = {name: (value,) for name, value in made.asked.given().items()}
    found = evaluate(made, {**EVERY, "precision": precisions, **held}, on_part)
    best = {one.sizes: one for one in sorted(found.fitting, reverse=True)}  # the fastest of the same sizes is the last
    if not best:
        raise ValueError(what_would_fit(found))
    return [_candidate(found.at(one)) for one in sorted(best.values())[:most]]


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


def choose_layout(made: Setup) -> Setup:
    """Return the setup with a complete layout, how what is left open was chosen, and what would fit if it does not.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch.
    """
    given, hardware, run = made.request.given(), made.hardware, made.model.run
    if len(given) == len(ONE_PROCESS):
        return _chosen(made, "", "" if _fits(made) else "use more GPUs, ZeRO, recomputation, or --search")
    state: dict[str, Any] = {"precision": made.usual_precision}
    if run is not None:
        state |= {"optimizer": run.train.optimizer, "moments": run.train.moments}
        state |= {"precision": "fp32"} if run.train.dtype == "float32" else {}
    preset = presets()["deepseek-v3"]
    if is_v3(made.model.config) and hardware.networked:
        published = made.asking(**{**state, **preset["training"], **given})
        with contextlib.suppress(ValueError):  # the given numbers allow no such layout
            if _fits(published):
                but = ", ".join(f"{name}={value}" for name, value in given.items())
                return _chosen(published, f"{preset['sources']['training']}{but and f', but {but}'}")
    made, held = made.asking(**{**ONE_PROCESS, **state, **given}), {name: (value,) for name, value in given.items()}
    options, node = {**SHORT, "precision": (state["precision"],), **held}, hardware.gpus_per_node
    least = given.get("pipeline", 1) * math.lcm(given.get("tensor", 1), given.get("expert", 1))
    # a step has a sequence for each pipeline stage and part of the batch
    most = min(MOST_GPUS, hardware.most_gpus, (made.request.batch or 1) * given.get("tensor", node))
    counts = {math.lcm(count, least) for count in gpu_counts(node)}
    counts = held.get("gpus") or sorted(count for count in counts if count <= most) or [least]
    found = Layouts(made=made, options=options, every=[])
    for gpus in counts:
        found = evaluate(made.asking(gpus=gpus), lean(options))
        if found.fitting:
            found = evaluate(found.made, options)
            fewest = "" if "gpus" in given else ", on the fewest GPUs"
            return _chosen(found.at(min(found.fitting)), f"the fastest of a short list that fits{fewest}")
    if not found.every:
        made.asking(gpus=given.get("gpus", least)).check_layout()  # raises what contradicts
        raise ValueError(what_would_fit(found))
    return _chosen(found.at(found.smallest), "the one that needs least memory, since none fits", what_would_fit(found))


def _chosen(made: Setup, how: str, misfit: str = "") -> Setup:
    """Return a setup with the source of its layout, and what would fit if it does not."""
    sources = {**dict.fromkeys([*ONE_PROCESS, "layout"], how), **made.sources}
    return replace(made, sources=sources, misfit={"training": misfit} if misfit else {})


def _fits(made: Setup) -> bool:
    """Return whether a layout fits. Raises: ValueError if it is none."""
    return bool(layout_figures(made).memory_needed <= made.memory)


def gpu_counts(node: int) -> list[int]:
    """Return numbers of GPUs to try: 1, 2, 4, ... of a node, then 1, 2, 4, ... nodes."""
    few = [2**i for i in range(node.bit_length()) if 2**i < node]
    return few + [node * 2**i for i in range(MOST_GPUS.bit_length())]


def what_would_fit(found: Layouts) -> str:
    """Return one sentence for a setup that no layout fits: the least memory there is, and how many GPUs would do."""
    made, memory = found.made, found.made.memory
    gpus, batch = made.request.gpus or 1, made.request.batch or 1
    if not found.every:
        return f"gpus={gpus} allow no layout for a step of batch={batch} sequences; use a batch that they divide"
    fix = "use hardware with more memory, or leave out a choice"
    factors = [2**i for i in range(1, 21) if 2**i * gpus <= made.hardware.most_gpus]
    more = [(f, 1) for f in factors if f <= batch * made.model.config.n_layers / gpus] + [(f, f) for f in factors]
    for f, rows in more:
        larger = made.asking(gpus=f * gpus, batch=rows * batch)
        if evaluate(larger, lean(found.options)).fitting:
            fix = f"use gpus={f * gpus}" + (f" and batch={rows * batch}" if rows > 1 else "")
            break
    least = found.at(found.smallest).request
    sizes = ", ".join(f"{n}={getattr(least, n)!r}" for n in ("pipeline", "tensor", "expert", *CHOICES[1:]))
    of, needs = f"no layout on gpus={gpus} fits {human(memory, 'B')} a GPU", human(found.smallest.memory, "B")
    return f"{of}: the smallest needs {needs}, with {sizes}; {fix}"
