"""Findings of plain steps besides their time: waiting, the experts' load, and the share of other programs."""

import statistics
from collections.abc import Sequence

import torch

from dsmini.diagnosis.contention import Contention
from dsmini.diagnosis.finding import Axis, Finding
from dsmini.diagnosis.gains import Gain, gain_of_rounds
from dsmini.diagnosis.interventions.machine import cores
from dsmini.measure.forecast import Forecast
from dsmini.nn import max_violation
from dsmini.training.trainer import StepResult

HEALTHY_WAIT, MUCH_WAIT = 0.01, 0.10
"""Shares of a step: below the first the loader is healthy, above the second it is a fault."""
IDLE_LOAD, MOST_IDLE = 0.1, 0.25
"""An expert is idle below this share of the mean load; more than this share of idle experts is a fault. At random
weights none of the toy's is idle, and in a collapsed gate all but those that it chooses are."""
STOP_OTHERS = "Stop other programs, or leave them a core and set train.threads to the rest."


def waiting(steps: Sequence[StepResult]) -> Finding:
    """Return the share of a step that waits for its batch."""
    share = gain_of_rounds([step.data_wait for step in steps])
    fault = share.low > MUCH_WAIT
    milliseconds = 1e3 * statistics.median(step.data_wait * step.seconds for step in steps)
    health = "which is healthy" if share.value < HEALTHY_WAIT else "below 1 % is healthy"
    sentence = f"A step waits {milliseconds:.1f} ms for its batch, {share.value:.1%} of its time; {health}."
    fix = "Prepare batches in more threads (data.workers), or make them cheaper to read."
    return _share("Data", "waiting", share, sentence, fix if fault else "")


def load(steps: Sequence[StepResult]) -> Finding | None:
    """Return the share of experts that hardly any token visits; None for a dense model."""
    counted = [step.counts for step in steps if step.counts is not None]
    if not counted:
        return None
    loads = torch.stack(counted).sum(0)
    idle = (loads < IDLE_LOAD * loads.double().mean(1, keepdim=True)).double().mean().item()
    vio = max_violation(loads).mean().item()
    sentence = (
        f"{idle:.0%} of the experts get less than a tenth of the mean load; "
        f"the fullest gets {1 + vio:.1f} times the mean (MaxVio {vio:.2f})."
    )
    fix = "Reset the routing bias, or raise train.bias_speed: idle experts learn nothing."
    exact = Gain(value=idle, low=idle, high=idle, rounds=len(counted))
    return _share("Algorithm", "idle_experts", exact, sentence, fix if idle > MOST_IDLE else "")


def imbalance_loss(steps: Sequence[StepResult], forecast: Forecast | None) -> Finding | None:
    """Return the share of a step that imbalance would cost with each expert on a device of its own.

    loss = time of the experts * (largest load / mean load - 1). In one process nobody waits for the fullest expert.
    """
    vios = [step.max_vio for step in steps if step.max_vio is not None]
    if not vios or forecast is None:
        return None
    experts = sum(s for name, s in forecast.by_class.items() if "experts" in name) / forecast.seconds
    losses = gain_of_rounds([experts * vio for vio in vios])
    sentence = (
        f"With each expert on a device of its own, a step would take {losses.value:.0%} longer than with equal loads: "
        f"experts take {experts:.0%} of it, and the fullest has {1 + statistics.median(vios):.1f} times the mean load."
    )
    return _share("Algorithm", "imbalance_loss", losses, sentence)


def contention(turns: Sequence[Contention], fix: str = STOP_OTHERS) -> Finding:
    """Return what other programs took of the machine.

    Args:
        fix: first thing to do.
    """
    others = statistics.median(turn.others for turn in turns)
    loss = gain_of_rounds([turn.loss for turn in turns])
    steady = statistics.median(turn.steadiness for turn in turns)
    fault = loss.low > MUCH_WAIT
    sentence = (
        f"Other programs keep {others:.1f} of {cores()} cores busy, and this machine runs at {steady:.0%} of its "
        f"measured rates; they cost about {loss.value:.0%} of a step."
    )
    return _share("Machine", "other_programs", loss, sentence, fix if fault else "")


def _share(axis: Axis, name: str, share: Gain, sentence: str, fix: str = "") -> Finding:
    """Return the finding of a share; with a fix it is a fault."""
    return Finding(
        axis=axis,
        name=name,
        value=share.value,
        unit="",
        low=share.low,
        high=share.high,
        is_fault=bool(fix),
        sentence=sentence,
        fix=fix,
    )
