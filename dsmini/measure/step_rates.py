"""Factors of this machine by which operations take longer inside a step than alone, measured on other models.

A curve of calibration.py times one operation over and over. In a step its inputs were just written by others, its
memory may be new to the process, and its size may be none of those measured. Steps of a few small models say by how
much: for each kind of work and dtype, and each class of operations,

    factor = sum of measured seconds / sum of predicted seconds

The time of a step beyond its operations, in Python and in autograd, is divided by its calls. The models are not those
that anyone forecasts: forecast.py takes factors and cost of a call for other sizes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from dsmini.config import ModelConfig
from dsmini.measure.calibration import key_of, load_or_measure
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.cpu_time import watched
from dsmini.measure.dry import dry_count
from dsmini.measure.kernels import CURVES
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.process import peak_of_process
from dsmini.measure.rates import BUSY, Roofs, Store, from_json
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepDtype, StepShape, Work
from dsmini.reading import read_toml

VERSION = 3
"""Version of this measurement; factors stored by another version are measured again."""
SECONDS = 0.7
"""Time to fill with steps of one shape, and again with counted ones."""
PASSES = 5
ATTEMPTS = 4
"""A step is measured up to so many times, as long as the machine is busy."""
LEAST_SHARE = 0.01
"""Share of a step's predicted time below which a class has the factor of all small classes together."""
OTHERS = "others"
_MODELS = {name: ModelConfig(**sizes) for name, sizes in read_toml(Path(__file__).with_name("steps.toml")).items()}
SHAPES: Mapping[Work, tuple[tuple[ModelConfig, int, int], ...]] = {
    "training": ((_MODELS["small"], 5, 192), (_MODELS["wider"], 2, 320)),
    "prefill": ((_MODELS["wider"], 2, 150), (_MODELS["served"], 1, 320)),
    "decode": ((_MODELS["wider"], 1, 200), (_MODELS["served"], 1, 900), (_MODELS["served"], 6, 300)),
}
"""Config, batch and tokens of the steps that are measured."""


@dataclass(frozen=True, kw_only=True)
class StepRates:
    """Factors and cost of a call in steps of one kind of work and dtype."""

    factors: Mapping[str, float]
    """Measured over predicted seconds by class of operations; OTHERS for the small ones together."""
    call: float
    """Seconds of a call beyond the operations, views included."""

    def seconds(self, operations: Iterable[CountedOperation], views: int, roofs: Roofs) -> dict[str, float]:
        """Return the seconds of a step by class of operations, and those of "calls"."""
        found: dict[str, float] = {}
        calls = views
        for op in operations:
            name = class_of(op)
            factor = self.factors.get(name, self.factors[OTHERS])
            found[name] = found.get(name, 0.0) + factor * operation_seconds(op, roofs)
            calls += 1
        return found | {"calls": self.call * calls}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """All rates of a machine that forecasts need."""

    roofs: Roofs
    steps: Mapping[str, StepRates]
    """Rates by work and dtype, such as "training bfloat16"."""
    process: int = 0
    """Bytes that a process takes besides the tensors of its steps: Python, torch, buffers of products."""
    busy: float = 0.0
    """As of Roofs."""


def class_of(op: CountedOperation) -> str:
    """Return the class of an operation: the curve of a kernel, else the kind of torch's operation."""
    return CURVES.get(op.name, op.kind) if op.is_kernel else op.kind


def load_or_measure_rates(
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
) -> Rates:
    """Return this machine's roofs and its rates of steps, stored or measured now (a minute and a half).

    Args: as of calibration.load_or_measure.
    """
    roofs = load_or_measure(device, keep, lambda done, what: on_part(done / 2, what), fresh)
    return rates_beyond(roofs, device, keep, lambda done, what: on_part(0.5 + done / 2, what), fresh)


def stored_rates(device: torch.device, keep: Path | None = None) -> Rates | None:
    """Return this machine's rates if they are stored, else None. Measures nothing."""
    store, key = Store.at(keep), key_of(device)
    roofs = store.read(key, from_json)
    return None if roofs is None else store.read(_steps_key(key), partial(_from_json, roofs=roofs))


def rates_beyond(
    roofs: Roofs,
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
) -> Rates:
    """Return these roofs with this machine's rates of steps, stored or measured now. Args: as of load_or_measure."""
    store, key = Store.at(keep), _steps_key(key_of(device))
    stored = None if fresh else store.read(key, partial(_from_json, roofs=roofs))
    if stored is not None:
        return stored
    steps, busy = watched(lambda: measure_steps(roofs, device, on_part))
    rates = Rates(roofs=roofs, steps=steps, process=measure_process(), busy=max(busy, roofs.busy))
    found = {"steps": {name: asdict(each) for name, each in rates.steps.items()}, "process": rates.process}
    store.write(key, found, rates.busy)
    return rates


def _steps_key(key: str) -> str:
    return json.dumps(["steps", VERSION, key])


def _from_json(raw: Mapping[str, Any], roofs: Roofs) -> Rates:
    steps = {name: StepRates(**of_step) for name, of_step in raw["steps"].items()}
    return Rates(roofs=roofs, steps=steps, process=raw["process"])


def measure_process() -> int:
    """Return the bytes of a training process of a small model besides its tensors."""
    (config, batch, tokens), *_ = SHAPES["training"]
    shape = StepShape(work="training", config=config, dtype="bfloat16", batch=batch, tokens=tokens)
    return peak_of_process(shape) - dry_count(lambda: shape.make(torch.device("cpu"))).peak


def measure_steps(
    roofs: Roofs, device: torch.device, on_part: Callable[[float, str], None] = lambda done, what: None
) -> dict[str, StepRates]:
    """Measure the steps of SHAPES in each dtype that has a rate here."""
    dtypes: list[StepDtype] = [d for d in get_args(StepDtype) if d in roofs.peak or d == "fp8"]
    works: tuple[Work, ...] = get_args(Work)
    found: dict[str, StepRates] = {}
    jobs: list[tuple[Work, StepDtype]] = [(work, dtype) for work in works for dtype in dtypes]
    for i, (work, dtype) in enumerate(jobs):
        on_part(i / len(jobs), f"{work} {dtype}")
        shapes = [StepShape(work=work, config=c, dtype=dtype, batch=b, tokens=n) for c, b, n in SHAPES[work]]
        found[f"{work} {dtype}"] = rates_of([_measured(shape, roofs, device) for shape in shapes], roofs)
    return found


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step as measured: operations of some passes, and seconds of the whole."""

    passes: list[list[CountedOperation]]
    views: int
    seconds: float


def _measured(shape: StepShape, roofs: Roofs, device: torch.device) -> MeasuredStep:
    """Measure a step; again if other programs kept the cores meanwhile, and take the time when they did so least."""
    step = shape.make(device)

    def attempt() -> MeasuredStep:
        taken = sorted(in_turns({"step": step}, device, seconds=SECONDS, least=3).seconds["step"])
        passes = [count(step, roofs.cache_bytes) for _ in range(1 + PASSES)][1:]
        operations = [each.operations for each in passes]
        return MeasuredStep(passes=operations, views=passes[0].views, seconds=taken[len(taken) // 4])

    found: list[tuple[MeasuredStep, float]] = []
    while len(found) < ATTEMPTS and (not found or found[-1][1] > BUSY):
        found.append(watched(attempt))
    return min(found, key=lambda measured: measured[1])[0]


def rates_of(steps: Iterable[MeasuredStep], roofs: Roofs) -> StepRates:
    """Return the factors of classes, over all steps together, and the cost of a call."""
    steps = list(steps)
    measured: dict[str, float] = {}
    predicted: dict[str, float] = {}
    whole = within = 0.0
    calls = 0
    for step in steps:
        ops = [min(same, key=lambda op: op.seconds) for same in zip(*step.passes, strict=False)]
        for op in ops:
            name = class_of(op)
            measured[name] = measured.get(name, 0.0) + op.seconds
            predicted[name] = predicted.get(name, 0.0) + operation_seconds(op, roofs)
        whole += step.seconds
        within += sum(op.seconds for op in ops)
        calls += len(ops) + step.views
    small = {name for name, seconds in predicted.items() if seconds < LEAST_SHARE * sum(predicted.values())}
    # where the parts are longer than the whole, counting itself made them so
    shrink = min(1.0, whole / within)
    factors = {name: shrink * measured[name] / predicted[name] for name in predicted if name not in small}
    rest = small or set(predicted)
    factors[OTHERS] = shrink * sum(measured[name] for name in rest) / sum(predicted[name] for name in rest)
    return StepRates(factors=factors, call=max(0.0, whole - within) / calls)
