"""DeepSeek-V3's training as printed, next to what the formulas give: time, utilization and cost.

    printed                                    from the printed step of 19.926 s
    272.80B tokens a day                       15360 * 4096 / 19.926 * 86400 = 272.80B
    385 TFLOP/s, MFU 38.94 % (causal)          386.1, 39.04 %
    432 TFLOP/s, MFU 43.73 % (not causal)      433.5, 43.83 %
    180K GPU-hours a trillion, 3.7 days        180.2K, 3.67
    2664K GPU-hours of pre-training            2667K
    2788K GPU-hours in all, $5.576M            2664 + 119 + 5, at $2

A known miss: the extension of the context is two phases of 62.9B tokens, at 32K and 128K. At the utilization of
pre-training they would take 75.5K GPU-hours, printed are 119K: the longest sequences do not reach that utilization.

Source: DeepSeek-V3 report, table 1, sections 4.2 and 4.3; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.parameters import ModelFigures, model_figures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, SECONDS, TOKENS, Count, Dollars, Flops, Seconds, total
from dsmini.planner.training.assumptions import HOUR
from dsmini.planner.training.bubbles import PublishedBubble, published_bubble
from dsmini.planner.training.time import TrainingTime, Utilization, measured_utilization, rates
from dsmini.planner.training.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTraining(Figures):
    """Figures of DeepSeek-V3's training from the printed time of a step and the printed GPU-hours."""

    table_step: Seconds
    time: TrainingTime
    utilization: Utilization
    bubble: PublishedBubble
    extension_hours: Count
    """GPU-hours that the context extension would take at the utilization of pre-training; printed are 119K."""
    printed_hours: Count
    printed_cost: Dollars | None


def published_training(m: ModelInputs, hardware: Hardware, workload: Workload) -> PublishedTraining:
    """Return DeepSeek-V3's figures; `m`, `hardware` and `workload` are its own."""
    table = "V3, table 1"
    model = model_figures(m, workload.seq_len)
    gpus = COUNT(2048, "table_gpus", "GPUs of V3's training", "V3, section 3.1")
    step = SECONDS(19.926, "table_step", "Time of a step of V3's training", "INS, table 4")
    tokens = (workload.batch * workload.seq_len).named("published_step_tokens", "Tokens of a step", "V3, section 4.2")
    flops = (model.operations.training_flops * tokens).named("published_step_flops", "Operations of a step")
    time = rates(hardware, gpus, workload, tokens, flops, step, prefix="published_")
    utilization = measured_utilization(model, hardware.peak("bfloat16"), gpus, time.tokens_per_second)
    phases = ((2664e3, "pre-training"), (119e3, "context extension"), (5e3, "post-training"))
    hours = total(
        COUNT(value, f"printed_hours_{name.replace('-', '_').replace(' ', '_')}", f"GPU-hours of {name}", table)
        for value, name in phases
    ).named("printed_hours", "GPU-hours of V3", table)
    cost = None
    if hardware.price is not None:
        cost = (hours * HOUR * hardware.price).named("printed_cost", "Rent of V3's training", table)
    extension = _extension_flops(m) / utilization.flops_per_gpu / HOUR
    return PublishedTraining(
        table_step=step,
        time=time,
        utilization=utilization,
        bubble=published_bubble(),
        extension_hours=extension.named("extension_hours", "GPU-hours of the context extension at that utilization"),
        printed_hours=hours,
        printed_cost=cost,
    )


def _extension_flops(m: ModelInputs) -> Flops:
    """Return the operations of the two phases of the context extension, 1000 steps each."""
    source = "V3, section 4.3"
    steps = COUNT(1000, "extension_steps", "Steps of a phase of the context extension", source)

    def phase(seq_len: int, batch: int) -> Flops:
        length = TOKENS(seq_len, f"extension_seq_len_{seq_len // 1024}k", "Tokens of a sequence in extension", source)
        rows = COUNT(batch, f"extension_batch_{seq_len // 1024}k", "Sequences of a step in extension", source)
        model: ModelFigures = model_figures(m, length)
        return model.operations.training_flops * (steps * rows * length)

    return phase(32768, 1920) + phase(131072, 480)
