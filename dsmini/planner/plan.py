"""Plan: all figures of a model on hardware, and what binds training, decode and prefill; and plans of several values.

    >>> plan = make_plan(PlanRequest(), Model.from_file(find_config(Path("deepseek-v3"))), load_hardware("h800"))
    >>> plan.run.training_cost

The order is: request, layout and deployments, figures, sentences, page. A value that a user leaves open comes from
the first that has it: the file's sections [train] and [serving], DeepSeek-V3's published run (presets.toml), what
search.py and deployments.py choose. A complete request is planned as it is. So another plan is one with a change.

Bottlenecks. The parts of a training step run one after the other: the longest one binds, and its share of the step
says how much. So do those of an estimate of serving; those of its bound overlap (serving.py).

Variation.

    kv_lora_rank=128,256,512        a field of the model
    hardware=h100,h800              hardware, by name or file
    slow_link=50e9,100e9            a number of the hardware, in base units, by the name of its figure
    gpus=512,1024,2048              a field of the request: layout, workload, serving, efficiencies, failures

The layout of training stays as the plan has it, so a difference has one cause. Deployments are searched again for each
value, on equal terms, where the user left them open. Values for which there is no plan, such as a pipeline that does
not divide the GPUs, are left out, and the reason is told.
"""

import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.planner.deployments import Deployments, resolve, search
from dsmini.planner.figure import Figure, Figures, check_name, figures_of, needed
from dsmini.planner.hardware import FIGURES, USER, Hardware, OnPart, load_hardware, quiet
from dsmini.planner.model import CacheFigures, ModelFigures, model_figures, sizes_of
from dsmini.planner.request import LAYOUT, SERVING, Inputs, Model, PlanRequest, presets
from dsmini.planner.run import Run
from dsmini.planner.search import Chosen, choose_layout
from dsmini.planner.serving import PHASES, Phase, Served, Service
from dsmini.planner.training import Training
from dsmini.reading import brief

WORKLOAD = "as DeepSeek-V3: V3 report, section 4.2"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All figures of a plan."""

    model: Model
    hardware: Hardware
    asked: PlanRequest
    """Request as it was before it was completed."""
    inputs: Inputs
    """Complete request but for deployments, which are searched again where they are open, and sources of its fields."""
    m: ModelFigures
    chosen: Chosen
    run: Run
    service: Service | None
    unusable: str
    """Reason why there is no service, in one sentence; "" if there is one."""

    @cached_property
    def _found(self) -> tuple[Mapping[Phase, Deployments], str]:
        if self.service is None:
            return {}, self.unusable
        try:
            return {phase: search(self.service, self.request, phase) for phase in PHASES}, ""
        except ValueError as error:
            return {}, str(error)

    @property
    def found(self) -> Mapping[Phase, Deployments]:
        """Deployments of both phases, searched when they are first asked for; none where serving has no plan."""
        return self._found[0]

    @property
    def unserved(self) -> str:
        """Reason why serving has no plan, in one sentence; "" if it has one."""
        return self._found[1]

    @property
    def request(self) -> PlanRequest:
        """Complete request."""
        return self.inputs.request

    @property
    def training(self) -> Training:
        """Figures of the layout."""
        return self.chosen.training

    @property
    def served(self) -> dict[Phase, Served]:
        """Main deployments of the phases that have one."""
        return {phase: each.main for phase, each in self.found.items() if each.every}

    @property
    def misfit(self) -> dict[str, str]:
        """Sentences about what does not fit, with what would: of training, decode and prefill."""
        training = {"training": self.chosen.misfit} if self.chosen.misfit else {}
        return training | {phase: each.misfit for phase, each in self.found.items() if each.misfit}

    @property
    def refused(self) -> str:
        """Sentence about a plan in which nothing fits; "" if training or serving does."""
        serving = self.unserved or next((each.misfit for each in self.found.values() if each.misfit), "")
        if not (self.chosen.misfit and serving):
            return ""
        return f"neither training nor serving fits: {self.chosen.misfit}. Serving: {serving}"

    @property
    def waits(self) -> dict[str, dict[str, float]]:
        """Seconds of the parts of a step by their words: of training, decode and prefill, as far as they fit."""
        training = {"training": self.training.parts} if self.training.fits else {}
        return training | {phase: each.waits for phase, each in self.served.items()}

    def longest(self, stage: str) -> list[str]:
        """Return the parts of a step, the longest first, which binds."""
        return sorted(self.waits[stage], key=lambda part: -self.waits[stage][part])

    @cached_property
    def figures(self) -> Figures:
        """Figures of all sections by name, and the inputs that they need."""
        return {name: figure for section in self.sections.values() for name, figure in section.items()}

    @cached_property
    def sections(self) -> dict[str, dict[str, Figure]]:
        """Figures by section and name, and the inputs that they need.

        Training that does not fit has those of its memory alone, and where anything does not fit nothing has a price.
        """
        found = self.every
        if not self.training.fits:
            of = found["training"]
            names = [n for name in ("memory_needed", "memory_free") for n in needed(of, name)]
            found = {**found, "training": {name: of[name] for name in names}}
        if not self.misfit:  # next to one a price could be read as the price of what was asked
            return found
        return {name: {n: f for n, f in of.items() if f.unit[:1] != "$"} for name, of in found.items()}

    @cached_property
    def every(self) -> dict[str, dict[str, Figure]]:
        """Figures by section and name, and the inputs that they need, also where their plan does not fit."""
        t, r = self.training, self.request
        training = t, t.exchange, self.run, t.fullest
        sizes = self.m.sizes | {name: self.inputs[name] for name in (*LAYOUT[:5], "micro_batch", "batch")}
        found = {
            "model": model_figures(self.m, r.weight_dtype or "bfloat16", r.cache_dtype or "bfloat16"),
            "training": {n: figure for part in training for n, figure in figures_of(part, sizes).items()},
        }
        for phase, each in self.served.items():
            parts, sizes = (each.memory, each.exchange, each.least, each), self.m.sizes | dict(each.d.figures)
            found[phase] = {n: figure for part in parts for n, figure in figures_of(part, sizes).items()}
        return found


def make_plan(
    request: PlanRequest, model: Model, hardware: Hardware, before: Plan | None = None, source: str = USER
) -> Plan:
    """Return the plan of a request.

    Args:
        before: plan of which this is a variation, whose complete request was changed.
        source: of the fields that are given, but for those that stay as before.

    Raises: ValueError with one sentence for choices that the model or the hardware cannot have.
    """
    if model.config.attention == "dsa" and model.run is not None and model.run.train.dsa_stage == "warmup":
        raise ValueError(f"{model.source} has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
    given = request.given(tuple(field.name for field in fields(request)))
    old = before.inputs.sources if before is not None else {}
    same = {name for name in given if before is not None and given[name] == getattr(before.request, name)}
    sources = {**dict.fromkeys(given, source), **{n: s for n, s in old.items() if n in same or n not in given}}
    if request.price is not None:
        hardware = hardware.having(sources["price"], {"gpu_price": request.price / 3600})
    inputs = _worked(Inputs(request=request, sources=sources), model)
    m = ModelFigures(model.config, inputs["seq_len"], sources.get("model", model.source))
    chosen = choose_layout(inputs, model, m, hardware)
    layout, how = chosen.training.layout, sources.get("layout", chosen.how)
    inputs = inputs.filled(how, **asdict(layout))
    inputs.sources["layout"] = how
    run = Run(chosen.training, inputs)
    if chosen.training.fits:
        run.check_failures()
    service, unusable = None, ""
    try:
        inputs = resolve(inputs, model, hardware)
        service = Service(m, inputs, hardware)
    except ValueError as error:
        unusable = str(error)
    asked = before.asked if before is not None else request
    plan = Plan(
        **{"model": model, "hardware": hardware, "asked": asked, "inputs": inputs, "m": m, "chosen": chosen},
        **{"run": run, "service": service, "unusable": unusable},
    )
    if before is None and request.given((*SERVING, "tpot", "ttft")) and plan.unserved:
        raise ValueError(plan.unserved)
    return plan


def model_alone(request: PlanRequest, model: Model, name: str) -> Figures:
    """Return the figures of a model, or of its cache where one has this name: they need no hardware and no layout."""
    weights = request.weight_dtype or model.released.weights or "bfloat16"
    cache = request.cache_dtype or model.released.cache or "bfloat16"
    if hasattr(CacheFigures, name):
        return figures_of(CacheFigures(model.config, cache), sizes_of(model.config, model.source))
    inputs = _worked(Inputs(request=request, sources={}), model)
    return model_figures(ModelFigures(model.config, inputs["seq_len"], model.source), weights, cache)


def _worked(inputs: Inputs, model: Model) -> Inputs:
    """Return the inputs with the training's sequences, steps and tokens."""
    run, longest, seq_len = model.run, model.config.max_seq_len, inputs.request.seq_len
    too_long = f"seq_len={seq_len} is longer than max_seq_len={longest} of {model.source}; shorten it"
    require(seq_len is None or seq_len <= longest, too_long)
    if run is not None:
        train = run.train
        fewer = (train.batch_size - (train.batch_start or train.batch_size)) / 2 * train.batch_ramp  # in equal steps
        tokens = train.steps * (train.batch_size - fewer) * run.seq_len
        sizes = {"seq_len": run.seq_len, "batch": train.batch_size, "tokens": tokens}
        return inputs.filled(f"the recipe [train] in {model.name}'s file", **sizes)
    work = presets()["deepseek-v3"]["workload"]
    return inputs.filled(WORKLOAD, **(work | {"seq_len": min(work["seq_len"], longest)}))


def changed(before: Plan, changes: Mapping[str, Any], hardware: Hardware, source: str = "--vary") -> Plan:
    """Return the plan with some changes of the request, of the model's sizes or of the hardware, all else as it is.

    The layout of training stays. Deployments are searched again, where the user left them open.

    Raises: ValueError for changes that the model or the hardware cannot have.
    """
    of_request = {name: value for name, value in changes.items() if name in PlanRequest.__slots__}
    of_hardware = {name: value for name, value in changes.items() if name in FIGURES}
    of_model = {name: value for name, value in changes.items() if name not in of_request | of_hardware}
    model, old = before.model, before
    if of_model:
        model = replace(model, config=replace(model.config, **of_model))
        sources = {**before.inputs.sources, "model": f"{source} and {model.source}"}
        old = replace(before, inputs=replace(before.inputs, sources=sources))
    again = {name: getattr(before.asked, name) for name in SERVING}  # searched again where they are open
    request = replace(before.request, **{**again, **of_request})
    return make_plan(request, model, hardware.having(source, of_hardware), old, source)


# --- variation

MOST_VALUES = 400
"""Most plans of a variation."""
COMPARED = (
    *("parameters_main", "parameters_active", "kv_cache", "memory_needed", "step_seconds", "mfu", "training_time"),
    *("training_cost", "training_cost_most", "elapsed_time", "model_bytes"),
    *(f"decode_{name}" for name in ("gpus", "tensor", "batch", "micro_batches", "drafts", "time", "least_time")),
    *(f"{phase}_{n}" for phase in PHASES for n in ("gpu_tokens_per_second", "most_gpu_tokens_per_second")),
    *(f"{phase}_{n}" for phase in PHASES for n in ("cost", "cost_most")),
)
"""Figures that are compared where a plan is varied."""
Axis = tuple[str, tuple[Any, ...]]
"""One thing that is varied: its name and its values."""


def read_axis(text: str) -> Axis:
    """Read an axis such as "kv_lora_rank=128,256,512". The model or the request checks the values.

    Raises: ValueError for a text without values, and an unknown name with the nearest known ones.
    """
    name, _, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    require(bool(words), f"--vary {brief(text)} has no values; write it like kv_lora_rank=128,256,512")
    known = [field.name for kind in (ModelConfig, PlanRequest) for field in fields(kind)]
    known += FIGURES
    near = " or ".join(difflib.get_close_matches(name, known, n=3))
    fix = f"did you mean {near}?" if near else "vary hardware, or a field of the model or of --help-all"
    require(name in known, f"unknown --vary name {brief(name)}; {fix}")
    return name, tuple(dict.fromkeys(map(_value, words)))


def _value(word: str) -> Any:
    """Return a word as a number, true, false or none, or as it is. Raises: ValueError for infinity and no number."""
    try:
        number = float(word)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(word, word)
    require(math.isfinite(number), f"--vary got {brief(word)}, which is not a finite number; use one such as 512")
    return int(number) if number.is_integer() else number


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
        return ", ".join(f"{n}={v:,}" if type(v) is int else f"{n}={v}" for n, v in self.values.items())


def vary(
    before: Plan, axes: Sequence[Axis], names: Sequence[str] = (), on_part: OnPart = quiet
) -> tuple[list[Variant], list[str]]:
    """Return the variants of one axis, or of all pairs of two, and the names of the figures to compare.

    Args:
        names: these names; without any, those of COMPARED that differ.

    Raises: ValueError for more than two axes, the same one twice, unknown hardware or figures, and if no value has a
        plan.
    """
    asked = [name for name, _ in axes]
    twice = len(axes) > 2 or len(set(asked)) < len(axes)
    require(not twice, f"--vary got {', '.join(asked)}; vary one thing, or two different ones")
    every = [dict(zip(asked, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]
    require(len(every) <= MOST_VALUES, f"--vary asks for {len(every):,} plans; use at most {MOST_VALUES}")
    machines = {values.get("hardware"): before.hardware for values in every}
    machines |= {name: load_hardware(name) for name in machines if name is not None}
    makers = [(values, partial(changed, before, values, machines[values.get("hardware")])) for values in every]
    variants = side_by_side(makers, on_part)
    return variants, compared(variants, names)


def side_by_side(
    makers: Sequence[tuple[Mapping[str, Any], Callable[[], Plan]]], on_part: OnPart = quiet
) -> list[Variant]:
    """Return the plans of some values, or why there are none.

    Args:
        makers: values, and the function that plans them.
        on_part: is told the share that is done and a short text, after each plan.
    """
    variants: list[Variant] = []
    for values, make in makers:
        try:
            variants.append(Variant(values=values, plan=make()))
        except ValueError as error:
            variants.append(Variant(values=values, problem=str(error)))
        on_part(len(variants) / len(makers), f"{len(variants)} of {len(makers)} plans")
    return variants


def compared(variants: Sequence[Variant], names: Sequence[str] = ()) -> list[str]:
    """Return the names of the figures to compare. Raises: ValueError for unknown ones, and if nothing has a plan."""
    plans = [each.plan for each in variants if each.plan is not None]
    require(bool(plans), variants[0].problem)
    known = {name for each in plans for of in each.every.values() for name in of}
    for name in names:
        check_name(known, name)
    values_of = {name: {each.figures.get(name) for each in plans} for name in COMPARED}
    differ = [name for name in COMPARED if len(values_of[name]) > 1]
    return list(names) or differ or [name for name in COMPARED if values_of[name] != {None}]
