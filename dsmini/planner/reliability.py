"""Failures of a long run, and the share of the time that training keeps.

Nodes fail independently at a constant rate, so a run on more nodes fails more often:

    mean time to failure = 1 / (nodes * failures per node and second)

Meta counted 6.50 failures in 1000 node-days. On 16,384 GPUs, 2,048 nodes, that is one every 1.80 hours. The rule is
one of large runs. On 1,024 GPUs it gives 28.8 hours, and Meta measured 7.9: small jobs also fail for other reasons.

A failure costs the restart and the work since the last checkpoint, half an interval D on average. A checkpoint halts
training for w. With the mean time to failure M and the restart u0, the share of the time that trains is about

    (1 - (u0 + D / 2) / M) / (1 + w / D)         and is best at D = sqrt(2 w M), Young's interval.

At 12,000 GPUs M is 2.46 hours. Checkpoints of 10 s every 7 minutes keep 92 % of the time, those of 300 s every 38
minutes 74 %.

The formula is of first order: no failure meets the recovery from another one, and a failure costs half an interval
however long that is. At Young's interval it is within 2 % of a simulation while u0 + D + w is below a sixth of M. On
131,072 GPUs, where M is 13.5 minutes, it says 51 % where 59 % remain; use effective_share_at_any_rate there.

Sources: Kokolis et al. (arXiv 2410.21680) for the rate and the share, Young (1974) for the interval, Daly (2006) for
the share at any rate.
"""

import math
from dataclasses import dataclass, fields

from dsmini.planner.quantities.quantity import (
    COUNT,
    SECONDS,
    Bytes,
    BytesPerSecond,
    Count,
    PerSecond,
    Seconds,
    exponential,
    geometric_mean,
    largest,
)

DAY = SECONDS(86400)
KOKOLIS = "Kokolis et al. (arXiv 2410.21680)"


NODE_FAILURES = COUNT(
    6.50e-3, "failures_per_node_day", "Failures of a node in a day", f"{KOKOLIS}: 6.50 in 1000 node-days of RSC-1"
)
NODE_GPUS = COUNT(8, "gpus_per_failing_node", "GPUs of a node that fails", f"{KOKOLIS}: nodes of eight")
RESTART = SECONDS(
    300, "restart_time", "Time from a failure until training runs again", f"{KOKOLIS}: u0 of five minutes"
)
HALT = SECONDS(10, "checkpoint_halt", "Time that a checkpoint halts training", f"{KOKOLIS}: about 10 s at 12,000 GPUs")


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureInputs:
    """Failures of nodes, and the cost of a failure and of a checkpoint. The defaults are Meta's.

    Raises: ValueError for one that is not positive.
    """

    failures_per_node_day: Count = NODE_FAILURES
    gpus_per_node: Count = NODE_GPUS
    restart_time: Seconds = RESTART
    """Time from a failure until training runs again: u0."""
    write_time: Seconds = HALT
    """Time that a checkpoint halts training: w. A checkpoint that is written aside halts only for its copy."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name).value
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{field.name} is {value}, want a positive finite number; leave it out for the default"
                )


# --- how often


def failure_rate(gpus: Count, inputs: FailureInputs) -> PerSecond:
    """Return the rate of failures of all nodes together. Raises: ValueError without GPUs."""
    if gpus.value <= 0:
        raise ValueError(f"gpus is {gpus.value}, want 1 or more; name the GPUs of the run")
    rate = gpus / inputs.gpus_per_node * inputs.failures_per_node_day / DAY
    return rate.named("failure_rate", "Rate of failures of all nodes", KOKOLIS)


def mean_time_to_failure(gpus: Count, inputs: FailureInputs) -> Seconds:
    """Return the mean time from one failure of a run to the next."""
    return (1 / failure_rate(gpus, inputs)).named("mean_time_to_failure", "Mean time between failures", KOKOLIS)


def failures_over(duration: Seconds, mttf: Seconds) -> Count:
    """Return the expected failures over a run."""
    return (duration / mttf).named("failures", "Failures expected over the run")


# --- checkpoints


def checkpoint_write_time(size: Bytes, nodes: Count, rate: BytesPerSecond) -> Seconds:
    """Return the time to write a checkpoint from all nodes at once.

    Args:
        rate: bytes per second that one node writes.
    """
    title = "Time to write a checkpoint"
    return (size / (nodes * rate)).named("checkpoint_write_time", title)


def best_interval(write: Seconds, mttf: Seconds) -> Seconds:
    """Return the time of training between two checkpoints that keeps most of it, to first order."""
    interval = geometric_mean(2 * write, mttf)
    return interval.named(
        "checkpoint_interval", "Time between checkpoints, best to first order", "Young (1974): sqrt(2 w M)"
    )


# --- the share of the time that trains


def effective_share(mttf: Seconds, interval: Seconds, inputs: FailureInputs) -> Count:
    """Return the share of the time that trains, to first order; 0 where a failure costs more than the time to it."""
    lost = (inputs.restart_time + interval / 2) / mttf
    share = (COUNT(1) - lost) / (COUNT(1) + inputs.write_time / interval)
    title = "Share of the time that trains, to first order"
    return largest(share, COUNT(0)).named("effective_share", title, f"{KOKOLIS}: E[ETTR]")


def effective_share_at_any_rate(mttf: Seconds, interval: Seconds, inputs: FailureInputs) -> Count:
    """Return the share of the time that trains if failures also interrupt restarts and writes."""
    cycle = exponential((interval + inputs.write_time) / mttf) - COUNT(1)
    share = interval / (mttf * exponential(inputs.restart_time / mttf) * cycle)
    title = "Time that trains, at any rate"
    return share.named("effective_share_at_any_rate", title, "Daly (2006): the complete cost function")


def first_order_error(mttf: Seconds, interval: Seconds, inputs: FailureInputs) -> Count:
    """Return how far effective_share is from effective_share_at_any_rate, as a part of the latter."""
    exact = effective_share_at_any_rate(mttf, interval, inputs)
    error = effective_share(mttf, interval, inputs) / exact - COUNT(1)
    return error.named("first_order_error", "Relative error of the first-order share")
