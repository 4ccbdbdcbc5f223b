"""Choice of the training layout that a user leaves open, wholly or in part.

A model with DeepSeek-V3's sizes takes the layout of its report if it fits. Else it is the fastest layout that fits the
GPUs, and without a number of GPUs the fewest that fit: 1, 2, 4, ... up to a node, then 1, 2, 4, ... nodes.

Fastest means of a short list: ZeRO 1, without or with recomputation. If none of it fits, ZeRO 3 and whole blocks are
tried. A search (search.py) goes through all choices.

Worked example, DeepSeek-V2-Lite, 16B parameters, on H800: 18 bytes of state each are 283 GB without activations. Eight
GPUs hold them.
"""

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
from dsmini.planner.training.search import what_would_fit
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """All that a layout is chosen for."""

    m: ModelInputs
    hardware: Hardware
    workload: Workload
    assumptions: Assumptions
    defaults: Layout
    """Precision, optimizer and moments where the user leaves them open."""

    def problem(self, gpus: int, choices: Choices) -> Problem:
        """Return the table's problem."""
        return Problem(
            m=self.m,
            hardware=self.hardware,
            workload=self.workload,
            gpus=gpus,
            choices=choices,
            assumptions=self.assumptions,
        )

    def check(self, layout: Layout) -> None:
        """Raise ValueError for a layout that the model, the nodes or the batch cannot have."""
        node, batch = round(self.hardware.gpus_per_node.value), round(self.workload.batch.value)
        check_layout(layout, self.m.config, node, batch)


def choose_layout(cluster: Cluster, given: dict[str, Any]) -> ChosenLayout:
    """Return the layout with the given fields, and what is best for the others.

    Raises: ValueError for a layout that contradicts itself, the model, the nodes or the batch, and if no layout fits
        the given number of GPUs.
    """
    if is_v3(cluster.m) and (published := _published(cluster, given)):
        but = ", ".join(f"{name}={value}" for name, value in given.items())
        return ChosenLayout(layout=published, how=f"as DeepSeek-V3 was trained{but and f', but {but}'}")
    problem = table = None
    for gpus in [given["gpus"]] if "gpus" in given else _gpu_counts(cluster):
        problem = cluster.problem(gpus, _leanest(cluster.defaults, given, gpus))
        table = evaluate_layouts(problem)
        hopeful = table.sizes_below(SLACK * cluster.hardware.memory.value)
        for choices in _lists(cluster.defaults, given) if _fastest(table, given) else ():
            problem = cluster.problem(gpus, choices)
            table = evaluate_layouts(problem, sizes=hopeful)
            if found := _fastest(table, given):
                layout = _layout(cluster, problem, table, *found)
                fewest = "" if "gpus" in given else ", on the fewest GPUs"
                return ChosenLayout(layout=layout, how=f"the fastest of a short list that fits{fewest}")
    assert problem is not None and table is not None, "there is at least one GPU"
    return _that_does_not_fit(cluster, given, problem, table)


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
    return layout if plan.fits or given else None


def _gpu_counts(cluster: Cluster) -> Iterator[int]:
    """Yield the numbers of GPUs to try, from the first that might hold the training state."""
    hardware, config = cluster.hardware, cluster.m.config
    node, most = round(hardware.gpus_per_node.value), MOST_GPUS
    if hardware.slow_link is None:
        most = 1 if hardware.fast_link is None else node
    counts = [2**i for i in range(node.bit_length()) if 2**i < node]
    counts += [node * 2**i for i in range(MOST_GPUS.bit_length())]
    moe = config.n_layers + config.n_mtp_layers - config.n_dense_layers
    experts = moe * config.n_routed_experts * 3 * config.dim * config.moe_inter_dim
    allowed = [count for count in counts if count <= most]
    enough = [count for count in allowed if count * hardware.memory.value >= experts * LEAST_STATE]
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
    """Return the choice that needs least memory, by which numbers of GPUs that are too few are left out early."""
    longer = list(_lists(defaults, given))[-1]
    zeros: tuple[Zero, ...] = longer.zeros[-1:] if gpus > 1 else longer.zeros[:1]
    return replace(longer, schedules=longer.schedules[:1], zeros=zeros, recomputes=longer.recomputes[-1:])


def _rows(table: LayoutTable, given: dict[str, Any]) -> list[int]:
    """Return the rows of a table that have the given sizes."""
    found = (dict(zip(SIZES, sizes, strict=True)) for sizes in table.sizes)
    return [
        row for row, sizes in enumerate(found) if all(given.get(name, sizes[name]) == sizes[name] for name in SIZES)
    ]


def _fastest(table: LayoutTable, given: dict[str, Any]) -> tuple[int, int] | None:
    """Return row and choice of the fastest layout that fits."""
    rows = [row for row in _rows(table, given) if np.isfinite(table.best[row])]
    if not rows:
        return None
    row = min(rows, key=lambda row: table.best[row])
    return row, int(table.choice[row])


def _layout(cluster: Cluster, problem: Problem, table: LayoutTable, row: int, choice: int) -> Layout:
    layout = layout_of(problem, table.sizes[row], table.choices[choice])
    return replace(layout, optimizer=cluster.defaults.optimizer)


def _that_does_not_fit(cluster: Cluster, given: dict[str, Any], problem: Problem, table: LayoutTable) -> ChosenLayout:
    """Return the layout that needs least memory, or raise the error of one that cannot be."""
    rows = [row for row in _rows(table, given) if np.isfinite(table.least[row])]
    if not rows:
        layout = replace(cluster.defaults, **{"gpus": problem.gpus} | given)  # raises what contradicts itself
        cluster.check(layout)
    if not rows or given.keys() & {"gpus", *SIZES} == {"gpus"}:
        raise ValueError(what_would_fit(problem, table))
    row = min(rows, key=lambda row: table.least[row])
    layout = _layout(cluster, problem, table, row, int(table.leanest[row]))
    return ChosenLayout(layout=layout, how="the one that needs least memory, since none fits")
