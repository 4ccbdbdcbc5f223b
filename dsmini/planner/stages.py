"""Contents of pipeline stages: which layers a GPU holds, and how many micro-batches are in flight in them.

Layers are placed as evenly as they divide, the first stages one more. The first stage has the embedding. The last has
the head, multi-token prediction and its copy of the embedding. DualPipe needs no copy, because the first and the last
stage are on one GPU.

In flight, with PP stages and s of them after a GPU's own: 1F1B s + 1, ZB1P PP, DualPipe PP + 1 in both stages together
(V3, table 2): PP of a pipeline's first stage and 1 of its last, on a middle GPU half of each.

Worked example, DeepSeek-V3, 61 layers in 16 stages: 13 stages of 4 layers, then 3 of 3, the last with the MTP block.

Source: DeepSeek-V3 report, sections 2.2 and 3.2.1, table 2.
"""

from dataclasses import dataclass
from typing import Literal

from dsmini.planner.inputs import ModelInputs
from dsmini.planner.layout import Layout, LayoutFigures
from dsmini.planner.matrices import attention_matrices, parameters_of
from dsmini.planner.model import ModelFigures
from dsmini.planner.quantity import COUNT, Count, largest, smallest

Kind = Literal["only", "first", "middle", "last"]
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
    dense_middle = smallest(layer.dense_layers - dense_first, most)
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
    middle = Stage(dense=dense_middle, moe=most - dense_middle, vocabularies=none, mtp=none, in_flight=flight)
    inner: list[tuple[Kind, list[Stage]]] = [] if layout.pipeline == 2 else [("middle", [middle])]
    if layout.schedule == "dualpipe":
        return [("first", [first, last]), *((kind, 2 * stages) for kind, stages in inner)]
    return [("first", [first]), *inner, ("last", [last])]


def stage_parameters(stage: Stage, m: ModelInputs, model: ModelFigures, sizes: LayoutFigures) -> StageParameters:
    """Return the parameters of a stage on one GPU."""
    layer, t = model.layer, sizes.tensor
    layers = stage.dense + stage.moe
    matrices = attention_matrices(m)
    by_head = parameters_of(matrices.by_head)
    attention = by_head / t + parameters_of(matrices.whole) if matrices.whole else by_head / t
    divided = stage.dense * layer.dense_parameters + stage.moe * layer.shared_parameters
    norms = layers * layer.norm_parameters + 3 * stage.mtp * m.dim
    if stage.last:
        norms = norms + m.dim
    if stage.first and m.config.embed_norm:
        norms = norms + m.dim
    plain = (
        stage.vocabularies * model.parameters.vocabulary_parameters / t
        + stage.moe * layer.gate_parameters
        + norms
        + stage.mtp * (2 * m.dim * m.dim)
    )
    return StageParameters(
        matrices=layers * attention + divided / t,
        plain=plain,
        experts=stage.moe * sizes.experts_per_gpu * layer.expert_parameters,
    )
