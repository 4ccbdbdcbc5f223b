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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dsmini.config import ModelConfig
from dsmini.planner.display import short
from dsmini.planner.explanation import find
from dsmini.planner.figure import Figure
from dsmini.planner.hardware import OnPart, load_hardware, quiet
from dsmini.planner.plan import Plan, plan
from dsmini.planner.request import PlanRequest, Setup
from dsmini.planner.setup import changed
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
Place = tuple[int, ...]
"""Places of a plan's values on the axes."""


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
    """Read an axis such as "kv_lora_rank=128,256,512". Whether a value can be had, the model or the request says.

    Raises: ValueError for a text without values, and an unknown name with the nearest known ones.
    """
    name, _, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    if not words:
        raise ValueError(f"--vary {brief(text)} has no values; write it like kv_lora_rank=128,256,512")
    known = [field.name for kind in (ModelConfig, PlanRequest) for field in fields(kind)]
    if name not in known:
        near = " or ".join(difflib.get_close_matches(name, known, n=3))
        fix = f"did you mean {near}?" if near else "vary hardware, or a field of the model or of --help-all"
        raise ValueError(f"unknown --vary name {brief(name)}; {fix}")
    return VariedAxis(name=name, values=tuple(dict.fromkeys(map(_value, words))))


def _value(word: str) -> Any:
    """Return a word as a number, true, false or none, or as it is."""
    with contextlib.suppress(ValueError):
        number = float(word)
        return int(number) if number.is_integer() else number
    return {"true": True, "false": False, "none": None}.get(word, word)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """Plans of all values of one axis, or of all pairs of two."""

    axes: tuple[VariedAxis, ...]
    plans: Mapping[Place, Plan]
    problems: Mapping[Place, str]
    """Reasons why there is no plan."""
    names: tuple[str, ...] = ()
    """Figures that are compared."""

    def found(self, name: str) -> dict[Place, Figure]:
        """Return a figure in all plans that have it, by place."""
        return {place: f for place, plan in self.plans.items() if (f := plan.sheet.get(name)) is not None}

    def cell(self, name: str, place: Place) -> str:
        """Return a figure at a place in words, with a mark if its plan does not fit; "" without one."""
        figure = self.found(name).get(place)
        return "" if figure is None else (UNFIT if self.plans[place].unfit(name) else "") + short(figure)

    def at(self, place: Place) -> str:
        """Return the values at a place, in words."""
        return ", ".join(f"{axis.name}={axis.labels[i]}" for axis, i in zip(self.axes, place, strict=True))

    def differs(self, name: str, axis: int) -> bool:
        """Return whether a figure has several values along an axis, all else equal."""
        values: dict[Place, set[float]] = {}
        for place, figure in self.found(name).items():
            values.setdefault(place[:axis] + place[axis + 1 :], set()).add(figure.value)
        return any(len(several) > 1 for several in values.values())


def vary(made: Setup, axes: Sequence[VariedAxis], names: Sequence[str] = (), on_part: OnPart = quiet) -> Variation:
    """Return the plans of one axis, or of all pairs of two.

    Args:
        names: figures to compare; without any, those of COMPARED that differ, first those that do along every axis.
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
    plans, problems = dict[Place, Plan](), dict[Place, str]()
    for done, place in enumerate(places, 1):
        changes = {axis.name: axis.values[i] for axis, i in zip(axes, place, strict=True)}
        try:
            plans[place] = plan(changed(made, changes, machines.get(changes.get("hardware"), made.hardware)))
        except ValueError as error:
            problems[place] = str(error)
        on_part(done / len(places), f"{done} of {len(places)} plans")
    if not plans:
        raise ValueError(next(iter(problems.values())))
    for name in names:
        find([figure for each in plans.values() for figure in each.sheet], name)
    found = Variation(axes=tuple(axes), plans=plans, problems=problems, names=tuple(names))
    along = {name: sum(found.differs(name, axis) for axis in range(len(axes))) for name in COMPARED}
    differ = sorted((name for name in COMPARED if along[name]), key=lambda name: -along[name])
    return found if names else replace(found, names=tuple(differ or (n for n in COMPARED if found.found(n))))
