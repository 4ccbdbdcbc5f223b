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

from dsmini.planner.hardware import Hardware, load_hardware
from dsmini.planner.quantities.explanation import explain
from dsmini.planner.quantities.formula import walk
from dsmini.planner.quantities.quantity import Anything, Quantity
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, Setup, setup
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.training_plan import training_plan
from dsmini.planner.whole import Plan, whole_plan
from tests.helpers.configs import CONFIGS
from tests.helpers.pages import check_page

INVENTED = Path(__file__).parents[1] / "planner" / "invented.toml"
CHOICES = {field.name for field in dataclasses.fields(PlanRequest)}
Values = Mapping[str, float]


def hardware_of(words: str) -> Hardware:
    """Return hardware with some numbers multiplied, such as "h800 memory*0.5"; times 0 it has none."""
    name, *changes = words.split()
    made = load_hardware(INVENTED if name == "invented" else name)

    def times(old: Anything | None, factor: float) -> Any:
        labels = old and (old.name, old.title, old.source)
        return Quantity(old.value * factor, old.unit, "input", (), labels) if old and labels and factor else None

    for change in changes:
        field, factor = change.split("*")
        if field in made.peaks:
            peaks = {**made.peaks, field: times(made.peaks[field], float(factor))}
            made = dataclasses.replace(made, peaks={dtype: peak for dtype, peak in peaks.items() if peak})
            continue
        names = [name for name in (field, f"{field}_effective") if hasattr(made, name)]
        made = dataclasses.replace(made, **{name: times(getattr(made, name), float(factor)) for name in names})
    return made


def numbers(hardware: Hardware) -> dict[str, Anything]:
    """Return the quantities of hardware by name."""
    fields = [getattr(hardware, field.name) for field in dataclasses.fields(hardware)]
    return {q.name: q for q in (*hardware.peaks.values(), *fields) if isinstance(q, Quantity)}


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
    source, changed = f"configs/{config}.toml", dataclasses.replace(model.config, **sizes)
    model = dataclasses.replace(model, config=changed, source=source)
    machine = hardware_of(" ".join([hardware, *(word for word in rest if "*" in word)]))
    return model, machine, PlanRequest(hardware=hardware, **choices)


@functools.lru_cache(maxsize=32)
def setup_of(words: str) -> Setup:
    """Return the setup of a plan in words; see read."""
    model, hardware, request = read(words)
    return setup(request, model, hardware)


@functools.lru_cache(maxsize=16)  # what is collected takes no time of the garbage collector
def plan_of(words: str) -> Plan:
    return whole_plan(setup_of(words))


@functools.lru_cache(maxsize=16)
def figures_of(words: str) -> dict[str, Anything]:
    """Return the figures of a plan, and all that they are computed from, by name."""
    return {node.name: node for node in walk(*plan_of(words).all.values()) if node.name}


@functools.cache
def values_of(words: str) -> dict[str, float]:
    return {name: figure.value for name, figure in figures_of(words).items()}


def of_layout(made: Setup, layout: Layout) -> dict[str, Anything]:
    """Return the figures of training in another layout."""
    return training_plan(made.m, made.hardware, layout, made.workload, made.assumptions).figures()


FUNCTIONS = {"max": max, "min": min, "exp": math.exp, "sqrt": math.sqrt, "ceil": math.ceil, "floor": math.floor}
UNIT = re.compile(r"\b(\d+) (?:FLOP/token|FLOP|tokens|B|s)\b")


def python(formula: str) -> str:
    """Return a formula of an explanation in Python."""
    code = formula.replace("×", "*").replace("^", "**").replace(" per token", "").replace("24 h", "86400")  # noqa: RUF001
    return UNIT.sub(r"\1", code)


class Formulas:
    """Formulas of figures as their explanations write them, computed by Python alone."""

    def __init__(self, figures: Iterable[Anything]) -> None:
        self.steps = {}
        for figure in reversed(list(figures)):  # the last ones need most of the others
            if figure.name not in self.steps and figure.op != "input":
                self.steps |= {step.name: step for step in explain(figure).steps}
        self._code: dict[str, CodeType] = {
            name: compile(python(step.formula), name, "eval") for name, step in self.steps.items()
        }

    def values(self, inputs: Values, names: Iterable[str] | None = None) -> dict[str, float]:
        """Return the values of some figures, or of all, that these inputs give, and all that they need."""
        known = dict(inputs)
        todo = list(self.steps if names is None else names)
        while todo:
            name = todo[-1]
            if name in known:
                todo.pop()
                continue
            missing = [need for need in self.steps[name].needs if need not in known]
            if missing:
                todo += missing
                continue
            known[name] = eval(self._code[name], {"__builtins__": {}, **FUNCTIONS}, known)
        return known


PAGES = Path(__file__).parents[1] / "planner" / "pages"


def same_page(name: str, text: str) -> None:
    """Compare a text with its snapshot, without spaces at the ends of lines."""
    check_page(PAGES / f"{name}.txt", "".join(f"{line.rstrip()}\n" for line in text.strip().splitlines()))
