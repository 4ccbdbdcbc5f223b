"""Time and cost of training from the time of a step. A utilization (MFU) is the share of the peak that it reaches.

    step              tokens of a step * operations of a token / (GPUs * peak * utilization)
    tokens a day      tokens of a step / step * 86400
    GPU-hours         GPUs * time / 3600
    dollars           GPU-hours * price

Operations are 6 N + 3 L H (d_qk + d_v) T a token, without multi-token prediction and recomputation. The peak is that of
BF16 also where products are FP8. DeepSeek counts both like this.

Worked example, DeepSeek-V3 on 2048 H800 at 38.94 %: a step takes 15360 * 4096 * 250.4e9 / (2048 * 989e12 * 0.3894) =
19.98 s, so a day has 272.1B tokens. A trillion tokens take 180.6K GPU-hours and 3.68 days; 14.8T take 2674K GPU-hours
and $5.35M.

Source: DeepSeek-V3 report, table 1; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.parameters import ModelFigures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import Count, Dollars, Flops, FlopsPerSecond, Seconds, Tokens, TokensPerSecond
from dsmini.planner.training.assumptions import DAY, HOUR, TRILLION
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTime(Figures):
    """Time and cost of a training run."""

    step_tokens: Tokens
    step_flops: Flops
    step_seconds: Seconds
    tokens_per_second: TokensPerSecond
    tokens_per_day: Tokens
    hours_per_trillion: Count
    """GPU-hours of a trillion tokens."""
    days_per_trillion: Count
    gpu_hours: Count
    days: Count
    cost: Dollars | None
    """Rent of all GPUs; None where the hardware has no price."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilization(Figures):
    """Utilization of a measured step."""

    flops_per_gpu: FlopsPerSecond
    flops_per_gpu_full_square: FlopsPerSecond
    """As flops_per_gpu, counting what a causal mask leaves out."""
    utilization: Count
    utilization_full_square: Count


def model_peak(layout: Layout, hardware: Hardware) -> FlopsPerSecond:
    """Return the peak that a utilization refers to: BF16's, or FP32's where products are FP32."""
    return hardware.peak("float32" if layout.precision == "fp32" else "bfloat16")


def step_work(model: ModelFigures, workload: Workload) -> tuple[Tokens, Flops]:
    """Return the tokens and the operations of a step."""
    tokens = (workload.batch * workload.seq_len).named("step_tokens", "Tokens of a step", "V3, section 4.2")
    flops = (model.operations.training_flops * tokens).named("step_flops", "Operations of a step", "INS, table 2")
    return tokens, flops


def rates(
    hardware: Hardware,
    gpus: Count,
    workload: Workload,
    tokens: Tokens,
    flops: Flops,
    step: Seconds,
    prefix: str = "training_",
) -> TrainingTime:
    """Return time and cost from the time of a step, predicted or measured; `prefix` begins the names of figures."""
    source, price = "V3, table 1", hardware.price
    speed = (tokens / step).named(f"{prefix}tokens_per_second", "Tokens a second, all GPUs")
    trillion, whole = TRILLION / speed, workload.tokens / speed
    hours = (gpus * whole / HOUR).named(f"{prefix}gpu_hours", "GPU-hours of the whole run", source)
    cost = None
    if price is not None:
        cost = (hours * HOUR * price).named(f"{prefix}cost", "Rent of the whole run", source)
    return TrainingTime(
        step_tokens=tokens,
        step_flops=flops,
        step_seconds=step,
        tokens_per_second=speed,
        tokens_per_day=(speed * DAY).named(f"{prefix}tokens_per_day", "Tokens a day", "INS, table 4"),
        hours_per_trillion=(gpus * trillion / HOUR).named(
            f"{prefix}hours_per_trillion", "GPU-hours of a trillion tokens", source
        ),
        days_per_trillion=(trillion / DAY).named(f"{prefix}days_per_trillion", "Days of a trillion tokens", source),
        gpu_hours=hours,
        days=(whole / DAY).named(f"{prefix}days", "Days of the whole run", source),
        cost=cost,
    )


def measured_utilization(model: ModelFigures, peak: FlopsPerSecond, gpus: Count, speed: TokensPerSecond) -> Utilization:
    """Return the utilization of a run that trains this many tokens a second.

    DeepSeek-V3 at 272.80B tokens a day: 386 TFLOP/s causal, 39.0 % (printed 385 and 38.94), 433 and 43.8 % otherwise.
    """
    source = "INS, table 4"
    causal = speed * model.operations.training_flops / gpus
    square = speed * model.operations.training_flops_full_square / gpus
    causal = causal.named("flops_per_gpu", "Operations a second of a GPU, causal", source)
    square = square.named("flops_per_gpu_full_square", "Operations a second of a GPU, without a causal half", source)
    return Utilization(
        flops_per_gpu=causal,
        flops_per_gpu_full_square=square,
        utilization=(causal / peak).named("measured_utilization", "MFU, causal", source),
        utilization_full_square=(square / peak).named("measured_utilization_full_square", "MFU, not causal", source),
    )
