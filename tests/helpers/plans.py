"""Plans for tests, asked for as a user asks: by a config, hardware and choices. And the formulas that explain them."""

import ast
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmini.planner.figure import Figure
from dsmini.planner.hardware import Hardware, load_hardware
from dsmini.planner.layout import check, rules
from dsmini.planner.plan import Plan, make_plan
from dsmini.planner.request import Inputs, Model, PlanRequest
from dsmini.planner.run import Run
from dsmini.planner.search import Chosen
from dsmini.planner.training import Training
from tests.helpers.configs import CONFIGS

INVENTED = Path(__file__).parents[1] / "planner" / "invented.toml"
CHOICES = {field.name for field in dataclasses.fields(PlanRequest)}
FIGURES = {"memory": "gpu_memory", "price": "gpu_price"}
FIGURES |= {dtype: f"peak_{dtype}" for dtype in ("float32", "bfloat16", "fp8", "fp4", "int8")}


def hardware_of(words: str) -> Hardware:
    """Return hardware with some numbers multiplied, such as "h800 memory*0.5"; times 0 it has none."""
    name, *changes = words.split()
    made = load_hardware(INVENTED if name == "invented" else name)
    numbers = dict(made.numbers)
    for change in changes:
        field, factor = change.split("*")
        key = FIGURES.get(field, field)
        if not float(factor):
            del numbers[key]
        elif key in numbers:
            old = numbers[key]
            numbers[key] = Figure(key, old * float(factor), old.unit, old.title, old.source)
    return Hardware(made.name, made.title, numbers)


def read(words: str) -> tuple[Model, Hardware, PlanRequest]:
    """Read what is planned: a config of configs/, hardware after @, its changes, choices, and sizes of the model.

    >>> read("deepseek-v3 @h800 memory*0.5 gpus=64 n_layers=60")
    """
    config, *rest = words.split()
    hardware = next((word[1:] for word in rest if word.startswith("@")), "h800")
    given: dict[str, Any] = {}
    for name, value in (word.split("=") for word in rest if "=" in word):
        try:
            given[name] = float(value) if value in ("nan", "inf") else ast.literal_eval(value)
        except (SyntaxError, ValueError):
            given[name] = value
    choices: dict[str, Any] = {name: value for name, value in given.items() if name in CHOICES}
    sizes = {name: value for name, value in given.items() if name not in CHOICES}
    model = Model.from_file(CONFIGS / f"{config}.toml")
    # lines break where a path is long, so sources name the file as from the root
    source, other = f"configs/{config}.toml", dataclasses.replace(model.config, **sizes)
    model = dataclasses.replace(model, config=other, source=source)
    machine = hardware_of(" ".join([hardware, *(word for word in rest if "*" in word)]))
    return model, machine, PlanRequest(hardware=hardware, **choices)


@functools.lru_cache(maxsize=32)
def plan_of(words: str) -> Plan:
    model, hardware, request = read(words)
    return make_plan(request, model, hardware)


def every_of(plan: Plan) -> dict[str, Figure]:
    """Return the figures of a plan, and all inputs that they are computed from, by name, also where it does not fit."""
    return {name: figure for of in plan.every.values() for name, figure in of.items()}


@functools.cache
def values_of(words: str) -> dict[str, float]:
    """Return the values of every_of."""
    return {name: float(figure) for name, figure in every_of(plan_of(words)).items()}


def trained_in(plan: Plan, **layout: Any) -> Training:
    """Return the training of a plan in another layout. Raises: ValueError for one that it cannot have."""
    other = dataclasses.replace(plan.training.layout, **layout)
    check(rules(other, plan.model.config, plan.hardware.gpus_per_node))
    return Training(plan.m, plan.hardware, plan.inputs, other)


def run_of(plan: Plan, gpus: int, **choices: Any) -> Run:
    """Return the run of a plan on other GPUs in its layout, also where they do not divide, with other choices."""
    inputs = Inputs(request=dataclasses.replace(plan.request, **choices), sources=plan.inputs.sources)
    layout = dataclasses.replace(plan.training.layout, gpus=gpus)
    return Run(Training(plan.m, plan.hardware, inputs, layout), inputs)


def in_layout(plan: Plan, **layout: Any) -> dict[str, float]:
    """Return the training figures of a plan in another layout, as trained_in."""
    found = dataclasses.replace(plan, chosen=Chosen(trained_in(plan, **layout), "a test"))
    return {name: float(figure) for name, figure in found.every["training"].items()}


FUNCTIONS = {"max": max, "min": min, "exp": math.exp, "sqrt": math.sqrt, "ceil": math.ceil, "floor": math.floor}


def computed(formula: str, values: Mapping[str, float]) -> float:
    """Return what Python alone makes of a formula."""
    return eval(formula, {"__builtins__": {}, **FUNCTIONS}, dict(values))
