"""Computing time of a micro-batch in a pipeline stage, from operations and peaks.

    products that may be FP8    attention's and feed-forwards' matrices: 2 FLOP a parameter and token, forward
    other products              head, gates, projections of multi-token prediction, attention over the context: BF16
    W                           as much as forward without attention over the context, whose factors are no weights
    backward                    2 forwards; "full" runs the layers again, "selective" MLA's up-projections

Worked example, DeepSeek-V3 in FP8: a MoE layer takes 1.17 GFLOP of FP8 a token, and 0.17 of attention in
BF16. All stages together take 184 us a token forward, a stage of 16 with 4096 tokens 47 ms.

Source: DeepSeek-V3 report, sections 3.2.2 and 3.3.1.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.matrices import parameters_of
from dsmini.planner.model.parameters import ModelFigures
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    COUNT,
    FLOPS_PER_TOKEN,
    TOKENS,
    Count,
    FlopsPerSecond,
    Seconds,
    SecondsPerToken,
    Tokens,
    largest,
    smallest,
)
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.layout import Layout, LayoutFigures

MULTIPLY_ADD = FLOPS_PER_TOKEN(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeFigures(Figures):
    """Computing time of a token and of a micro-batch, communication apart. Estimates."""

    computing_share: Count
    """Share of the multiprocessors that compute."""
    fp8_rate: FlopsPerSecond
    """Rate of products of attention and feed-forwards; the BF16 or FP32 rate where precision is that."""
    plain_rate: FlopsPerSecond
    dense_layer_seconds: SecondsPerToken
    moe_layer_seconds: SecondsPerToken
    outside_seconds: SecondsPerToken
    """Forward of head, and of multi-token prediction's projection."""
    context_seconds: SecondsPerToken
    """Forward of attention over the context, all layers: a part of the layers' times."""
    forward_seconds: SecondsPerToken
    """Forward of the whole model, with multi-token prediction."""
    again_seconds: SecondsPerToken
    stage_share: Count
    """Share of the model's work that the slowest stage has."""
    chunk_forward: Seconds
    chunk_backward: Seconds
    chunk_weights: Seconds


def compute_figures(
    m: ModelInputs,
    model: ModelFigures,
    hardware: Hardware,
    layout: Layout,
    sizes: LayoutFigures,
    tokens: Tokens,
    assumptions: Assumptions,
) -> ComputeFigures:
    """Return the computing times of a layout; `tokens` are those of a micro-batch on one GPU."""
    layer, a = model.layer, assumptions
    share = COUNT(1) - a.communication_multiprocessors / a.multiprocessors if layout.expert > 1 else COUNT(1) / COUNT(1)
    share = share.named("computing_share", "Multiprocessors that compute", "V3, section 3.2.2")
    peak = hardware.peak("float32" if layout.precision == "fp32" else "bfloat16")
    plain = (peak * a.bf16_efficiency * share).named("plain_rate", "Rate of other products")
    fast = hardware.peak("fp8") * a.fp8_efficiency * share if layout.precision == "fp8" else plain * COUNT(1)
    fast = fast.named("fp8_rate", "Rate of products of attention and feed-forwards")

    pairs = model.operations.pair_products * (model.seq_len / TOKENS(2)) * MULTIPLY_ADD / plain
    ops = model.operations
    if ops.indexer_flops is not None:  # of which backward takes two thirds, as of all products
        pairs = (ops.attention_flops + ops.indexer_flops / 3) / m.n_layers / plain
    chosen = m.n_activated_experts * layer.expert_parameters + layer.shared_parameters
    dense = (layer.attention_parameters + layer.dense_parameters) * MULTIPLY_ADD / fast + pairs
    moe = (layer.attention_parameters + chosen) * MULTIPLY_ADD / fast + layer.gate_parameters * MULTIPLY_ADD / plain
    dense = dense.named("dense_layer_seconds", "Computing of a token, forward, dense layer")
    moe = (moe + pairs).named("moe_layer_seconds", "Computing of a token, forward, MoE layer")
    heads = (COUNT(1) + m.n_mtp_layers) * model.parameters.vocabulary_parameters
    outside = ((heads + model.parameters.mtp_projection_parameters) * MULTIPLY_ADD / plain).named(
        "outside_seconds", "Computing of a token, forward, outside layers"
    )
    n_dense, n_moe = layer.dense_layers + layer.mtp_dense_layers, layer.moe_layers + layer.mtp_moe_layers
    inside = n_dense * dense + n_moe * moe
    context = ((m.n_layers + m.n_mtp_layers) * pairs).named("context_seconds", "Attention over the context, forward")
    forward = (inside + outside).named("forward_seconds", "Computing of a token, forward, all stages")
    again = _again(m, layout, inside, fast).named("again_seconds", "Computing of a token that backward repeats")
    least = _least(m, dense, moe)
    stage = largest(COUNT(1) / sizes.pipeline, sizes.layers_first * least / forward)
    stage = stage.named("stage_share", "Work of the slowest stage over all work")

    def chunk(time: SecondsPerToken, name: str, title: str) -> Seconds:
        return (time * tokens * stage).named(name, f"{title} of a micro-batch in a stage")

    return ComputeFigures(
        computing_share=share,
        fp8_rate=fast,
        plain_rate=plain,
        dense_layer_seconds=dense,
        moe_layer_seconds=moe,
        outside_seconds=outside,
        context_seconds=context,
        forward_seconds=forward,
        again_seconds=again,
        stage_share=stage,
        chunk_forward=chunk(forward, "chunk_forward", "Computing, forward,"),
        chunk_backward=chunk(2 * forward + again, "chunk_backward", "Computing, backward,"),
        chunk_weights=chunk(forward - context, "chunk_weights", "Gradients of weights"),
    )


def _again(m: ModelInputs, layout: Layout, inside: SecondsPerToken, rate: FlopsPerSecond) -> SecondsPerToken:
    """Return the time of the forward work that backward repeats."""
    if layout.recompute == "full":
        return inside * COUNT(1)
    if layout.recompute == "none" or not m.config.is_mla:
        return 0 * inside
    up = [(m.n_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)]
    if m.config.q_lora_rank is not None:
        up.append((m.n_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim), m.q_lora_rank))
    return (m.n_layers + m.n_mtp_layers) * parameters_of(up) * MULTIPLY_ADD / rate


def _least(m: ModelInputs, dense: SecondsPerToken, moe: SecondsPerToken) -> SecondsPerToken:
    """Return the time of the layer with less work among the kinds that the main model has."""
    if m.config.n_dense_layers == 0:
        return moe
    return dense if m.config.n_dense_layers >= m.config.n_layers else smallest(dense, moe)
