"""Time of a plan's steps on this machine: forecasts from counted operations, next to the roofs.

Roofs are lower bounds: a peak and a bandwidth. A small model on a CPU is far from both, because most of its time goes
into small operations. dsmini.measure.forecast counts what the model would run here, without running it, and prices
each operation with rates that were measured on this machine.

Only `--hardware this` comes here; it imports torch. Other plans do not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsmini.config import TrainConfig
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.plan import Plan
from dsmini.planner.request import DTYPES
from dsmini.planner.setup import Setup
from dsmini.report import Section, Table
from dsmini.report.units import human

if TYPE_CHECKING:
    from dsmini.measure.forecast import Forecast
    from dsmini.measure.workloads import StepShape

COLUMNS = ("step", "of", "forecast", "by roofs", "tensors", "process", "longest")
SHOWN = 3
"""Classes of operations that a row names."""
MOST_TOKENS = 1 << 16
"""Tokens of a step above which nothing is forecast: even shapes take long then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepHere:
    """A step of a plan on this machine."""

    name: str
    roof: float
    """Seconds by roofs alone."""
    forecast: "Forecast"


def steps_here(plan: Plan, on_part: OnPart = quiet) -> list[StepHere]:
    """Return the steps of a plan on this machine's CPU; none on a GPU, whose operations have no rates here.

    Args:
        on_part: progress of measuring the rates, which takes a minute and a half the first time.
    """
    from dsmini.machine import pick_device
    from dsmini.measure.forecast import forecast
    from dsmini.measure.step_rates import load_or_measure_rates

    device = pick_device("auto")
    shapes = [(name, roof, shape) for name, roof, shape in _shapes(plan) if shape.batch * shape.tokens <= MOST_TOKENS]
    if device.type != "cpu" or not shapes:
        return []
    rates = load_or_measure_rates(device, on_part=on_part)
    known = [each for each in shapes if f"{each[2].work} {each[2].dtype}" in rates.steps]
    return [StepHere(name=name, roof=roof, forecast=forecast(shape, rates)) for name, roof, shape in known]


def with_forecast(made: Setup, planned: Plan, steps: Sequence[StepHere]) -> Setup:
    """Return a setup in which a step takes as long as its forecast, unless the user gave a utilization."""
    seconds = [step.forecast.seconds for step in steps if step.name == "training step"]
    if not seconds or made.request.utilization is not None:
        return made
    reached = float(planned.sheet.assumed_step_seconds * planned.sheet.utilization) / seconds[0]
    sources = {**made.sources, "utilization": "forecast of a step of this machine"}
    return replace(made, request=replace(made.request, utilization=reached), sources=sources)


def _shapes(plan: Plan) -> Iterator[tuple[str, float, "StepShape"]]:
    """Yield the name, the seconds by roofs, and the shape of each step."""
    from dsmini.measure.workloads import ROOM, StepShape

    r, s, layout, config = plan.setup.request, plan.sheet, plan.setup.layout, plan.setup.model.config
    run = plan.setup.model.run
    assert r.batch is not None and r.seq_len is not None, "the request is complete"
    if plan.fits and layout.gpus == 1 and (run is not None or r.batch * config.max_seq_len <= MOST_TOKENS):
        train = run.train if run is not None else TrainConfig(optimizer=layout.optimizer, moments=layout.moments)
        sizes = {"batch": r.batch, "tokens": r.seq_len, "config": config}
        yield (
            "training step",
            float(s.roof_step_seconds),
            StepShape(work="training", dtype=DTYPES[layout.precision], train=train, **sizes),
        )
    if not plan.setup.served:
        return
    assert r.weight_dtype and r.prompt and r.context and r.sequences, "the request is complete"
    read = StepShape(work="prefill", config=config, dtype=r.weight_dtype, batch=1, tokens=r.prompt)
    yield "prompt", float(s.prefill_step_time), read
    context = min(r.context, config.max_seq_len - ROOM)
    decode = StepShape(work="decode", config=config, dtype=r.weight_dtype, batch=r.sequences, tokens=context)
    yield "decoding step", float(s.decode_step_time), decode


def section_here(steps: Sequence[StepHere]) -> Section:
    """Return the forecasts of this machine as a section: each step next to its roofs, and what takes longest."""
    rows = [_row(step.name, step.roof, step.forecast) for step in steps]
    first = steps[0]
    return Section(
        name="here_section",
        title="What will this machine take?",
        finding=(
            f"{first.name.capitalize()}: {human(first.forecast.seconds, 's')}; by roofs alone {human(first.roof, 's')}."
        ),
        tables=[Table(columns=COLUMNS, rows=rows, numeric=("forecast", "by roofs", "tensors", "process"))],
        about=(
            "Forecast from the operations that the step would run here, at rates of this machine that were measured "
            "on other models; nothing of this model has run. Memory is at the peak of a step. "
            "python -m benchmarks plan compares such forecasts with what is then measured."
        ),
    )


def _row(name: str, roof: float, found: "Forecast") -> tuple[str, ...]:
    shape = found.shape
    size = f"{shape.batch} x {shape.tokens:,} tokens, {shape.dtype}"
    longest = [f"{kind} {seconds / found.seconds:.0%}" for kind, seconds in list(found.by_class.items())[:SHOWN]]
    memory = (human(float(each), "bytes") for each in (found.peak, found.process))
    return (name, size, human(found.seconds, "s"), human(roof, "s"), *memory, ", ".join(longest))


def record_here(steps: Sequence[StepHere]) -> dict[str, dict[str, float | int]]:
    """Return the forecasts as JSON, by the name of the step: seconds, and bytes."""
    return {
        step.name: {
            "seconds": step.forecast.seconds,
            "roof_seconds": step.roof,
            "tensor_bytes": step.forecast.peak,
            "process_bytes": step.forecast.process,
        }
        for step in steps
    }
