"""Time of a plan's steps on this machine: forecasts from counted operations, next to the roofs.

Roofs are lower bounds: a peak and a bandwidth. A small model on a CPU is far from both, because most of its time goes
into small operations. dsmini.measure.price counts what the model would run here, without running it, and times each
operation alone.

Only `--hardware this` comes here; it imports torch. Other plans do not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsmini.config import TrainConfig
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.plan import Plan, make_plan
from dsmini.planner.request import DTYPES

if TYPE_CHECKING:
    from dsmini.measure.price import Forecast
    from dsmini.measure.workloads import StepShape

TRAINING = "training step"
MOST_TOKENS = 1 << 16
"""Tokens of a step above which nothing is forecast: even shapes take long then."""
Steps = Mapping[str, tuple[Any, Mapping[str, float]]]
"""A Forecast by the name of the step; and its seconds, those by roofs alone, and bytes of tensors and process."""


def steps_here(plan: Plan, on_part: OnPart = quiet, fresh: bool = False) -> Steps:
    """Return the steps of a plan on this machine's CPU; none on a GPU, whose operations are not timed.

    Args:
        on_part: progress of timing the operations, which takes up to half a minute the first time.
        fresh: time them again. The roofs are those of the plan.
    """
    from dsmini.machine import pick_device
    from dsmini.measure.price import Prices
    from dsmini.measure.roofs import load_or_measure

    device = pick_device("auto")
    steps = [each for each in _steps(plan) if each[2].batch * each[2].tokens <= MOST_TOKENS]
    if device.type != "cpu" or not steps:
        return {}
    prices = Prices.under(load_or_measure(device), on_part=on_part, fresh=fresh)
    found: dict[str, tuple[Forecast, Mapping[str, float]]] = {}
    for name, roof, shape in steps:
        f = prices.forecast(shape)
        process = f.peak + prices.process
        row = {"seconds": f.seconds, "roof_seconds": float(roof), "tensor_bytes": f.peak, "process_bytes": process}
        found[name] = f, row
    return found


def with_forecast(plan: Plan, steps: Steps) -> Plan:
    """Return a plan in which a step takes as long as its forecast.

    It is as it was where the user gave a utilization, and for a forecast above the peak.
    """
    if TRAINING not in steps or plan.request.utilization is not None:
        return plan
    reached = plan.run.mfu * plan.run.step_seconds / steps[TRAINING][0].seconds
    if reached >= 1:  # the peak was measured in a slow moment, or kernels are faster than torch's product
        return plan
    request = replace(plan.request, utilization=reached)
    return make_plan(request, plan.model, plan.hardware, plan, "the forecast of a step")


def _steps(plan: Plan) -> Iterator[tuple[str, Any, "StepShape"]]:
    """Yield the name, the seconds by roofs, and the shape of each step."""
    from dsmini.measure.workloads import ROOM, StepShape

    r: Any = plan.request
    config, run = plan.model.config, plan.model.run
    if plan.fits and r.gpus == 1 and (run is not None or r.batch * config.max_seq_len <= MOST_TOKENS):
        train = replace(
            run.train if run is not None else TrainConfig(),
            **{"optimizer": r.optimizer, "moments": r.moments, "recompute": r.recompute == "full"},
            **{"batch_size": r.batch, "batch_start": None, "batch_ramp": 0.0, "grad_accum": r.batch // r.micro_batch},
        )
        how: dict[str, Any] = {"work": "training", "dtype": DTYPES[r.precision], "train": train}
        yield TRAINING, plan.training.parts_seconds, StepShape(batch=r.batch, tokens=r.seq_len, config=config, **how)
    if plan.served is not None and r.weight_dtype != "fp4":
        cache = plan.asked.cache_dtype  # left open, the model's own
        how = {"config": config, "dtype": r.weight_dtype, "cache": cache}
        prompt, token = plan.served.prefill_step.step_time, plan.served.decode_step.step_time
        yield "prompt", prompt, StepShape(work="prefill", batch=1, tokens=r.prompt, **how)
        context = min(r.context, config.max_seq_len - min(ROOM, config.max_seq_len // 2))
        if config.max_seq_len > 1:  # room for a token more
            yield "decoding step", token, StepShape(work="decode", batch=r.sequences, tokens=context, **how)
