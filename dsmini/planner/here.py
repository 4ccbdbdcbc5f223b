"""Time of a plan's steps on this machine: forecasts from counted operations, next to the roofs.

Roofs are lower bounds: a peak and a bandwidth. A small model on a CPU is far from both, because most of its time goes
into small operations. dsmini.measure.forecast counts what the model would run here, without running it, and prices
each operation with rates that were measured on this machine.

Only `--hardware this` comes here; it imports torch. Other plans do not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsmini.config import TrainConfig
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.plan import Plan
from dsmini.planner.request import DTYPES, Setup
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
    steps = [each for each in _steps(plan) if each[2].batch * each[2].tokens <= MOST_TOKENS]
    if device.type != "cpu" or not steps:
        return []
    rates = load_or_measure_rates(device, on_part=on_part)
    return [
        StepHere(name=name, roof=float(roof), forecast=forecast(shape, rates))
        for name, roof, shape in steps
        if f"{shape.work} {shape.dtype}" in rates.steps
    ]


def with_forecast(made: Setup, planned: Plan, steps: Sequence[StepHere]) -> Setup:
    """Return a setup in which a step takes as long as its forecast, unless the user gave a utilization."""
    seconds = [step.forecast.seconds for step in steps if step.name == "training step"]
    if not seconds or made.request.utilization is not None:
        return made
    reached = float(planned.sheet.assumed_step_seconds * planned.sheet.utilization) / seconds[0]
    sources = {**made.sources, "utilization": "forecast of a step of this machine"}
    return replace(made.asking(utilization=reached), sources=sources)


def _steps(plan: Plan) -> Iterator[tuple[str, Any, "StepShape"]]:
    """Yield the name, the seconds by roofs, and the shape of each step."""
    from dsmini.measure.workloads import ROOM, StepShape

    r: Any = plan.setup.request
    s, config, run = plan.sheet, plan.setup.model.config, plan.setup.model.run
    if plan.fits and r.gpus == 1 and (run is not None or r.batch * config.max_seq_len <= MOST_TOKENS):
        train = run.train if run is not None else TrainConfig(optimizer=r.optimizer, moments=r.moments)
        how: dict[str, Any] = {"work": "training", "dtype": DTYPES[r.precision], "train": train}
        yield "training step", s.roof_step_seconds, StepShape(batch=r.batch, tokens=r.seq_len, config=config, **how)
    if plan.setup.served:
        how = {"config": config, "dtype": r.weight_dtype}
        yield "prompt", s.prefill_step_time, StepShape(work="prefill", batch=1, tokens=r.prompt, **how)
        context = min(r.context, config.max_seq_len - ROOM)
        yield "decoding step", s.decode_step_time, StepShape(work="decode", batch=r.sequences, tokens=context, **how)


def section_here(steps: Sequence[StepHere]) -> Section:
    """Return the forecasts of this machine as a section: each step next to its roofs, and what takes longest."""
    first = steps[0]
    return Section(
        name="here_section",
        title="What will this machine take?",
        finding=(
            f"{first.name.capitalize()}: {human(first.forecast.seconds, 's')}; by roofs alone {human(first.roof, 's')}."
        ),
        tables=[Table(columns=COLUMNS, rows=[_row(step) for step in steps], numeric=COLUMNS[2:6])],
        about=(
            "Forecast from the operations that the step would run here, at rates of this machine that were measured "
            "on other models; nothing of this model has run. Memory is at the peak of a step. "
            "python -m benchmarks plan compares such forecasts with what is then measured."
        ),
    )


def _row(step: StepHere) -> tuple[str, ...]:
    found, shape = step.forecast, step.forecast.shape
    longest = [f"{kind} {seconds / found.seconds:.0%}" for kind, seconds in list(found.by_class.items())[:SHOWN]]
    amounts = ((found.seconds, "s"), (step.roof, "s"), (float(found.peak), "bytes"), (float(found.process), "bytes"))
    size = f"{shape.batch} x {shape.tokens:,} tokens, {shape.dtype}"
    return (step.name, size, *(human(value, unit) for value, unit in amounts), ", ".join(longest))


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
