"""Time of an optimizer step from its parts: computing, rows of experts, waiting in the pipeline, gradients, update.

    computing     operations / (peak * efficiency), FP8 and BF16 apart, on the multiprocessors that carry no rows
    forward F     a stage's computing and the rows of its experts
    backward B    2 F, and what is computed again
    F&B           with DualPipe the longer of computing and rows, otherwise F + B
    step          forwards and backwards of all micro-batches + bubble + exchange of gradients + update

A stage is as slow as the mean of all stages, or as the layers that some stage must have where they do not divide.

Worked example, DeepSeek-V3 as published: a stage computes a micro-batch in 47 + 98 ms. Its rows take 29 ms a pass over
InfiniBand. 120 micro-batches are 17.4 s of computing; rows that no computing hides take 0.9 s, the bubble 1.06 s,
gradients and weights 0.7 s: 20.0 s a step, printed are 19.93. If computing took no time, rows would: 8.2 s are left.
So faster GPUs gain at most 2.45 times, although computing takes 10.8 times as long as what it leaves of the links.

Estimates: efficiencies are assumed (assumptions.py). Matrices that `tensor` GPUs share take two all-reduces a layer,
not hidden. ZeRO 2 and 3 exchange in every micro-batch, hidden by computing; ZeRO 0 and 1 once a step, not hidden.
Activations between stages are hidden. Without DualPipe the rows of experts are not hidden.

Source: DeepSeek-V3 report, sections 3.2 and 3.3; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4.
"""

from dataclasses import dataclass, replace

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.parameters import ModelFigures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, SECONDS, TOKENS, Count, Flops, Seconds, largest, per, total
from dsmini.planner.quantities.sizes import BF16
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.bubbles import ChunkTimes, bubble_seconds, schedule_seconds
from dsmini.planner.training.chunks import ComputeFigures, compute_figures
from dsmini.planner.training.dispatch import DispatchFigures
from dsmini.planner.training.gradients import exchange_seconds, update_seconds
from dsmini.planner.training.layout import Layout, LayoutFigures
from dsmini.planner.training.memory import TrainingMemory
from dsmini.planner.training.time import model_peak

PARTS = (
    ("computing_seconds", "Computing, a step", "V3, section 3.2"),
    ("dispatching_seconds", "Rows of experts, not hidden", "V3, section 3.2"),
    ("reducing_seconds", "All-reduces of shared matrices, a step", ""),
    ("bubble_seconds", "Waiting in the pipeline, a step", "V3, table 2"),
    ("exchange_seconds", "Gradients, weights, not hidden", "ZeRO, section 7"),
)


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
    assumed_step: Seconds
    """Time of a step at the assumed utilization."""
    step: Seconds
    """The slower of the two; with a utilization that was measured, the time at that."""
    without: tuple[Seconds, ...]
    """Time of a step if computing, links between nodes or within one, waiting, or the update took no time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Load:
    """Times of one micro-batch in a stage and pass, and of one step, before any of it hides another."""

    forward: Seconds
    backward: Seconds
    weights: Seconds
    rows: Seconds
    between: Seconds
    """Rows over the link between nodes alone."""
    within: Seconds
    """Rows over the link within a node alone."""
    reduce: Seconds
    exchange: Seconds


def step_figures(
    m: ModelInputs,
    model: ModelFigures,
    hardware: Hardware,
    layout: Layout,
    sizes: LayoutFigures,
    memory: TrainingMemory,
    dispatch: DispatchFigures | None,
    flops: Flops,
    assumptions: Assumptions,
) -> StepFigures:
    """Return the parts of a step's time; `flops` are what a utilization counts."""
    source, none = "V3, section 3.2", SECONDS(0)
    compute = compute_figures(m, model, hardware, layout, sizes, memory.micro_batch_tokens, assumptions)
    rows, between, within, ratio = none, none, none, None
    if dispatch is not None:
        d, layers = dispatch, model.layer.moe_layers + model.layer.mtp_moe_layers
        stage = memory.micro_batch_tokens * (layers / sizes.pipeline)
        rows, between, within = (t * stage for t in (d.dispatch_seconds, d.slow_seconds, d.fast_seconds))
        ratio = (compute.chunk_forward + compute.chunk_backward) / (2 * rows)
        ratio = ratio.named("compute_to_dispatch", "Computing over rows of experts", source)
    load = _Load(
        forward=compute.chunk_forward,
        backward=compute.chunk_backward,
        weights=compute.chunk_weights,
        rows=rows.named("chunk_dispatch", "Rows of a micro-batch, a stage and pass", source),
        between=between,
        within=within,
        reduce=_reduce_seconds(m, hardware, layout, sizes, memory),
        exchange=exchange_seconds(hardware, layout, sizes, memory),
    )
    parts = _parts(layout, sizes, load)
    computing, dispatching, reducing, bubble, exchange = (
        part.named(*title) for part, title in zip(parts, PARTS, strict=True)
    )
    update = update_seconds(hardware, layout, sizes, memory)
    roof = computing + dispatching + reducing + bubble + exchange + update
    roof = roof.named("roof_step_seconds", "Time of a step from its parts", source)
    peak = sizes.gpus * model_peak(layout, hardware)
    assumed = (flops / (peak * assumptions.utilization)).named(
        "assumed_step_seconds", "Time of a step at the assumed MFU", "INS, table 4"
    )
    slower = assumed if assumptions.stated else largest(assumed, roof)
    return StepFigures(
        compute=compute,
        chunk_dispatch=load.rows,
        chunk_tensor=load.reduce,
        compute_to_dispatch=ratio,
        computing=computing,
        dispatching=dispatching,
        reducing=reducing,
        bubble=bubble,
        exchange=exchange,
        update=update,
        roof_step=roof,
        roof_utilization=(flops / (peak * roof)).named("roof_utilization", "MFU from the parts of a step"),
        assumed_step=assumed,
        step=slower.named("step_seconds", "Time of a step"),
        without=_without(layout.gpus <= hardware.gpus_per_node.value, layout, sizes, load, update),
    )


def _parts(layout: Layout, sizes: LayoutFigures, load: _Load) -> tuple[Seconds, Seconds, Seconds, Seconds, Seconds]:
    """Return what a GPU waits for in a step: computing, rows, all-reduces, the pipeline, gradients and weights."""
    dual, number = layout.schedule == "dualpipe", sizes.micro_batches
    alone, rows = load.forward + load.backward, 2 * load.rows
    chunks = ChunkTimes(
        forward=load.forward + load.rows + load.reduce,
        backward=load.backward + load.rows + load.reduce,
        weights=load.weights,
        both=(largest(alone, rows) if dual else alone + rows) + 2 * load.reduce,
    )
    computing, reducing = number * alone, 2 * number * load.reduce
    dispatching = schedule_seconds(layout.schedule, sizes.pipeline, number, chunks) - computing - reducing
    bubble = bubble_seconds(layout.schedule, sizes.pipeline, chunks)
    exchange = load.exchange if layout.zero < 2 else largest(SECONDS(0), load.exchange - computing)
    return computing, dispatching, reducing, bubble, exchange


def _without(one_node: bool, layout: Layout, sizes: LayoutFigures, load: _Load, update: Seconds) -> tuple[Seconds, ...]:
    """Return the time of a step without each resource; all GPUs are of one node or of several."""
    none = SECONDS(0)
    links = replace(load, rows=load.within, exchange=load.exchange if one_node else none)
    inside = replace(load, rows=load.between, reduce=none, exchange=none if one_node else load.exchange)
    whole, alone = _parts(layout, sizes, load), replace(load, forward=none, backward=none, weights=none)
    left = [total((*_parts(layout, sizes, changed), update)) for changed in (alone, links, inside)]
    left += [total((*whole[:3], whole[4], update)), total(whole)]
    names = ("computing", "links_between", "links_within", "bubble", "update")
    title = "Time of a step if {} took no time"
    pairs = zip(names, left, strict=True)
    return tuple(t.named(f"step_without_{name}", title.format(name.replace("_", " "))) for name, t in pairs)


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
