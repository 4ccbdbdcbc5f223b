"""Time of an optimizer step from its parts: computing, rows of experts, waiting in the pipeline, gradients, update.

    computing     operations / (peak * efficiency), FP8 and BF16 apart, on the multiprocessors that carry no rows
    forward F     a stage's computing and the rows of its experts
    backward B    2 F, and what is computed again
    F&B           with DualPipe the longer of computing and rows, otherwise F + B
    step          forwards and backwards of all micro-batches + bubble + exchange of gradients + update

A stage is as slow as the mean of all stages, or as the layers that some stage must have where they do not divide.

Worked example, DeepSeek-V3 as published: a stage computes a micro-batch in 47 + 98 ms. Its rows take 29 ms a pass over
InfiniBand. 120 micro-batches are 17.4 s of computing; rows that no computing hides take 0.9 s, the bubble 1.06 s,
gradients and weights 0.7 s: 20.0 s a step, printed are 19.93.

Estimates: efficiencies are assumed (assumptions.py). Matrices that `tensor` GPUs share take two all-reduces a layer,
not hidden. ZeRO 2 and 3 exchange in every micro-batch, hidden by computing; ZeRO 0 and 1 once a step, not hidden.
Activations between stages are hidden. Without DualPipe the rows of experts are not hidden.

Source: DeepSeek-V3 report, sections 3.2 and 3.3; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.parameters import ModelFigures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, SECONDS, TOKENS, Count, Seconds, largest, per
from dsmini.planner.quantities.sizes import BF16
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.bubbles import ChunkTimes, bubble_seconds, schedule_seconds
from dsmini.planner.training.chunks import ComputeFigures, compute_figures
from dsmini.planner.training.dispatch import DispatchFigures
from dsmini.planner.training.gradients import exchange_seconds, update_seconds
from dsmini.planner.training.layout import Layout, LayoutFigures
from dsmini.planner.training.memory import TrainingMemory
from dsmini.planner.training.time import TrainingTime, model_peak


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures(Figures):
    """Parts of an optimizer step's time on the slowest stage. Estimates."""

    compute: ComputeFigures
    chunk_dispatch: Seconds
    """Rows of a micro-batch in one pass through a stage."""
    chunk_tensor: Seconds
    """All-reduces of a micro-batch in one pass through a stage, of matrices that GPUs share."""
    compute_to_dispatch: Count | None
    """Computing of a micro-batch over the time of its rows; DeepSeek-V3 prints about 1 without its savings."""
    computing: Seconds
    """Time in which computing is what a GPU waits for."""
    dispatching: Seconds
    """Time in which the rows of experts are what a GPU waits for."""
    reducing: Seconds
    """Time of the all-reduces of shared matrices."""
    bubble: Seconds
    exchange: Seconds
    """Time of gradients and weights between data-parallel GPUs that is not hidden."""
    update: Seconds
    roof_step: Seconds
    roof_utilization: Count


def step_figures(
    m: ModelInputs,
    model: ModelFigures,
    hardware: Hardware,
    layout: Layout,
    sizes: LayoutFigures,
    memory: TrainingMemory,
    dispatch: DispatchFigures | None,
    time: TrainingTime,
    assumptions: Assumptions,
) -> StepFigures:
    """Return the parts of a step's time."""
    source, none = "V3, section 3.2", SECONDS(0)
    compute = compute_figures(m, model, hardware, layout, sizes, memory.micro_batch_tokens, assumptions)
    forward, backward = compute.chunk_forward, compute.chunk_backward
    rows, ratio = none, None
    if dispatch is not None:
        layers = (model.layer.moe_layers + model.layer.mtp_moe_layers) / sizes.pipeline
        rows = dispatch.dispatch_seconds * memory.micro_batch_tokens * layers
        ratio = (forward + backward) / (2 * rows)
        ratio = ratio.named("compute_to_dispatch", "Computing over rows of experts", source)
    rows = rows.named("chunk_dispatch", "Rows of a micro-batch, a stage and pass", source)
    reduce = _reduce_seconds(m, hardware, layout, sizes, memory)
    both = largest(forward + backward, 2 * rows) + 2 * reduce
    chunks = ChunkTimes(
        forward=forward + rows + reduce,
        backward=backward + rows + reduce,
        weights=compute.chunk_weights,
        both=both if layout.schedule == "dualpipe" else forward + backward + 2 * (rows + reduce),
    )
    number = sizes.micro_batches
    work = schedule_seconds(layout.schedule, sizes.pipeline, number, chunks)
    bubble = bubble_seconds(layout.schedule, sizes.pipeline, chunks)
    bubble = bubble.named("bubble_seconds", "Waiting in the pipeline, a step", "V3, table 2")
    computing = (number * (forward + backward)).named("computing_seconds", "Computing, a step", source)
    reducing = (2 * number * reduce).named("reducing_seconds", "All-reduces of shared matrices, a step")
    dispatching = (work - computing - reducing).named("dispatching_seconds", "Rows of experts, not hidden", source)
    exchange = exchange_seconds(hardware, layout, sizes, memory, computing)
    update = update_seconds(hardware, layout, sizes, memory)
    step = (computing + dispatching + reducing + bubble + exchange + update).named(
        "roof_step_seconds", "Time of a step from its parts", source
    )
    peak = sizes.gpus * model_peak(layout, hardware)
    return StepFigures(
        compute=compute,
        chunk_dispatch=rows,
        chunk_tensor=reduce,
        compute_to_dispatch=ratio,
        computing=computing,
        dispatching=dispatching,
        reducing=reducing,
        bubble=bubble,
        exchange=exchange,
        update=update,
        roof_step=step,
        roof_utilization=(time.step_flops / (peak * step)).named("roof_utilization", "MFU from the parts of a step"),
    )


def _reduce_seconds(
    m: ModelInputs, hardware: Hardware, layout: Layout, sizes: LayoutFigures, memory: TrainingMemory
) -> Seconds:
    """Return the time of two all-reduces a layer in one pass; each moves every row twice but for the own part."""
    seconds = SECONDS(0)
    if layout.tensor > 1:
        if hardware.fast_link is None:
            raise ValueError(
                f"{hardware.title} has no fast link between GPUs, which tensor={layout.tensor} needs; use 1"
            )
        others, layers = sizes.tensor - COUNT(1), (m.n_layers + m.n_mtp_layers) / sizes.pipeline
        rows = per(m.dim * BF16, TOKENS) * memory.micro_batch_tokens
        seconds = rows * (4 * others * layers) / hardware.fast_link
    return seconds.named("chunk_tensor", "All-reduces of a micro-batch, a stage and pass")
