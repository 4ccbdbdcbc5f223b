"""Choice of the training layout that a user leaves open, wholly or in part.

A model with DeepSeek-V3's sizes takes the layout of its report if it fits. Else it is the fastest layout that fits the
GPUs, and without a number of GPUs the fewest that fit: 1, 2, 4, ... up to a node, then 1, 2, 4, ... nodes.

Fastest means of a short list: ZeRO 1, without or with recomputation. If none of it fits, ZeRO 3 and whole blocks are
tried. A search (search.py) goes through all choices.

Worked example, DeepSeek-V2-Lite, 16B parameters, on H800: 18 bytes of state each are 283 GB without activations. Eight
GPUs hold them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.references import is_v3
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.layout import Layout, Recompute, Zero, check_layout
from dsmini.planner.training.layout_table import SIZES, Choices, LayoutTable, Problem, evaluate_layouts, layout_of
from dsmini.planner.training.search import most_gpus, what_would_fit
from dsmini.planner.training.training_plan import training_plan
from dsmini.planner.training.workload import Workload

V3_LAYOUT = Layout(
    gpus=2048,
    pipeline=16,
    expert=64,
    zero=1,
    recompute="selective",
    precision="fp8",
    schedule="dualpipe",
    moments="bfloat16",
)
"""Layout of DeepSeek-V3's training. Source: V3 report, sections 3.1 to 3.3."""
LEAST_STATE = 8.0
"""Bytes of training state that a parameter has at least, with which the search for enough GPUs begins."""
MOST_GPUS = 2**20
SLACK = 1.5
"""Memory that sizes may need with the leanest choice, over what there is: for some sizes another choice is leaner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenLayout:
    """A layout, and how it was chosen, in words."""

    layout: Layout
    how: str
    misfit: str = ""
    """One sentence for a layout that does not fit, with what would; "" for one that fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """All that a layout is chosen for."""

    m: ModelInputs
    hardware: Hardware
    workload: Workload
    assumptions: Assumptions
    defaults: Layout
    """Precision, optimizer and moments where the user leaves them open."""

    def problem(self, gpus: int, choices: Choices, given: dict[str, Any]) -> Problem:
        """Return the table's problem, in which given sizes are held."""
        return Problem(
            m=self.m,
            hardware=self.hardware,
            workload=self.workload,
            gpus=gpus,
            choices=choices,
            assumptions=self.assumptions,
            held={name: given[name] for name in SIZES if name in given},
        )

    def check(self, layout: Layout) -> None:
        """Raise ValueError for a layout that the model, the nodes or the batch cannot have."""
        node, batch = round(self.hardware.gpus_per_node.value), round(self.workload.batch.value)
        check_layout(layout, self.m.config, node, batch)


def choose_layout(cluster: Cluster, given: dict[str, Any]) -> ChosenLayout:
    """Return the layout with the given fields, and what is best for the others.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch.
    """
    if is_v3(cluster.m) and (published := _published(cluster, given)):
        but = ", ".join(f"{name}={value}" for name, value in given.items())
        return ChosenLayout(layout=published, how=f"as DeepSeek-V3 was trained{but and f', but {but}'}")
    lean = table = None
    for gpus in [given["gpus"]] if "gpus" in given else _gpu_counts(cluster, given):
        lean = cluster.problem(gpus, _leanest(cluster.defaults, given, gpus), given)
        table = evaluate_layouts(lean)
        hopeful = table.sizes_below(SLACK * cluster.hardware.memory.value)
        for choices in _lists(cluster.defaults, given) if hopeful else ():
            problem = replace(lean, choices=choices)
            found = evaluate_layouts(problem, sizes=hopeful)
            if np.isfinite(found.best).any():
                row = int(np.argmin(found.best))
                layout = _layout(cluster, problem, found, row, int(found.choice[row]))
                fewest = "" if "gpus" in given else ", on the fewest GPUs"
                return ChosenLayout(layout=layout, how=f"the fastest of a short list that fits{fewest}")
    assert lean is not None and table is not None, "there is at least one GPU"
    if not np.isfinite(table.least).any():
        cluster.check(replace(cluster.defaults, **{"gpus": _least_gpus(given)} | given))  # raises what contradicts
        raise ValueError(what_would_fit(lean, table))
    row = int(np.argmin(table.least))
    layout = _layout(cluster, lean, table, row, int(table.leanest[row]))
    how = "the one that needs least memory, since none fits"
    return ChosenLayout(layout=layout, how=how, misfit=what_would_fit(lean, table))


def _published(cluster: Cluster, given: dict[str, Any]) -> Layout | None:
    """Return V3's own layout with the given fields, or None where they or the hardware do not go with it."""
    hardware = cluster.hardware
    precision = "fp8" if "fp8" in hardware.peaks else cluster.defaults.precision
    if hardware.slow_link is None or hardware.fast_link is None:
        return None
    try:
        layout = replace(V3_LAYOUT, **{"precision": precision} | given)
        plan = training_plan(cluster.m, hardware, layout, cluster.workload, cluster.assumptions)
    except ValueError:
        return None
    return layout if plan.fits else None


def _least_gpus(given: dict[str, Any]) -> int:
    """Return the fewest GPUs that the given sizes divide."""
    return given.get("pipeline", 1) * math.lcm(given.get("tensor", 1), given.get("expert", 1))


def _gpu_counts(cluster: Cluster, given: dict[str, Any]) -> Iterator[int]:
    """Yield the numbers of GPUs to try, from the first that might hold the training state.

    The given sizes divide them, and a step has a sequence for each pipeline stage and part of the batch.
    """
    hardware, config, least = cluster.hardware, cluster.m.config, _least_gpus(given)
    expert, node = 3 * config.dim * config.moe_inter_dim, round(hardware.gpus_per_node.value)
    most = min(MOST_GPUS, most_gpus(hardware), round(cluster.workload.batch.value) * given.get("tensor", node))
    counts = [2**i for i in range(node.bit_length()) if 2**i < node]
    counts += [node * 2**i for i in range(MOST_GPUS.bit_length())]
    experts = (config.n_layers + config.n_mtp_layers - config.n_dense_layers) * config.n_routed_experts
    allowed = sorted({count for each in counts if (count := math.lcm(each, least)) <= most}) or [least]
    enough = [count for count in allowed if count * hardware.memory.value >= experts * expert * LEAST_STATE]
    yield from enough or allowed[-1:]


def _lists(defaults: Layout, given: dict[str, Any]) -> Iterator[Choices]:
    """Yield the short list of choices, and the longer one."""
    short: tuple[tuple[Zero, ...], tuple[Recompute, ...]] = ((0, 1), ("none", "selective"))
    longer: tuple[tuple[Zero, ...], tuple[Recompute, ...]] = ((0, 1, 3), ("selective", "full"))
    for zeros, recomputes in (short, longer):
        yield Choices(
            schedules=(given["schedule"],) if "schedule" in given else ("1f1b", "dualpipe"),
            zeros=(given["zero"],) if "zero" in given else zeros,
            recomputes=(given["recompute"],) if "recompute" in given else recomputes,
            precisions=(given.get("precision", defaults.precision),),
            moments=given.get("moments", defaults.moments),
            micro_batches=(given.get("micro_batch", 1),),
        )


def _leanest(defaults: Layout, given: dict[str, Any], gpus: int) -> Choices:
    """Return the choices that need least memory, by which numbers of GPUs that are too few are left out early.

    ZeRO 0 is one of them, since other stages need GPUs that divide a batch.
    """
    longer = list(_lists(defaults, given))[-1]
    zeros = (longer.zeros[0], longer.zeros[-1]) if gpus > 1 and len(longer.zeros) > 1 else longer.zeros[:1]
    return replace(longer, schedules=longer.schedules[:1], zeros=zeros, recomputes=longer.recomputes[-1:])


def _layout(cluster: Cluster, problem: Problem, table: LayoutTable, row: int, choice: int) -> Layout:
    layout = layout_of(problem, table.sizes[row], table.choices[choice])
    return replace(layout, optimizer=cluster.defaults.optimizer)
