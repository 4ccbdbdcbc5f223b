"""Memory of each GPU of a training run.

    weights        parameters of the GPU in the compute dtype: 2 bytes; FP8 1 byte and a scale a block of 128x128
    gradients      4 bytes: micro-batches are added up in FP32
    master         4 bytes of FP32 weights, divided over data-parallel GPUs from ZeRO 1 on
    moments        8 bytes of FP32, or 4 of BF16, divided like master
    activations    micro-batches in flight * tokens * layers * bytes of a token (activations.py)
    working        largest layer's activations that "full" makes again; two layers' weights that ZeRO 3 gathers

Undivided, a matrix takes 2 + 4 + 4 + 8 = 18 bytes a parameter in BF16, and 1 + 4 + 4 + 4 = 13 with FP8 and BF16
moments. ZeRO divides a matrix by `data`, an expert by `data * tensor / expert`. With DualPipe it divides both by two
more, because the two halves of a pipeline hold the same stages. `tensor` divides no norms, no gates and none of MLA's
projections to latents.

stages.py has the layers and the micro-batches in flight of the GPUs that may hold most.

Lower bound: buffers of communication, fragments, temporary results of the operation at work are left out.
Estimates: dividing activations by `tensor` takes sequence parallelism; experts are perfectly balanced; layers are
placed as evenly as they divide.

Worked example, DeepSeek-V3 as published, a middle GPU with two stages of 4 MoE layers, 3.27B parameters: weights
3.3 GB, gradients 13.1, master weights and moments 1.4 each, 8.5 * 2 * 4 layers * 4096 tokens * 158,920 bytes = 44.3 GB
of activations: 63.5 GB of 80. The first GPU needs 65.0 GB. With BF16 products and rows it would need 94 GB.

Source: DeepSeek-V3 report, sections 3.2 and 3.3.3, table 2; ZeRO (arXiv 1910.02054).
"""

from dataclasses import dataclass

from dsmini.planner.model.parameters import ModelFigures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, Bytes, BytesPerToken, Count, Tokens, largest, total
from dsmini.planner.quantities.sizes import BF16, FP8, FP8_TILE, FP32
from dsmini.planner.training.activations import ActivationFigures, Activations
from dsmini.planner.training.layout import Layout, LayoutFigures
from dsmini.planner.training.one_process import block_at_work
from dsmini.planner.training.stages import (
    Kind,
    LocalLayers,
    Stage,
    StageParameters,
    local_layers,
    stage_parameters,
    stages_of_gpus,
)

ZERO3_GATHERED = 2
"""Layers whose weights ZeRO 3 holds whole: the one at work and the one that is fetched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSizes(Figures):
    """Bytes of the training state of one parameter of a matrix, undivided."""

    weight: Bytes
    gradient: Bytes
    master: Bytes
    moments: Bytes
    total: Bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory(Figures):
    """Bytes of one kind of GPU, and the parameters it holds."""

    title: str
    parameters: Count
    """Parameters of a GPU, both stages' with DualPipe."""
    experts: Count
    """Routed experts' share of the parameters."""
    weights: Bytes
    gradients: Bytes
    master: Bytes
    moments: Bytes
    activations: Bytes
    working: Bytes
    total: Bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory(Figures):
    """Memory of the GPUs of a layout. A lower bound."""

    state: StateSizes
    activations: ActivationFigures
    local: LocalLayers
    micro_batch_tokens: Tokens
    """Tokens of a micro-batch on one GPU."""
    gpus: tuple[GpuMemory, ...]
    memory_needed: Bytes
    """Memory of the GPU that holds most."""


def state_sizes(layout: Layout) -> StateSizes:
    """Return the bytes of a matrix's parameter: 18 in BF16, 13 as V3 trains, 16 in FP32."""
    source = "V3, section 3.3.3"
    weight = {"fp32": FP32, "bf16": BF16, "fp8": FP8 + FP32 / (FP8_TILE * FP8_TILE)}[layout.precision]
    master = 0 * FP32 if layout.precision == "fp32" else total([FP32])  # in FP32 the weight is its own master
    moment = FP32 if layout.moments == "float32" else BF16
    moments = 2 * moment if layout.optimizer == "adamw" else total([FP32])
    parts = {
        "weight": total([weight]).named("state_weight", "Weight of a parameter, for products", source),
        "gradient": total([FP32]).named("state_gradient", "Gradient of a parameter", source),
        "master": master.named("state_master", "Master weight of a parameter", source),
        "moments": moments.named("state_moments", "Moments of a parameter", source),
    }
    return StateSizes(
        **parts,
        total=total(parts.values()).named("state_parameter", "Training state of a parameter", source),
    )


def training_memory(m: ModelInputs, model: ModelFigures, layout: Layout, sizes: LayoutFigures) -> TrainingMemory:
    """Return the memory of the GPUs of a layout by part."""
    state, local = state_sizes(layout), local_layers(m, model, sizes)
    tokens = sizes.micro_batch * model.seq_len / sizes.tensor
    tokens = tokens.named("micro_batch_tokens", "Tokens of a micro-batch on a GPU")
    act = Activations(m=m, precision=layout.precision, recompute=layout.recompute).figures()
    working = _working(m, model, layout, sizes, local, state, tokens)
    gpus: list[GpuMemory] = []
    for kind, stages in stages_of_gpus(m, model, layout, sizes):
        held = [stage_parameters(stage, m, model, sizes, local) for stage in stages]
        activations = total(_in_flight(stage, act) for stage in stages) * tokens
        gpus.append(_gpu(kind, held, activations, working, layout, sizes, state))
    whole = [gpu.total for gpu in gpus]
    needed = whole[0] if len(whole) == 1 else largest(*whole)
    return TrainingMemory(
        state=state,
        activations=act,
        local=local,
        micro_batch_tokens=tokens,
        gpus=tuple(gpus),
        memory_needed=needed.named("memory_needed", "Memory of the GPU that holds most", "V3, section 3.2"),
    )


def _gpu(
    kind: Kind,
    held: list[StageParameters],
    activations: Bytes,
    working: Bytes,
    layout: Layout,
    sizes: LayoutFigures,
    state: StateSizes,
) -> GpuMemory:
    """Return the memory of a GPU that holds the parameters of some stages."""
    matrices, plain = total(part.matrices for part in held), total(part.plain for part in held)
    experts = total(part.experts for part in held)
    copies = COUNT(layout.copies)
    replicas, expert_replicas = sizes.data * copies, sizes.expert_data * copies

    def share(stage_of_zero: int, of_matrices: Bytes, of_plain: Bytes) -> Bytes:
        """Return the bytes of a part of the state, divided from a stage of ZeRO on."""
        rest = matrices * of_matrices + plain * of_plain
        if layout.zero < stage_of_zero:
            return rest + experts * of_matrices
        return rest / replicas + experts * of_matrices / expert_replicas

    plain_moments = 2 * (FP32 if layout.moments == "float32" else BF16)
    parts = {
        "weights": share(3, state.weight, FP32 if layout.precision == "fp32" else BF16),
        "gradients": share(2, state.gradient, state.gradient),
        "master": share(1, state.master, state.master),
        "moments": share(1, state.moments, plain_moments),
        "activations": activations,
        "working": working,
    }
    titles = {
        "weights": "weights for products",
        "gradients": "gradients",
        "master": "master weights",
        "moments": "moments of the optimizer",
        "activations": "activations of the micro-batches in flight",
        "working": "what is made again or gathered for a layer",
    }
    where = f"{kind.capitalize()} GPU"
    source = "V3, section 3.2"
    named = {
        name: part.named(f"memory_{name}_{kind}", f"{where}: {titles[name]}", source) for name, part in parts.items()
    }
    return GpuMemory(
        title=where,
        parameters=(matrices + plain + experts).named(f"parameters_{kind}", f"{where}: parameters"),
        experts=experts.named(f"expert_parameters_{kind}", f"{where}: parameters of routed experts"),
        **named,
        total=total(named.values()).named(f"memory_{kind}", f"{where}: memory", source),
    )


def _in_flight(stage: Stage, act: ActivationFigures) -> BytesPerToken:
    """Return the bytes of a token in all micro-batches in flight of a stage."""
    parts = [stage.dense * act.dense_layer, stage.moe * act.moe_layer]
    if stage.first:
        parts.append(act.embedding)
    if stage.last:
        parts += [act.head, stage.mtp * act.mtp]
    return stage.in_flight * total(parts)


def _working(
    m: ModelInputs,
    model: ModelFigures,
    layout: Layout,
    sizes: LayoutFigures,
    local: LocalLayers,
    state: StateSizes,
    tokens: Tokens,
) -> Bytes:
    """Return the bytes of a block that is made again, and of layers whose weights are gathered."""
    parts = [0 * state.weight]
    if layout.recompute == "full":
        parts.append(block_at_work(m, layout) * tokens)
    if layout.zero == 3:
        has_moe = m.config.n_dense_layers < m.config.n_layers + m.config.n_mtp_layers
        widest = largest(local.dense, local.moe + local.experts) if has_moe else local.dense
        parts.append(ZERO3_GATHERED * widest * state.weight)
    return total(parts)
