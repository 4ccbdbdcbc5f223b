"""Memory of training in one process, as dsmini itself trains: in closed form, equal to dsmini.accounting.

    parameters     4 bytes: FP32, and FP32 routing biases
    gradients      4 bytes
    optimizer      AdamW 8 bytes, with BF16 moments 4; Muon's momentum 4
    copies         weights in the compute dtype that autograd saves: 2 bytes in BF16; in FP8 1 byte and scales
    head           an FP32 gradient of the head's matrix for each loss, which the chunked loss makes in forward
    activations    see activations.py

It is a lower bound: what is held at the end of a forward. The peak is higher by the operation at work.
Left out: AdamW's counts of steps, 4 bytes a tensor; RoPE's tables are counted.

Worked example, DeepSeek-V3 with its MTP block: 682.6B parameters are 2.73 TB, as much again for gradients, and 5.46 TB
of moments.

Source: DeepSeek-V3 report, section 3.3.3 (BF16 moments); dsmini.accounting.memory for the copies.
"""

from dataclasses import dataclass

from dsmini.planner.model.matrices import attention_matrices, parameters_of, scales_of, swiglu_matrices
from dsmini.planner.model.parameters import ModelFigures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, TOKENS, Bytes, BytesPerToken, Count, Tokens, largest, total
from dsmini.planner.quantities.sizes import BF16, FP8, FP32
from dsmini.planner.training.activations import Activations
from dsmini.planner.training.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class OneProcessMemory(Figures):
    """Bytes that training in one process holds at the end of a forward. A lower bound."""

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    copies: Bytes
    head_gradient: Bytes
    total: Bytes


def one_process_memory(m: ModelInputs, model: ModelFigures, layout: Layout, micro_batch: Count) -> OneProcessMemory:
    """Return what one process holds. Each part equals dsmini.accounting.training_bytes but for the counts of steps."""
    source = "dsmini's own training"
    counts, heads = model.parameters, COUNT(1) + m.n_mtp_layers
    parts = {
        "parameters": (counts.parameters_total + counts.routing_biases) * FP32,
        "gradients": counts.parameters_total * FP32,
        "optimizer": _optimizer(m, model, layout),
        "activations": process_activations(m, model, layout, micro_batch),
        "copies": _copies(m, model, layout),
        "head_gradient": heads * counts.vocabulary_parameters * FP32,
    }
    titles = {
        "parameters": "FP32 parameters and routing biases",
        "gradients": "FP32 gradients",
        "optimizer": "State of the optimizer",
        "activations": "Activations saved for backward",
        "copies": "Copies of weights saved for backward",
        "head_gradient": "Gradient of the head, made in forward",
    }
    named = {name: part.named(f"process_{name}", titles[name], source) for name, part in parts.items()}
    whole = total(named.values()).named("process_memory", "Memory at the end of a forward", source)
    return OneProcessMemory(**named, total=whole)


def block_matrices(m: ModelInputs, model: ModelFigures) -> Count:
    """Return the parameters of all matrices in blocks that may be FP8: attention, feed-forwards and experts."""
    counts, moe = model.parameters, model.layer.moe_layers + model.layer.mtp_moe_layers
    norms = (m.n_layers + m.n_mtp_layers) * model.layer.norm_parameters
    outside = 2 * counts.vocabulary_parameters + counts.mtp_projection_parameters + moe * model.layer.gate_parameters
    final = m.dim * (2 if m.config.embed_norm else 1) + 3 * m.n_mtp_layers * m.dim
    layers, head_weights = m.n_layers + m.n_mtp_layers, attention_matrices(m).head_weights
    plain = outside + layers * parameters_of(head_weights) if head_weights else outside
    return counts.parameters_total - plain - norms - final


def _optimizer(m: ModelInputs, model: ModelFigures, layout: Layout) -> Bytes:
    moment = FP32 if layout.moments == "float32" else BF16
    whole = model.parameters.parameters_total
    if layout.optimizer == "adamw":
        return whole * (2 * moment)
    matrices, indexer = (
        block_matrices(m, model) + model.parameters.mtp_projection_parameters,
        attention_matrices(m).indexer,
    )
    if indexer:  # AdamW's, as norms are
        matrices = matrices - (m.n_layers + m.n_mtp_layers) * parameters_of(indexer)
    return matrices * FP32 + (whole - matrices) * (2 * moment)


def _copies(m: ModelInputs, model: ModelFigures, layout: Layout) -> Bytes:
    """Return the bytes of weights in the compute dtype. Experts' w1 and w3 are joined: a copy in FP32 too."""
    layer, moe = model.layer, model.layer.moe_layers + model.layer.mtp_moe_layers
    if layout.precision == "fp32":
        return (2 * m.dim * m.moe_inter_dim * m.n_routed_experts * moe) * FP32
    outside = model.parameters.mtp_projection_parameters * BF16
    if layout.precision == "bf16":
        saved = block_matrices(m, model)
        if indexer := attention_matrices(m).indexer:  # whose inputs are detached
            saved = saved - (m.n_layers + m.n_mtp_layers) * parameters_of(indexer)
        return saved * BF16 + outside
    layers, dense = m.n_layers + m.n_mtp_layers, layer.dense_layers + layer.mtp_dense_layers
    scales = layers * scales_of(attention_matrices(m).all) + dense * scales_of(swiglu_matrices(m, m.inter_dim))
    scales = scales + moe * m.n_routed_experts * scales_of(swiglu_matrices(m, m.moe_inter_dim))
    if m.config.n_shared_experts:
        scales = scales + moe * scales_of(swiglu_matrices(m, m.n_shared_experts * m.moe_inter_dim))
    return block_matrices(m, model) * FP8 + scales * FP32 + outside


def process_activations(m: ModelInputs, model: ModelFigures, layout: Layout, micro_batch: Count) -> Bytes:
    """Return the bytes that a forward of a micro-batch saves, multi-token prediction included.

    Depth k of multi-token prediction has seq_len - k positions.
    """
    act = Activations(m=m, precision=layout.precision, recompute=layout.recompute)
    layer, n = model.layer, model.seq_len * micro_batch
    first, all_ = (_depths(model.seq_len, depths) for depths in (layer.mtp_dense_layers, m.n_mtp_layers))
    parts = [
        n * (act.embedding() + act.head()),
        n * (layer.dense_layers * act.dense_layer() + layer.moe_layers * act.moe_layer()),
        micro_batch * (all_ * act.mtp_inputs() + first * act.dense_layer() + (all_ - first) * act.moe_layer()),
        _rope_table(m, model.seq_len) + _rope_table(m, all_),
    ]
    if m.config.n_mtp_layers and m.config.mtp_input == "post_norm":  # states between depths
        passed = model.seq_len + _depths(model.seq_len, m.n_mtp_layers - COUNT(1))
        parts.append(micro_batch * (passed / TOKENS(1)) * act.row(m.dim))
    if layout.recompute == "full":
        parts.append(n * block_at_work(m, layout))
    return total(parts)


def block_at_work(m: ModelInputs, layout: Layout) -> BytesPerToken:
    """Return the bytes of a token of the block whose activations are made again in backward, the largest."""
    act = Activations(m=m, precision=layout.precision, recompute="none")
    blocks = [act.dense_layer()] if m.config.n_dense_layers else []
    if m.config.n_dense_layers < m.config.n_layers:
        blocks.append(act.moe_layer())
    return blocks[0] if len(blocks) == 1 else largest(*blocks)


def _depths(seq_len: Tokens, depths: Count) -> Tokens:
    """Return the positions of the first depths of multi-token prediction together: seq_len - 1, seq_len - 2 ..."""
    return depths * seq_len - depths * (depths + COUNT(1)) / 2 * TOKENS(1)


def _rope_table(m: ModelInputs, positions: Tokens) -> Bytes:
    width = m.qk_rope_head_dim if m.config.is_mla else m.qk_nope_head_dim
    return positions / TOKENS(1) * width * FP32
