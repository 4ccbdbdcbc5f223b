"""Contents of pipeline stages: which layers a GPU holds, and how many micro-batches are in flight in them.

Layers are placed as evenly as they divide, the first stages one more. The first stage has the embedding. The last has
the head, multi-token prediction and its copy of the embedding. DualPipe needs no copy, because the first and the last
stage are on one GPU.

Only some GPUs can hold most: the first, the second with dense layers that the first has no room for, one in the middle
with as many MoE layers as there can be, and the last. With DualPipe each holds two stages.

In flight, with PP stages and s of them after a GPU's own: 1F1B s + 1, ZB1P PP, DualPipe PP + 1 in both stages together
(V3, table 2): PP of a pipeline's first stage and 1 of its last, on the GPUs between half in each stage. A middle GPU
counts as the second one.

Worked example, DeepSeek-V3, 61 layers in 16 stages: 13 stages of 4 layers, then 3 of 3, the last with the MTP block.

Source: DeepSeek-V3 report, sections 2.2 and 3.2.1, table 2.
"""

from dataclasses import dataclass, replace
from typing import Literal

from dsmini.planner.model.matrices import attention_matrices, parameters_of
from dsmini.planner.model.parameters import ModelFigures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, Count, largest, smallest, total
from dsmini.planner.training.layout import Layout, LayoutFigures

Kind = Literal["only", "first", "second", "middle", "last"]
"""Kind of GPU by its place in the pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Contents of a pipeline stage, and the micro-batches in flight in it."""

    dense: Count
    """Dense layers, those of multi-token prediction included."""
    moe: Count
    """MoE layers, those of multi-token prediction included."""
    vocabularies: Count
    """Matrices of the size of the embedding: embedding, head, copy for multi-token prediction."""
    mtp: Count
    """Depths of multi-token prediction."""
    in_flight: Count
    first: bool = False
    last: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalLayers(Figures):
    """Parameters of a layer on one GPU, without gate and norms."""

    dense: Count
    moe: Count
    """Attention and shared experts."""
    experts: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class StageParameters:
    """Parameters of a stage on one GPU."""

    matrices: Count
    """Matrices that may be FP8, without routed experts."""
    plain: Count
    """Vocabulary, gates, norms, projections of multi-token prediction."""
    experts: Count


def stages_of_gpus(
    m: ModelInputs, model: ModelFigures, layout: Layout, sizes: LayoutFigures
) -> list[tuple[Kind, list[Stage]]]:
    """Return the stages of each kind of GPU: the only one, or the first, a middle one and the last."""
    layer, most, least = model.layer, sizes.layers_first, sizes.layers_last
    none, one, pipeline = COUNT(0), COUNT(1), sizes.pipeline
    mtp_dense, mtp_moe, mtp = layer.mtp_dense_layers, layer.mtp_moe_layers, m.n_mtp_layers
    if layout.pipeline == 1:
        dense, moe = layer.dense_layers + mtp_dense, layer.moe_layers + mtp_moe
        only = Stage(dense=dense, moe=moe, vocabularies=COUNT(2), mtp=mtp, in_flight=one, first=True, last=True)
        return [("only", [only])]
    shared = layout.schedule == "dualpipe" or not m.config.n_mtp_layers  # one copy of the embedding
    dense_first = smallest(layer.dense_layers, most)
    dense_second = smallest(layer.dense_layers - dense_first, most)
    moe_middle = smallest(layer.moe_layers, most)
    dense_last = largest(none, layer.dense_layers - (m.n_layers - least))
    first = Stage(dense=dense_first, moe=most - dense_first, vocabularies=one, mtp=none, in_flight=pipeline, first=True)
    last = Stage(
        dense=dense_last + mtp_dense,
        moe=least - dense_last + mtp_moe,
        vocabularies=one if shared else COUNT(2),
        mtp=mtp,
        in_flight=pipeline if layout.schedule == "zb1p" else one,
        last=True,
    )
    flight = {"1f1b": pipeline - one, "zb1p": pipeline, "dualpipe": (pipeline + one) / COUNT(2)}[layout.schedule]
    second = Stage(dense=dense_second, moe=most - dense_second, vocabularies=none, mtp=none, in_flight=flight)
    middle = replace(second, dense=most - moe_middle, moe=moe_middle)
    inner: list[tuple[Kind, list[Stage]]] = []
    if layout.pipeline > 2:
        inner = [("second", [second, middle])] if m.config.n_dense_layers > 1 else []
        inner.append(("middle", [middle, middle]))
    if layout.schedule == "dualpipe":
        return [("first", [first, last]), *inner]
    return [("first", [first]), *((kind, stages[:1]) for kind, stages in inner), ("last", [last])]


def local_layers(m: ModelInputs, model: ModelFigures, sizes: LayoutFigures) -> LocalLayers:
    """Return the parameters of a layer on one GPU."""
    layer, t, matrices = model.layer, sizes.tensor, attention_matrices(m)
    attention = parameters_of(matrices.by_head) / t
    if matrices.whole:
        attention = attention + parameters_of(matrices.whole)
    return LocalLayers(
        dense=(attention + layer.dense_parameters / t).named("local_dense", "Matrices of a dense layer on a GPU"),
        moe=(attention + layer.shared_parameters / t).named(
            "local_moe", "Matrices of a MoE layer on a GPU, shared part"
        ),
        experts=(sizes.experts_per_gpu * layer.expert_parameters).named(
            "local_experts", "Routed experts of a MoE layer on a GPU", "V3, section 3.2"
        ),
    )


def stage_parameters(
    stage: Stage, m: ModelInputs, model: ModelFigures, sizes: LayoutFigures, local: LocalLayers
) -> StageParameters:
    """Return the parameters of a stage on one GPU."""
    layer = model.layer
    plain = [(stage.dense + stage.moe) * layer.norm_parameters, stage.moe * layer.gate_parameters]
    if head_weights := attention_matrices(m).head_weights:
        plain.append((stage.dense + stage.moe) * parameters_of(head_weights))
    if stage.first or stage.last:
        plain.append(stage.vocabularies * model.parameters.vocabulary_parameters / sizes.tensor)
    if stage.last:
        plain += [total([m.dim]), stage.mtp * (3 * m.dim + 2 * m.dim * m.dim)]
    if stage.first and m.config.embed_norm:
        plain.append(total([m.dim]))
    return StageParameters(
        matrices=stage.dense * local.dense + stage.moe * local.moe,
        plain=total(plain),
        experts=stage.moe * local.experts,
    )
