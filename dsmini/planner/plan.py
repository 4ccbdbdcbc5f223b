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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import NUMBERS, OnPart, load_hardware, quiet
from dsmini.planner.model import ModelSizes, cache_figures, model_figures, weight_figures
from dsmini.planner.request import PlanRequest, Setup, check
from dsmini.planner.serving import STAGES, demands, deployment_figures, deployment_rules, serving_figures
from dsmini.planner.setup import changed
from dsmini.planner.training import FAILURES, PARTS, failure_figures, run_figures, training_figures
from dsmini.planner.words import find
from dsmini.reading import brief

SECTIONS = ("model", "training", "reliability", "inference")
LAYOUT_INPUTS = ("gpus", "pipeline", "expert", "tensor", "micro_batch", "batch", "seq_len", "tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All figures of a plan."""

    setup: Setup
    sheet: Sheet
    waits: Mapping[str, Mapping[str, float]]
    """Seconds of the parts of a step by their words: of training, and of decode and prefill if serving has a plan."""

    @property
    def fits(self) -> bool:
        """True if every GPU has the memory for training. The need is a lower bound, so leave room."""
        return self.sheet.memory_free >= 0

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by name, inputs not among them."""
        return {name: f for section in SECTIONS for name, f in self.sheet.section(section).items()}

    def longest(self, stage: str) -> list[str]:
        """Return the parts of a step, the longest first, which binds."""
        return sorted(self.waits[stage], key=lambda part: -self.waits[stage][part])

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
    put(*LAYOUT_INPUTS, *r.given((*FAILURES, "utilization")))
    model_figures(s, c)
    cache_figures(s, c, r.cache_dtype or "bfloat16")
    weight_figures(s, c, r.weight_dtype or "bfloat16")
    training_figures(s, c, hardware, r)
    run_figures(s, hardware, r)
    waits = {"training": {words: float(getattr(s, part)) for part, words in PARTS.items()}}
    if s.memory_free >= 0:
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
        for stage in STAGES:
            waits[stage] = {words: float(time) for words, time in demands(s.each(f"{stage}_{{}}")).items()}
    return Plan(setup=made, sheet=s, waits=waits)


# --- variation

MOST_VALUES = 400
"""Most plans of a variation."""
COMPARED = (
    *("parameters_main", "parameters_active", "kv_cache", "memory_needed", "step_seconds", "mfu", "training_time"),
    *("training_cost", "decode_sequences", "decode_time_per_token", "decode_gpu_tokens_per_second"),
    *("decode_sequences_that_fit", "decode_cost", "speculation_gain", "prefill_time_to_first_token", "elapsed_time"),
)
"""Figures that are compared where a plan is varied."""
Axis = tuple[str, tuple[Any, ...]]
"""One thing that is varied: its name and its values."""


def read_axis(text: str) -> Axis:
    """Read an axis such as "kv_lora_rank=128,256,512". Whether a value can be had, the model or the request says.

    Raises: ValueError for a text without values, and an unknown name with the nearest known ones.
    """
    name, _, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    require(bool(words), f"--vary {brief(text)} has no values; write it like kv_lora_rank=128,256,512")
    known = [field.name for kind in (ModelConfig, PlanRequest) for field in fields(kind)]
    known += [figure for figure, _ in NUMBERS.values()]
    near = " or ".join(difflib.get_close_matches(name, known, n=3))
    fix = f"did you mean {near}?" if near else "vary hardware, or a field of the model or of --help-all"
    require(name in known, f"unknown --vary name {brief(name)}; {fix}")
    return name, tuple(dict.fromkeys(map(_value, words)))


def _value(word: str) -> Any:
    """Return a word as a number, true, false or none, or as it is."""
    with contextlib.suppress(ValueError):
        number = float(word)
        return int(number) if number.is_integer() else number
    return {"true": True, "false": False, "none": None}.get(word, word)


def labels(values: Iterable[Any]) -> list[str]:
    """Return values of axes in words."""
    return [f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v) for v in values]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Plan of one value of each axis, or the reason why there is none."""

    values: Mapping[str, Any]
    """Value of each axis by its name."""
    plan: Plan | None = None
    problem: str = ""

    @property
    def at(self) -> str:
        """Names and values, in words."""
        return ", ".join(
            f"{name}={value}" for name, value in zip(self.values, labels(self.values.values()), strict=True)
        )

    def figure(self, name: str) -> Figure | None:
        """Return a figure of the plan; None where there is none."""
        return None if self.plan is None else self.plan.sheet.get(name)


def vary(
    made: Setup, axes: Sequence[Axis], names: Sequence[str] = (), on_part: OnPart = quiet
) -> tuple[list[Variant], list[str]]:
    """Return the variants of one axis, or of all pairs of two, and the names of the figures to compare.

    Args:
        names: these names; without any, those of COMPARED that differ.
        on_part: is told the share that is done and a short text, after each plan.

    Raises: ValueError for more than two axes, the same one twice, unknown hardware or figures, and if no value has a
        plan.
    """
    asked = [name for name, _ in axes]
    twice = len(axes) > 2 or len(set(asked)) < len(axes)
    require(not twice, f"--vary got {', '.join(asked)}; vary one thing, or two different ones")
    every = [dict(zip(asked, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]
    require(len(every) <= MOST_VALUES, f"--vary asks for {len(every):,} plans; use at most {MOST_VALUES}")
    machines = {values.get("hardware"): made.hardware for values in every}
    machines |= {name: load_hardware(name) for name in machines if name is not None}
    variants: list[Variant] = []
    for values in every:
        try:
            found = Variant(values=values, plan=plan(changed(made, values, machines[values.get("hardware")])))
        except ValueError as error:
            found = Variant(values=values, problem=str(error))
        variants.append(found)
        on_part(len(variants) / len(every), f"{len(variants)} of {len(every)} plans")
    plans = [each.plan for each in variants if each.plan is not None]
    require(bool(plans), variants[0].problem)
    for name in names:
        find([figure for each in plans for figure in each.sheet], name)
    values_of = {name: {f.value for each in variants if (f := each.figure(name)) is not None} for name in COMPARED}
    differ = [name for name in COMPARED if len(values_of[name]) > 1]
    return variants, list(names) or differ or [name for name in COMPARED if values_of[name]]
