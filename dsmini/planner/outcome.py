"""Outcome: what training takes in the end, with failures, and what a served token costs.

    checkpoint         parameters * (FP32 master + moments), written by all nodes at once
    elapsed time       time of training / share of the time that trains
    energy             GPUs * power * elapsed time
    dollars a token    rent of a GPU / its tokens a second

Worked example, DeepSeek-V3 on 2048 H800: a node fails 6.50 times in 1000 days, so one of 256 every 14.4 hours. A
checkpoint of 683B parameters with 8 bytes each is 5.46 TB, or 1.99 s at 10 GiB/s a node. Halting 10 s every 17 minutes
and restarting in 300 s keep 97.5 % of the time: 54.4 days become 55.8.

Sources: Kokolis et al. (arXiv 2410.21680); Fire-Flyer (arXiv 2408.14158) for the rate of checkpoints.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.display import shown
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import (
    BYTES_PER_SECOND,
    Byte,
    Bytes,
    Count,
    Dollar,
    Dollars,
    Joule,
    One,
    PerSecond,
    Quantity,
    Seconds,
    Token,
    rounded_up,
    total,
)
from dsmini.planner.reliability import (
    FailureInputs,
    best_interval,
    checkpoint_write_time,
    effective_share,
    effective_share_at_any_rate,
    failure_rate,
    failures_over,
    first_order_error,
    mean_time_to_failure,
)
from dsmini.planner.serving.decoding import DecodePlan
from dsmini.planner.serving.prefill import PrefillPlan
from dsmini.planner.training.memory import state_sizes
from dsmini.planner.training.training_plan import TrainingPlan

WRITE_RATE = BYTES_PER_SECOND(
    10 * 2**30, "checkpoint_rate", "Bytes of a checkpoint that a node writes in a second", "FF: over 10 GiB/s"
)
MOST_LOST = 7.0
"""Longest restart, checkpoint and work between two, in mean times to failure: less than 0.1 % would train."""
KOK = "Kokolis et al. (arXiv 2410.21680)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityPlan(Figures):
    """Failures of a run, and what they leave of its time."""

    running: Seconds
    """Time of the whole run without failures."""
    failure_rate: PerSecond
    mean_time: Seconds
    checkpoint_bytes: Bytes
    checkpoint_write: Seconds
    """Time in which all nodes could write a checkpoint; an asynchronous one halts training for less."""
    interval: Seconds
    share: Count
    """Share of the time that trains, if failures may also meet restarts."""
    share_first_order: Count
    first_order_error: Count
    failures: Count
    elapsed: Seconds
    """Time from the first step to the last, failures and checkpoints included."""
    elapsed_cost: Dollars | None
    energy: Quantity[Joule, One] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingCost(Figures):
    """Rent of a GPU over its tokens; None where the hardware has no price."""

    decode: Quantity[Dollar, Token]
    prefill: Quantity[Dollar, Token]


def reliability_plan(training: TrainingPlan, hardware: Hardware, failures: FailureInputs) -> ReliabilityPlan:
    """Return what failures do to a training run. Raises: ValueError for more of them than a run survives."""
    gpus, time = training.sizes.gpus, training.time
    running = (training.workload.tokens / time.tokens_per_second).named(
        "training_time", "Time of the whole run without failures"
    )
    mean = mean_time_to_failure(gpus, failures)
    size = checkpoint_bytes(training)
    nodes = rounded_up(gpus / hardware.gpus_per_node)
    interval = best_interval(failures.write_time, mean)
    lost = (failures.restart_time + failures.write_time + interval) / mean
    if lost.value > MOST_LOST:
        raise ValueError(
            f"a failure every {shown(mean)} leaves no time to train, with {shown(failures.restart_time)} for a restart "
            f"and {shown(failures.write_time)} for a checkpoint; lower one of the three"
        )
    share = effective_share_at_any_rate(mean, interval, failures)
    elapsed = (running / share).named("elapsed_time", "Time of the run with failures", KOK)
    price, power = hardware.price, hardware.power
    return ReliabilityPlan(
        running=running,
        failure_rate=failure_rate(gpus, failures),
        mean_time=mean,
        checkpoint_bytes=size,
        checkpoint_write=checkpoint_write_time(size, nodes, WRITE_RATE),
        interval=interval,
        share=share,
        share_first_order=effective_share(mean, interval, failures),
        first_order_error=first_order_error(mean, interval, failures),
        failures=failures_over(elapsed, mean),
        elapsed=elapsed,
        elapsed_cost=price and (gpus * elapsed * price).named("elapsed_cost", "Rent of the run with failures"),
        energy=power and (gpus * power * elapsed).named("training_energy", "Energy of the run with failures"),
    )


def serving_cost(decode: DecodePlan, prefill: PrefillPlan, hardware: Hardware) -> ServingCost | None:
    """Return the rent of a token, or None where the hardware has no price."""
    price = hardware.price
    if price is None:
        return None
    return ServingCost(
        decode=(price / decode.gpu_tokens_per_second).named("decode_cost", "Rent of an output token"),
        prefill=(price / prefill.gpu_tokens_per_second).named("prefill_cost", "Rent of a prompt token"),
    )


def checkpoint_bytes(training: TrainingPlan) -> Bytes:
    """Return the bytes of FP32 weights and moments of all parameters."""
    state = state_sizes(training.layout)
    weights = state.weight if training.layout.precision == "fp32" else state.master  # in FP32 there is no other copy
    size: Quantity[Byte, One] = training.model.parameters.parameters_total * total([weights, state.moments])
    return size.named("checkpoint_bytes", "Checkpoint: weights and moments", "V3, section 3.3.3")
