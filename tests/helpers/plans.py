"""Plans for tests, asked for as a user asks: by a config, hardware and choices. And the formulas that explain them."""

import ast
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from dsmini.planner.exchange import places_hit
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import Hardware, load_hardware
from dsmini.planner.plan import Plan, plan
from dsmini.planner.request import Model, PlanRequest, Setup
from dsmini.planner.search import layout_figures
from dsmini.planner.setup import changed, setup
from dsmini.planner.words import named, step_of
from tests.helpers.configs import CONFIGS
from tests.helpers.pages import check_page

INVENTED = Path(__file__).parents[1] / "planner" / "invented.toml"
CHOICES = {field.name for field in dataclasses.fields(PlanRequest)}
FIGURES = {"memory": "gpu_memory", "price": "gpu_price"}
FIGURES |= {dtype: f"peak_{dtype}" for dtype in ("float32", "bfloat16", "fp8")}


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
            value, source = numbers[key]
            numbers[key] = (value * float(factor), source)
    return dataclasses.replace(made, numbers=numbers)


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
def setup_of(words: str) -> Setup:
    """Return the setup of a plan in words; see read."""
    model, hardware, request = read(words)
    return setup(request, model, hardware)


@functools.lru_cache(maxsize=16)  # what is collected takes no time of the garbage collector
def plan_of(words: str) -> Plan:
    return plan(setup_of(words))


@functools.lru_cache(maxsize=16)
def figures_of(words: str) -> dict[str, Figure]:
    """Return the figures of a plan, and all inputs that they are computed from, by name."""
    return named(plan_of(words).figures.values())


@functools.cache
def values_of(words: str) -> dict[str, float]:
    return {name: figure.value for name, figure in figures_of(words).items()}


def in_layout(made: Setup, **layout: Any) -> Sheet:
    """Return the training figures of a setup in another layout, as plain numbers."""
    return layout_figures(made.asking(**layout))


def planned_with(made: Setup, **changes: Any) -> Plan:
    """Return the plan of a setup with some changes."""
    return plan(changed(made, changes, made.hardware))


FUNCTIONS = {"max": max, "min": min, "exp": math.exp, "sqrt": math.sqrt, "ceil": math.ceil, "floor": math.floor}
FUNCTIONS["places_hit"] = places_hit


class Formulas:
    """Formulas of figures as their explanations write them, computed by Python alone."""

    def __init__(self, figures: Iterable[Figure]) -> None:
        self.steps = {f.name: step_of(f) for f in named(figures).values() if f.op != "input"}
        self._code: dict[str, CodeType] = {
            name: compile(python(step.formula), name, "eval") for name, step in self.steps.items()
        }

    def values(self, inputs: Mapping[str, float], names: Iterable[str] | None = None) -> dict[str, float]:
        """Return the values of some figures, or of all, that these inputs give, and all that they need."""
        known = dict(inputs)
        todo = list(self.steps if names is None else names)
        while todo:
            name = todo[-1]
            missing = [] if name in known else [need for need in self.steps[name].needs if need not in known]
            todo += missing
            if not missing:
                todo.pop()
            if not missing and name not in known:
                known[name] = eval(self._code[name], {"__builtins__": {}, **FUNCTIONS}, known)
        return known


def python(formula: str) -> str:
    """Return a formula of an explanation in Python; large numbers are written in words there."""
    code = formula.replace("×", "*").replace("^", "**").replace("1 trillion", "1e12")  # noqa: RUF001
    return re.sub(r"(?<=\d),(?=\d{3})", "", code)


PAGES = Path(__file__).parents[1] / "planner" / "pages"


def same_page(name: str, text: str) -> None:
    """Compare a text with its snapshot, without spaces at the ends of lines."""
    check_page(PAGES / f"{name}.txt", "".join(f"{line.rstrip()}\n" for line in text.strip().splitlines()))
