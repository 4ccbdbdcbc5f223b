"""Variation: the same plan for several values of a model's size, of the hardware, of the layout or of the workload.

    kv_lora_rank=128,256,512        a field of the model
    hardware=h100,h800              hardware, by name or file
    gpus=512,1024,2048              a field of the request: layout, workload, serving, failures

Everything else stays as the plan has it: with other hardware the layout is the same one. So a difference has one
cause. Only the number of sequences follows a longer context, where the user left it open. Values for which there is
no plan, such as a pipeline that does not divide the GPUs, are left out, and the reason is told.

Worked example: kv_lora_rank=256,512 gives a cache of (256 + 64) * 61 * 2 = 39,040 and of 70,272 bytes a token.
"""

import contextlib
import difflib
import itertools
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsmini.config import ModelConfig
from dsmini.planner.display import short
from dsmini.planner.explanation import find, named
from dsmini.planner.figure import Figure
from dsmini.planner.hardware import OnPart, load_hardware, quiet
from dsmini.planner.plan import Plan, changed, plan
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Setup
from dsmini.reading import brief

UNFIT = "! "
"""Mark of a figure whose plan does not fit."""
MOST_VALUES = 400
"""Most plans of a variation."""
COMPARED = (
    *("parameters_main", "parameters_active", "kv_cache", "memory_needed", "process_memory", "step_seconds"),
    *("roof_step_seconds", "training_days", "training_cost", "decode_sequences", "decode_time_per_token"),
    *("decode_gpu_tokens_per_second", "decode_sequences_that_fit", "decode_cost", "prefill_time_to_first_token"),
    "elapsed_time",
)
"""Figures that are compared where a plan is varied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariedAxis:
    """One thing that is varied."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """Values in words."""
        return [f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v) for v in self.values]

    @property
    def numeric(self) -> bool:
        """True if all values are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)


def read_axis(text: str) -> VariedAxis:
    """Read an axis such as "kv_lora_rank=128,256,512".

    Raises: ValueError for a text without values, an unknown name with the nearest known ones, and a value of a wrong
        type.
    """
    name, equals, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    if not equals or not words:
        raise ValueError(f"--vary {brief(text)} has no values; write it like kv_lora_rank=128,256,512")
    hints = typing.get_type_hints(ModelConfig) | typing.get_type_hints(PlanRequest)  # precision is the request's
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=3)
        fix = (
            f"did you mean {' or '.join(near)}?" if near else "vary hardware, or a field of the model or of --help-all"
        )
        raise ValueError(f"unknown --vary name {brief(name)}; {fix}")
    return VariedAxis(name=name, values=tuple(dict.fromkeys(_value(name, word, hints[name]) for word in words)))


def _value(name: str, word: str, hint: Any) -> Any:
    """Return a word as a value of a type."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    options: dict[str, Any] = {"true": True, "false": False} if bool in choices else {}
    for choice in choices:
        if typing.get_origin(choice) is typing.Literal:
            options |= {str(option): option for option in typing.get_args(choice)}
    known = options | ({"none": None} if type(None) in choices else {})
    if word in known or str in choices:
        return known.get(word, word)
    whole = word.lstrip("+-").isdigit()
    with contextlib.suppress(ValueError):
        if float in choices:
            return float(word)
        if int in choices and (whole or float(word).is_integer()):
            return int(word) if whole else int(float(word))
    fix = f"use {'' if bool in choices else 'one of '}{(' or ' if bool in choices else ', ').join(options)}"
    raise ValueError(
        f"--vary {name} has the value {brief(word)}, which it cannot have; {fix if options else 'use numbers like 128'}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """Plans of all values of one axis, or of all pairs of two."""

    axes: tuple[VariedAxis, ...]
    plans: Mapping[tuple[int, ...], Plan]
    """Plans by the places of their values on the axes."""
    problems: Mapping[tuple[int, ...], str]
    """Reasons why there is no plan."""
    names: tuple[str, ...] = ()
    """Figures that are compared."""

    def found(self, name: str) -> dict[tuple[int, ...], Figure]:
        """Return a figure in all plans that have it, by place."""
        return {place: f for place, plan in self.plans.items() if (f := plan.sheet.get(name)) is not None}

    def cell(self, name: str, place: tuple[int, ...]) -> str:
        """Return a figure at a place in words, with a mark if its plan does not fit; "" without one."""
        figure = self.found(name).get(place)
        return "" if figure is None else (UNFIT if self.plans[place].unfit(name) else "") + short(figure)

    def at(self, place: tuple[int, ...]) -> str:
        """Return the values at a place, in words."""
        return ", ".join(f"{axis.name}={axis.labels[i]}" for axis, i in zip(self.axes, place, strict=True))

    def differs(self, name: str, axis: int) -> bool:
        """Return whether a figure has several values along an axis, all else equal."""
        values: dict[tuple[int, ...], set[float]] = {}
        for place, figure in self.found(name).items():
            values.setdefault(place[:axis] + place[axis + 1 :], set()).add(figure.value)
        return any(len(several) > 1 for several in values.values())


def vary(made: Setup, axes: Sequence[VariedAxis], names: Sequence[str] = (), on_part: OnPart = quiet) -> Variation:
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
    machines = {value: load_hardware(value) for axis in axes if axis.name == "hardware" for value in axis.values}
    plans: dict[tuple[int, ...], Plan] = {}
    problems: dict[tuple[int, ...], str] = {}
    for done, place in enumerate(places):
        changes = {axis.name: axis.values[i] for axis, i in zip(axes, place, strict=True)}
        try:
            hardware = machines.get(changes.get("hardware"), made.hardware)
            plans[place] = plan(changed(made, changes, hardware))
        except ValueError as error:
            problems[place] = str(error)
        on_part((done + 1) / len(places), f"{done + 1} of {len(places)} plans")
    if not plans:
        raise ValueError(next(iter(problems.values())))
    known = named(figure for each in plans.values() for figure in each.sheet) if names else {}
    for name in names:
        find(known.values(), name)
    found = Variation(axes=tuple(axes), plans=plans, problems=problems, names=tuple(names))
    return found if names else replace(found, names=_that_differ(found))


def _that_differ(variation: Variation) -> tuple[str, ...]:
    """Return the figures of COMPARED that are not the same in all plans: first those that differ along every axis."""
    along = {name: sum(variation.differs(name, axis) for axis in range(len(variation.axes))) for name in COMPARED}
    found = sorted((name for name in COMPARED if along[name]), key=lambda name: -along[name])
    return tuple(found or (name for name in COMPARED if variation.found(name)))
