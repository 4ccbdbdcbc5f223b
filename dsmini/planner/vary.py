"""Variation: the same plan for several values of a model's size, of the hardware, of the layout or of the workload.

    kv_lora_rank=128,256,512        a field of the model
    hardware=h100,h800              hardware, by name or file
    gpus=512,1024,2048              a field of the request: layout, workload, serving, failures

Everything else stays as the plan has it: with other hardware the layout is the same one, and with a longer context the
number of sequences. So a difference has one cause. Values for which there is no plan, such as a pipeline that does not
divide the GPUs, are left out, and the reason is told.

Worked example: kv_lora_rank=256,512 gives a cache of (256 + 64) * 61 * 2 = 39,040 and of 70,272 bytes a token.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsmini.planner.hardware import load_hardware
from dsmini.planner.pages.sections import COMPARED
from dsmini.planner.quantities.display import short
from dsmini.planner.quantities.explanation import find
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import Anything
from dsmini.planner.request import PlanRequest
from dsmini.planner.serving.deployment_choice import ChosenDeployment, Serving, Stage, choose_deployment, in_dtypes
from dsmini.planner.setup import Served, Setup, failures_of, hardware_of, served_workload, workload_of
from dsmini.planner.training.layout import Layout
from dsmini.planner.varied_axis import VariedAxis
from dsmini.planner.whole import Plan, whole_plan

UNFIT = "! "
"""Mark of a figure whose plan does not fit."""
MOST_VALUES = 400
"""Most plans of a variation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """Plans of all values of one axis, or of all pairs of two."""

    axes: tuple[VariedAxis, ...]
    plans: Mapping[tuple[int, ...], Plan]
    """Plans by the places of their values on the axes."""
    problems: Mapping[tuple[int, ...], str]
    """Reasons why there is no plan."""
    names: tuple[str, ...]
    """Figures that are compared."""

    def figure(self, name: str, place: tuple[int, ...]) -> Anything | None:
        """Return a figure at a place; None without a plan, or in a plan that lacks it."""
        plan = self.plans.get(place)
        if plan is None:
            return None
        return plan.all[name] if name in plan.all else _found(plan, name)

    def cell(self, name: str, place: tuple[int, ...]) -> str:
        """Return a figure at a place in words, with a mark if its plan does not fit; "" without one."""
        figure = self.figure(name, place)
        return "" if figure is None else (UNFIT if self.unfit(name, place) else "") + short(figure)

    def unfit(self, name: str, place: tuple[int, ...]) -> bool:
        """Return whether a figure is of training or of a deployment that the memory of a GPU does not hold."""
        plan = self.plans[place]
        stage = name.partition("_")[0]
        if plan.serving is not None and stage in ("decode", "prefill"):
            return getattr(plan.serving, stage).memory.share.value > 1
        return not plan.training.fits and any(name in plan.sections[part] for part in ("training", "reliability"))


def vary(
    setup: Setup,
    request: PlanRequest,
    axes: Sequence[VariedAxis],
    names: Sequence[str] = (),
    on_part: Callable[[float, str], None] = lambda done, what: None,
) -> Variation:
    """Return the plans of one axis, or of all pairs of two.

    Args:
        names: figures to compare; without any, those of COMPARED that differ.
        on_part: is told the share that is done and a short text, after each plan.

    Raises: ValueError for more than two axes, the same one twice, unknown hardware or figures, and if no value has a
        plan.
    """
    if len(axes) > 2 or len({axis.name for axis in axes}) < len(axes):
        raise ValueError(f"--vary got {', '.join(axis.name for axis in axes)}; vary one thing, or two different ones")
    places = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
    if len(places) > MOST_VALUES:
        raise ValueError(f"--vary asks for {len(places):,} plans; use at most {MOST_VALUES}")
    for axis in axes:
        if axis.name == "hardware":
            for value in axis.values:
                load_hardware(value)  # a wrong name is an error, not a value without a plan
    plans: dict[tuple[int, ...], Plan] = {}
    problems: dict[tuple[int, ...], str] = {}
    for done, place in enumerate(places):
        changes = {axis.name: axis.values[i] for axis, i in zip(axes, place, strict=True)}
        try:
            plans[place] = whole_plan(changed(setup, request, changes))
        except ValueError as error:
            problems[place] = str(error)
        on_part((done + 1) / len(places), f"{done + 1} of {len(places)} plans")
    if not plans:
        raise ValueError(next(iter(problems.values())))
    every = [figure for plan in plans.values() for figure in plan.all.values()]
    for name in names:
        find(every, name)
    made = Variation(axes=tuple(axes), plans=plans, problems=problems, names=tuple(names))
    return made if names else replace(made, names=_that_differ(made))


def changed(setup: Setup, request: PlanRequest, changes: Mapping[str, Any]) -> Setup:
    """Return a setup with some changes, all else as it is.

    Raises: ValueError for changes that the model or the hardware cannot have.
    """
    s, config = setup, setup.model.config
    of_model = {name: value for name, value in changes.items() if name not in _names(PlanRequest)}
    if of_model:
        model = replace(s.model, config=replace(config, **of_model))
        s = replace(s, model=model, m=ModelInputs.of(model.config, f"--vary and {model.source}"))
    of_request = {name: value for name, value in changes.items() if name not in of_model}
    again = replace(_settled(s, request), **of_request)
    if {"hardware", "price"} & of_request.keys():
        s = replace(s, hardware=hardware_of(again, load_hardware(again.hardware)))
    if of_layout := {name: value for name, value in of_request.items() if name in _names(Layout)}:
        s = s.with_layout(replace(s.layout.layout, **of_layout), s.layout.how)
    if s.serving is not None:
        s = replace(s, serving=_served(s, s.serving, again, of_request))
    utilization = again.utilization
    assumptions = s.assumptions if utilization is None else s.assumptions.of(utilization, "--vary")
    return replace(s, workload=workload_of(again, s.model), assumptions=assumptions, failures=failures_of(again))


def _settled(s: Setup, request: PlanRequest) -> PlanRequest:
    """Return a request in which everything that a plan chose is asked for, but the deployments."""
    numbers = {"seq_len": s.workload.seq_len, "batch": s.workload.batch}
    if s.serving is not None:
        w = s.serving.workload
        numbers |= {"context": w.context, "sequences": w.sequences, "prompt": w.prompt}
    whole = {name: round(number.value) for name, number in numbers.items()}
    return replace(request, **whole, tokens=s.workload.tokens.value)


def _served(s: Setup, served: Served, again: PlanRequest, changes: Mapping[str, Any]) -> Served:
    """Return what is served after some changes; deployments stay but for what was changed of them."""

    def stage(name: Stage, made: ChosenDeployment) -> ChosenDeployment:
        old = made.deployment
        weight, cache = again.weight_dtype or old.weight_dtype, changes.get("cache_dtype", old.cache_dtype)
        sizes = [changes.get(f"{name}_{size}") for size in ("gpus", "tensor", "redundant")]
        if not any(size is not None for size in sizes):
            return replace(made, deployment=in_dtypes(old, weight, cache))
        gpus = sizes[0] or round(old.expert_parallel.value)
        tensor = sizes[1] or round(old.tensor_parallel.value)
        serving = Serving(m=s.m, hardware=s.hardware, workload=served.workload, weight_dtype=weight, cache_dtype=cache)
        return choose_deployment(serving, name, gpus, tensor, sizes[2])

    workload = served_workload(again, s.m, again.sequences or round(served.workload.sequences.value))
    return Served(decode=stage("decode", served.decode), prefill=stage("prefill", served.prefill), workload=workload)


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _found(plan: Plan, name: str) -> Anything | None:
    try:
        return find(plan.all.values(), name)
    except ValueError:
        return None


def _that_differ(variation: Variation) -> tuple[str, ...]:
    """Return the figures of COMPARED that are not the same in all plans: first those that differ along every axis."""
    along = {name: sum(_differs(variation, name, axis) for axis in range(len(variation.axes))) for name in COMPARED}
    found = sorted((name for name in COMPARED if along[name]), key=lambda name: -along[name])
    return tuple(
        found or [name for name in COMPARED if any(variation.figure(name, place) for place in variation.plans)]
    )


def _differs(variation: Variation, name: str, axis: int) -> bool:
    """Return True if a figure has several values along an axis, all else equal."""
    values: dict[tuple[int, ...], set[float]] = {}
    for place in variation.plans:
        figure = variation.figure(name, place)
        if figure is not None:
            values.setdefault(place[:axis] + place[axis + 1 :], set()).add(figure.value)
    return any(len(found) > 1 for found in values.values())
