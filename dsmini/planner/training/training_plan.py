"""Plan of a training run: everything that is predicted of a model on a cluster, in one call.

    >>> plan = training_plan(model, hardware, Layout(gpus=2048, pipeline=16, expert=64, ...), workload)
    >>> plan.memory_needed, plan.time.days, plan.step.bubble
    >>> plan.figures()["training_gpu_hours"]        # every figure by name

One GPU is planned as dsmini itself trains (one_process.py); more GPUs as DeepSeek-V3 was trained.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.parameters import ModelFigures, model_figures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import Bytes, BytesPerSecond, Count
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.dispatch import DispatchFigures, dispatch_figures
from dsmini.planner.training.layout import Layout, LayoutFigures, check_layout, layout_figures
from dsmini.planner.training.memory import TrainingMemory, training_memory
from dsmini.planner.training.one_process import OneProcessMemory, one_process_memory
from dsmini.planner.training.step import StepFigures, step_figures
from dsmini.planner.training.time import TrainingTime, rates, step_work
from dsmini.planner.training.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkLoad(Figures):
    """Load of the link between nodes by rows of experts, at the step's utilization."""

    rate: BytesPerSecond
    share: Count
    rate_unlimited: BytesPerSecond
    """As rate, with a row of its own for each chosen expert."""
    share_unlimited: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan(Figures):
    """All figures of a training run. See each part for which are exact, lower bounds and estimates."""

    layout: Layout
    workload: Workload
    assumptions: Assumptions
    model: ModelFigures
    sizes: LayoutFigures
    memory: TrainingMemory | None
    """Memory of the GPUs of a cluster; None for a layout of one GPU."""
    process: OneProcessMemory | None
    """Memory of one process, for a layout of one GPU."""
    memory_needed: Bytes
    """Memory of the GPU that holds most, a lower bound."""
    memory_free: Bytes
    """Memory of the hardware without what the fullest GPU needs; negative where the model does not fit."""
    time: TrainingTime
    dispatch: DispatchFigures | None
    """Traffic of experts; None where each GPU has all of them."""
    link: LinkLoad | None
    step: StepFigures

    @property
    def fits(self) -> bool:
        """True if every GPU has the memory. The need is a lower bound, so leave room."""
        return self.memory_free.value >= 0

    @property
    def is_slowed(self) -> bool:
        """True if time and cost are by the parts of a step, since these take longer than the assumed utilization."""
        return self.time.step_seconds.value > self.step.assumed_step.value


def training_plan(
    m: ModelInputs,
    hardware: Hardware,
    layout: Layout,
    workload: Workload,
    assumptions: Assumptions | None = None,
) -> TrainingPlan:
    """Return the plan of a training run.

    Raises: ValueError with one sentence for a layout that the model, the nodes or the batch cannot have, and for a
        precision or a link that the hardware lacks.
    """
    check_layout(layout, m.config, round(hardware.gpus_per_node.value), round(workload.batch.value))
    return plan_unchecked(m, hardware, layout, workload, assumptions or Assumptions.of())


def plan_unchecked(
    m: ModelInputs,
    hardware: Hardware,
    layout: Layout,
    workload: Workload,
    assumptions: Assumptions,
    model: ModelFigures | None = None,
) -> TrainingPlan:
    """Return the plan of a layout that was checked; `model` are the model's figures if they are there already."""
    model = model or model_figures(m, workload.seq_len)
    sizes = layout_figures(layout, m, workload)
    memory = training_memory(m, model, layout, sizes)
    process = one_process_memory(m, model, layout, sizes.micro_batch) if layout.gpus == 1 else None
    tokens, flops = step_work(model, workload)
    dispatch = None
    if layout.expert > 1:
        dispatch = dispatch_figures(m, hardware, sizes.expert, "fp8" if layout.precision == "fp8" else "bf16")
    needed = process.total if process is not None else memory.memory_needed
    step = step_figures(m, model, hardware, layout, sizes, memory, dispatch, flops, assumptions)
    time = rates(hardware, sizes.gpus, workload, tokens, flops, step.step)
    return TrainingPlan(
        layout=layout,
        workload=workload,
        assumptions=assumptions,
        model=model,
        sizes=sizes,
        memory=memory if process is None else None,
        process=process,
        memory_needed=needed,
        memory_free=(hardware.memory - needed).named("memory_free", "Memory of a GPU that is left"),
        time=time,
        dispatch=dispatch,
        link=None if dispatch is None else _link_load(hardware, model, sizes, time, dispatch),
        step=step,
    )


def _link_load(
    hardware: Hardware, model: ModelFigures, sizes: LayoutFigures, time: TrainingTime, dispatch: DispatchFigures
) -> LinkLoad | None:
    """Return the load of the slow link: forward and backward of the MoE layers of a stage."""
    link, source = hardware.slow_link, "V3, section 3.2.2"
    if link is None:
        return None
    tokens = time.tokens_per_second / (sizes.data * sizes.tensor)
    passes = 2 * model.layer.moe_layers / sizes.pipeline
    limited, free = (tokens * passes * sent for sent in (dispatch.slow_bytes, dispatch.slow_bytes_unlimited))
    limited = limited.named("slow_link_rate", "Rows of experts over the slow link, a GPU", source)
    free = free.named("slow_link_rate_unlimited", "The same with a row for each expert", source)
    return LinkLoad(
        rate=limited,
        share=(limited / link).named("slow_link_share", "Share of the slow link", source),
        rate_unlimited=free,
        share_unlimited=(free / link).named("slow_link_share_unlimited", "Share of the slow link, unlimited", source),
    )
