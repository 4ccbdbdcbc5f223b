"""Plans for tests, asked for as a user asks: by a config, hardware and choices. And the formulas that explain them."""

import ast
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from types import CodeType
from typing import Any

from dsmini.planner.hardware import Hardware, load_hardware
from dsmini.planner.quantities.explanation import explain, named
from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    DOLLARS_PER_SECOND,
    FLOPS_PER_SECOND,
    SECONDS,
    WATTS,
    Anything,
    Quantity,
)
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, Setup, setup
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.training_plan import training_plan
from dsmini.planner.training.workload import Workload
from dsmini.planner.whole import Plan, whole_plan
from tests.helpers.configs import CONFIGS

CHOICES = {field.name for field in dataclasses.fields(PlanRequest)}
Values = Mapping[str, float]


def hardware_of(words: str) -> Hardware:
    """Return known hardware with some numbers multiplied, such as "h800 memory*0.5"; times 0 it has none."""
    name, *changes = words.split()
    made = load_hardware(name)

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


def read(words: str) -> tuple[Model, Hardware, PlanRequest]:
    """Read what is planned: a config of configs/, hardware after @, its changes, choices, and sizes of the model.

    >>> read("deepseek-v3 @h800 memory*0.5 gpus=64 n_layers=60")
    """
    config, *rest = words.split()
    hardware = next((word[1:] for word in rest if word.startswith("@")), "h800")
    given: dict[str, Any] = {}
    for name, value in (word.split("=") for word in rest if "=" in word):
        try:
            given[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            given[name] = value
    choices: dict[str, Any] = {name: value for name, value in given.items() if name in CHOICES}
    sizes = {name: value for name, value in given.items() if name not in CHOICES}
    model = Model.from_file(CONFIGS / f"{config}.toml")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **sizes))
    machine = hardware_of(" ".join([hardware, *(word for word in rest if "*" in word)]))
    return model, machine, PlanRequest(hardware=hardware, **choices)


@functools.cache
def setup_of(words: str) -> Setup:
    """Return the setup of a plan in words; see read."""
    model, hardware, request = read(words)
    return setup(request, model, hardware)


@functools.cache
def plan_of(words: str) -> Plan:
    return whole_plan(setup_of(words))


@functools.cache
def figures_of(words: str) -> dict[str, Anything]:
    """Return the figures of a plan, and all that they are computed from, by name."""
    return named(plan_of(words).all.values())


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


H800 = Hardware(
    name="h800",
    title="NVIDIA H800 SXM",
    peaks={
        "bfloat16": FLOPS_PER_SECOND(989e12, "bf16_peak", "Dense peak in BF16", "data sheet"),
        "fp8": FLOPS_PER_SECOND(1979e12, "fp8_peak", "Dense peak in FP8", "data sheet"),
    },
    memory=BYTES(80e9, "memory", "Memory of a GPU", "data sheet"),
    memory_bandwidth=BYTES_PER_SECOND(3.35e12, "memory_bandwidth", "Bandwidth of the memory", "data sheet"),
    gpus_per_node=COUNT(8, "gpus_per_node", "GPUs of a node", "V3, section 3.1"),
    fast_link=BYTES_PER_SECOND(160e9, "fast_link", "NVLink of a GPU, one direction, effective", "INS, section 4.3"),
    slow_link=BYTES_PER_SECOND(40e9, "slow_link", "InfiniBand of a GPU, one direction, effective", "INS, section 4.3"),
    link_latency=SECONDS(3.7e-6, "link_latency", "Latency of the slow link", "INS, table 5"),
    price=DOLLARS_PER_SECOND(2 / 3600, "price", "Rent of a GPU", "V3, table 1: $2 an hour"),
    power=WATTS(700, "power", "Power of a GPU", "data sheet"),
)
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
"""Layout of DeepSeek-V3 (report, section 3.2)."""
V3_WORKLOAD = Workload.of(seq_len=4096, batch=15360, tokens=14.8e12, source="V3, section 4.2")
