"""Findings: what is seen of a run besides its gains, each with its interval, and whether it is a fault.

Padding: a target is left out of the loss where it is IGNORE (-100). Positions before the last target of a row that
counts are the context of it. Positions after it reach no loss, as attention is causal: their work is for nothing.

    row        t0   t1   -100  t3   -100  -100
    counts      x    x          x
    context                x
    for nothing                       x     x       2 of 6
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmini.diagnosis.arms import Axis, Work, words
from dsmini.diagnosis.contention import Contention, cores
from dsmini.measure.turns import Estimate, mean_of, median_of
from dsmini.nn import max_violation
from dsmini.nn.transformer import IGNORE
from dsmini.training.trainer import StepResult

HEALTHY_WAIT, MUCH = 0.01, 0.10
"""Shares of a step: waiting below the first is healthy; what is for nothing above the second is a fault."""
IDLE_LOAD, MOST_IDLE = 0.1, 0.25
"""An expert is idle below this share of the mean load; more than this share of idle experts is a fault. At random
weights none of the toy's is idle, and in a collapsed gate all but those that it chooses are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A measured figure, its interval, and a verdict on it."""

    axis: Axis
    """Part of a run that the figure is about."""
    name: str
    """Short name, unique over all findings: "duplicates"."""
    value: float
    unit: str
    low: float
    """Lower end of the 95 % interval; the value itself where it is exact."""
    high: float
    """Upper end of the 95 % interval; the value itself where it is exact."""
    is_fault: bool
    """The figure is bad enough that a user should act."""
    sentence: str
    """Measurement in words, with numbers and units."""
    fix: str = ""
    """First thing to do; empty where there is nothing to do."""

    def __post_init__(self) -> None:
        assert self.low <= self.value <= self.high, f"finding {self.name!r} lies outside its interval"
        assert self.fix or not self.is_fault, f"finding {self.name!r} is a fault without a fix"


def finding(
    axis: Axis, name: str, value: float | Estimate, sentence: str, fix: str = "", unit: str = "", is_fault: bool = True
) -> Finding:
    """Return the finding of an exact value or an estimate; a fault if there is a fix and `is_fault`."""
    found = value if isinstance(value, Estimate) else Estimate(value=value, low=value, high=value, turns=1)
    is_fault = is_fault and bool(fix)
    ends = {"value": found.value, "low": found.low, "high": found.high}
    return Finding(
        axis=axis, name=name, **ends, unit=unit, is_fault=is_fault, sentence=sentence, fix=fix if is_fault else ""
    )


def waiting(waited: Sequence[float], seconds: Sequence[float]) -> Finding:
    """Return the share of a step that waits for its batch.

    Args:
        waited: seconds of waiting, turn by turn.
        seconds: seconds of a step, turn by turn.
    """
    step = statistics.fmean(seconds)
    share = mean_of([each / step for each in waited])
    health = "which is healthy" if share.value < HEALTHY_WAIT else "below 1 % is healthy"
    sentence = f"A step waits {1e3 * share.value * step:.1f} ms for its batch, {share.value:.1%} of its time; {health}."
    fix = "Prepare batches in more threads (data.workers), or make them cheaper to read."
    return finding("Data", "waiting", share, sentence, fix, is_fault=share.low > MUCH)


def load(steps: Sequence[StepResult]) -> Finding | None:
    """Return the share of experts that hardly any token has chosen; None for a dense model."""
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
    return finding("Algorithm", "idle_experts", idle, sentence, fix, is_fault=idle > MOST_IDLE)


def other_programs(turns: Sequence[Contention], work: Work) -> Finding:
    """Return what other programs took of the machine."""
    others, delayed = (statistics.median(getattr(turn, name) for turn in turns) for name in ("others", "delayed"))
    steady = [turn.steadiness for turn in turns if turn.steadiness is not None]
    loss = median_of([turn.loss for turn in turns])
    rates = f" This machine runs at {statistics.median(steady):.0%} of its measured rates." if steady else ""
    sentence = (
        f"Other programs keep {others:.1f} of {cores()} cores busy, and a thread of this run is {delayed:.0%} of the "
        f"time without a core.{rates} Others cost about {loss.value:.0%} of a step."
    )
    fix = words()[work]["quiet_machine"]["advice"]
    return finding("Machine", "other_programs", loss, sentence, fix, is_fault=loss.low > MUCH)


def padding(targets: Sequence[Tensor]) -> Finding:
    """Return the share of targets [b, s] that teach nothing; a fault if too many stand after the last that does."""
    ignored = sum(int((y == IGNORE).sum()) for y in targets)
    after = sum(int(((y != IGNORE).flip(1).cumsum(1) == 0).sum()) for y in targets)
    n = sum(y.numel() for y in targets)
    said = f"{ignored / n:.1%} of the {n:,} targets looked at teach nothing"
    if ignored:
        said += f"; {after / n:.1%} stand after the last one of their row that does, so that their work is for nothing"
    fix = "Pack several documents into a row, or put rows of like length into a batch."
    return finding("Algorithm", "padding", ignored / n, f"{said}.", fix, "share of targets", is_fault=after / n > MUCH)
