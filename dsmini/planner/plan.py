"""Plan: all figures of a model on hardware, and what binds training, decode and prefill; and plans of several values.

    >>> made = setup(PlanRequest(hardware="h800"), Model.from_file(find_config("deepseek-v3")), load_hardware("h800"))
    >>> plan(made).sheet.training_cost

A plan is a function of its setup alone. To vary, search or compare, change a request and plan it.

What binds. The parts of a training step run one after the other: the longest one binds, and its share of the step says
how much. The parts of serving overlap, so a step takes as long as the slowest one. Making it faster gains at most its
ratio to the second, which begins to bind then: with 14 ms on links, 7 ms in memory and 2 ms of compute, links bind, 2
times the memory's time.

Variation.

    kv_lora_rank=128,256,512        a field of the model
    hardware=h100,h800              hardware, by name or file
    slow_link=50e9,100e9            a number of the hardware, in base units, by the name of its figure
    gpus=512,1024,2048              a field of the request: layout, workload, serving, failures

Everything else stays as the plan has it: with other hardware the layout is the same one. So a difference has one
cause. Only the number of sequences follows a longer context, where the user left it open. Values for which there is
no plan, such as a pipeline that does not divide the GPUs, are left out, and the reason is told.
"""

import contextlib
import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dsmini.config import ModelConfig
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import NUMBERS, OnPart, load_hardware, quiet
from dsmini.planner.model import ModelSizes, cache_figures, model_figures, weight_figures
from dsmini.planner.request import PlanRequest, Setup, check
from dsmini.planner.serving import STAGES, demands, deployment_figures, deployment_rules, serving_figures
from dsmini.planner.setup import changed
from dsmini.planner.training import FAILURES, PARTS, failure_figures, run_figures, training_figures
from dsmini.planner.words import find, in_unit
from dsmini.reading import brief

SECTIONS = ("model", "training", "reliability", "inference")
LAYOUT_INPUTS = ("gpus", "pipeline", "expert", "tensor", "micro_batch", "batch", "seq_len", "tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """Resource that binds, and how much."""

    first: str
    words: str
    """Sentence without its full stop: the first, by how much, and what is next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All figures of a plan."""

    setup: Setup
    sheet: Sheet
    binds: Mapping[str, Binding]
    """Bindings of training, and of decode and prefill if serving has a plan."""

    @property
    def fits(self) -> bool:
        """True if every GPU has the memory for training. The need is a lower bound, so leave room."""
        return self.sheet.memory_free >= 0

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by name, inputs not among them."""
        return {name: f for section in SECTIONS for name, f in self.sheet.section(section).items()}

    def unfit(self, name: str) -> bool:
        """Return whether a figure is of training or of a deployment that the memory of a GPU does not hold."""
        section = self.sheet.get(name).title.section
        if section == "inference":
            return ("prefill" if name.startswith("prefill") else "decode") in self.setup.misfit
        return section in ("training", "reliability") and not self.fits


def plan(made: Setup) -> Plan:
    """Return the plan of a setup.

    Raises: ValueError with one sentence for what the model or the hardware cannot have.
    """
    r, hardware, config, s = made.request, made.hardware, made.model.config, Sheet()
    c: Any = ModelSizes(config, s, made.sources.get("model", made.model.source))

    def put(*names: str) -> None:
        for name in names:
            s.put(name, getattr(r, name), made.sources[name])

    hardware.put(s)
    put(*LAYOUT_INPUTS)
    model_figures(s, c)
    cache_figures(s, c, r.cache_dtype or "bfloat16")
    weight_figures(s, c, r.weight_dtype or "bfloat16")
    training_figures(s, c, hardware, r)
    run_figures(s, hardware, r, None if r.utilization is None else (r.utilization, made.sources["utilization"]))
    parts = {words: float(getattr(s, part)) / float(s.parts_seconds) for part, words in PARTS.items()}
    first, second, *_ = sorted(parts, key=lambda words: -parts[words])
    said = f"{first}, {100 * parts[first]:.0f} % of a step; next: {second}, {100 * parts[second]:.0f} %"
    binds = {"training": Binding(first=first, words=said)}
    if s.memory_free >= 0:
        put(*r.given(tuple(FAILURES)))
        failure_figures(s)
        s.elapsed_time = s.training_time / s.effective_share
        if s.get("training_cost") is not None:
            s.elapsed_cost = s.training_cost / s.effective_share
    if made.served:
        put("context", "sequences", "prompt", *(("drafts", "acceptance") if config.n_mtp_layers and r.drafts else ()))
        deployments = {stage: made.deployment(stage) for stage in STAGES}
        for stage, deployment in deployments.items():
            check(deployment_rules(deployment, config, hardware))
            deployment_figures(s, c, deployment, made.sources[stage])
        serving_figures(s, c, hardware, r.weight_dtype or "bfloat16", *deployments.values())
        binds |= {stage: _slowest(s.each(f"{stage}_{{}}")) for stage in STAGES}
    return Plan(setup=made, sheet=s, binds=binds)


def _slowest(t: Sheet) -> Binding:
    """Return what binds a step whose parts overlap."""
    times = demands(t)
    first, second, *_ = sorted(times, key=lambda words: -float(times[words]))
    gain = in_unit(float(times[first] / times[second]), "")
    return Binding(first=first, words=f"{first}: without it at most {gain} times as fast; next: {second}")


# --- variation

MOST_VALUES = 400
"""Most plans of a variation."""
COMPARED = (
    *("parameters_main", "parameters_active", "kv_cache", "memory_needed", "step_seconds", "mfu", "training_time"),
    *("training_cost", "decode_sequences", "decode_time_per_token", "decode_gpu_tokens_per_second"),
    *("decode_sequences_that_fit", "decode_cost", "speculation_gain", "prefill_time_to_first_token", "elapsed_time"),
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
    known += [figure for figure, _ in NUMBERS.values()]
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
    names: tuple[str, ...]
    """Figures that are compared."""

    def found(self, name: str) -> dict[Place, Figure]:
        """Return a figure in all plans that have it, by place."""
        return _found(self.plans, name)

    def at(self, place: Place) -> str:
        """Return the values at a place, in words."""
        return ", ".join(f"{axis.name}={axis.labels[i]}" for axis, i in zip(self.axes, place, strict=True))


def _found(plans: Mapping[Place, Plan], name: str) -> dict[Place, Figure]:
    return {place: f for place, plan in plans.items() if (f := plan.sheet.get(name)) is not None}


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
    differ = [name for name in COMPARED if len({figure.value for figure in _found(plans, name).values()}) > 1]
    shown = tuple(names or differ or (name for name in COMPARED if _found(plans, name)))
    return Variation(axes=tuple(axes), plans=plans, problems=problems, names=shown)
