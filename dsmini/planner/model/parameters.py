"""Parameters and operations of a model in closed form.

    main       embedding + head + L (attention + norms) + L_dense 3 m f + L_moe ((e + shared) 3 m f_e + gate)
    active     the same without embedding and norms, and with k of the e routed experts: what a token is multiplied with
    forward    2 N + L H (d_qk + d_v) T      FLOP a token, causal: a token sees T / 2 others on average
    training   3 times that: backward makes two products of each one of forward

N are the active parameters, m is the model's width, f a hidden width, T the tokens of a sequence.

Worked example, DeepSeek-V3 at T = 4096: an expert has 3 * 7168 * 2048 = 44,040,192 parameters, attention 187,105,280 a
layer, all together 671,026,404,352, of which 36,624,596,992 are active. Training takes
6 * 36.62e9 + 3 * 61 * 128 * (192 + 128) * 4096 = 250.4 GFLOP a token, printed as 250.

Source: DeepSeek-V3 report, section 4.2; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 2.
"""

from dataclasses import dataclass

from dsmini.planner.model.matrices import attention_matrices, block_norms, key_width, parameters_of, swiglu_matrices
from dsmini.planner.model.sparse_context import indexer_training_products, is_sparse, mean_keys, score_products
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    FLOPS_PER_TOKEN,
    TOKENS,
    Count,
    Flops,
    FlopsPerToken,
    Tokens,
    smallest,
    total,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFigures(Figures):
    """Parameters of the parts of one layer, and the number of layers of each kind. Exact."""

    attention_parameters: Count
    """Matrices of attention, with those of an indexer."""
    dense_parameters: Count
    expert_parameters: Count
    shared_parameters: Count
    gate_parameters: Count
    norm_parameters: Count
    """Norms of a block: two of the hidden state, and those inside attention."""
    dense_layers: Count
    moe_layers: Count
    mtp_dense_layers: Count
    mtp_moe_layers: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterFigures(Figures):
    """Parameters of a whole model. Exact: they equal dsmini.accounting.parameters."""

    vocabulary_parameters: Count
    """Parameters of the embedding; the head has as many."""
    parameters_main: Count
    """Parameters without multi-token prediction."""
    mtp_projection_parameters: Count
    mtp_parameters: Count
    mtp_parameters_without_projection: Count
    """Parameters as the V3 report prints them, 11.5B."""
    parameters_total: Count
    routing_biases: Count
    parameters_active: Count
    parameters_active_with_embedding: Count
    mtp_active: Count
    """Active parameters of multi-token prediction, its use of the head and its projection included."""
    mtp_active_printed: Count
    """Active parameters as the V3 README counts its 2.4B: with embedding and head, without projection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationFigures(Figures):
    """Operations of a token in matrix products, the mean over a sequence; a multiply-add is two."""

    pair_products: Count
    """Multiply-adds of a query with one key and its value, all heads of a layer."""
    attention_flops: FlopsPerToken
    """Forward operations of attention over the context, main model, causal."""
    forward_flops: FlopsPerToken
    indexer_flops: FlopsPerToken | None
    """Operations of indexers over the context in training, with their loss, causal; None without indexers."""
    training_flops: FlopsPerToken
    training_flops_full_square: FlopsPerToken
    """As training_flops, without the half that a causal mask leaves out."""
    training_flops_mtp: FlopsPerToken
    """As training_flops, with multi-token prediction at all positions: the work that a training run does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFigures(Figures):
    """Closed forms of a model at a sequence length."""

    seq_len: Tokens
    layer: LayerFigures
    parameters: ParameterFigures
    operations: OperationFigures


def model_figures(m: ModelInputs, seq_len: Tokens) -> ModelFigures:
    """Return all closed forms of a model.

    Args:
        seq_len: tokens of a training sequence, an input.
    """
    layer = layer_figures(m)
    parameters = _parameters(m, layer)
    return ModelFigures(
        seq_len=seq_len, layer=layer, parameters=parameters, operations=_operations(m, parameters, seq_len)
    )


def layer_figures(m: ModelInputs) -> LayerFigures:
    """Return the parameters of the parts of a layer, and how many layers are of each kind."""
    source = "V3, section 4.2"
    expert = parameters_of(swiglu_matrices(m, m.moe_inter_dim))
    dense_layers = smallest(m.n_dense_layers, m.n_layers).named("dense_layers", "Dense layers of the main model")
    matrices = attention_matrices(m)
    mtp_dense = (m.n_dense_layers - dense_layers).named("mtp_dense_layers", "Dense layers of multi-token prediction")
    return LayerFigures(
        attention_parameters=parameters_of((*matrices.all, *matrices.head_weights)).named(
            "attention_parameters", "Matrices of attention, a layer", "V2, section 2.1"
        ),
        dense_parameters=parameters_of(swiglu_matrices(m, m.inter_dim)).named(
            "dense_parameters", "Dense feed-forward, a layer", source
        ),
        expert_parameters=expert.named("expert_parameters", "One routed expert", source),
        shared_parameters=(m.n_shared_experts * expert).named("shared_parameters", "Shared experts, a layer", source),
        gate_parameters=(m.n_routed_experts * m.dim).named("gate_parameters", "Gate of a MoE layer", source),
        norm_parameters=block_norms(m).named("norm_parameters", "Norms of a block", source),
        dense_layers=dense_layers,
        moe_layers=(m.n_layers - dense_layers).named("moe_layers", "MoE layers of the main model"),
        mtp_dense_layers=mtp_dense,
        mtp_moe_layers=(m.n_mtp_layers - mtp_dense).named("mtp_moe_layers", "MoE layers of multi-token prediction"),
    )


def dense_training_flops(parameters: Count, tokens: Tokens) -> Flops:
    """Return the operations of training a dense model, 6 N D: attention over the context is left out.

    LLaMA-3.1 405B on 15.6e12 tokens: 3.79e25, printed as 3.8e25 (LL3, section 3.2.1).
    """
    found = parameters * FLOPS_PER_TOKEN(6) * tokens
    return found.named("dense_training_flops", "Operations of training a dense model", "LL3, section 3.2.1")


def _parameters(m: ModelInputs, a: LayerFigures) -> ParameterFigures:
    """Return the counts of a whole model; each is a sum over its layers."""
    source = "V3, section 4.2"
    vocabulary = (m.vocab_size * m.dim).named("vocabulary_parameters", "Embedding, and as many again: head")
    experts = m.n_routed_experts * a.expert_parameters + a.shared_parameters + a.gate_parameters
    chosen = m.n_activated_experts * a.expert_parameters + a.shared_parameters + a.gate_parameters
    block = a.attention_parameters + a.norm_parameters
    outer = 2 * m.dim if m.config.embed_norm else total([m.dim])
    main = 2 * vocabulary + m.n_layers * block + a.dense_layers * a.dense_parameters + a.moe_layers * experts + outer
    projection = (m.n_mtp_layers * m.dim * (2 * m.dim)).named("mtp_projection_parameters", "MTP: projections")
    mtp = m.n_mtp_layers * (block + 3 * m.dim) + a.mtp_dense_layers * a.dense_parameters + a.mtp_moe_layers * experts
    active = m.n_layers * a.attention_parameters + a.dense_layers * a.dense_parameters + a.moe_layers * chosen
    mtp_active = (
        m.n_mtp_layers * (a.attention_parameters + vocabulary)
        + a.mtp_dense_layers * a.dense_parameters
        + a.mtp_moe_layers * chosen
    )
    main = main.named("parameters_main", "Parameters without MTP", source)
    own = mtp.named("mtp_parameters_without_projection", "MTP: parameters without projections", "V3's README")
    mtp_all = (own + projection).named("mtp_parameters", "MTP: parameters of its own", "V3, section 2.2")
    active = (active + vocabulary).named("parameters_active", "Active parameters, without embedding", source)
    moe = a.moe_layers + a.mtp_moe_layers
    biases = moe * m.n_routed_experts if m.config.topk_method == "noaux_tc" else moe * 0
    return ParameterFigures(
        vocabulary_parameters=vocabulary,
        parameters_main=main,
        mtp_projection_parameters=projection,
        mtp_parameters=mtp_all,
        mtp_parameters_without_projection=own,
        parameters_total=(main + mtp_all).named("parameters_total", "All parameters", source),
        routing_biases=biases.named("routing_biases", "Routing biases, apart from parameters", "V3, section 2.1.2"),
        parameters_active=active,
        parameters_active_with_embedding=(active + vocabulary).named(
            "parameters_active_with_embedding", "Active parameters with head and embedding", source
        ),
        mtp_active=(mtp_active + projection).named("mtp_active", "MTP: active parameters", "V3, section 2.2"),
        mtp_active_printed=(mtp_active + m.n_mtp_layers * vocabulary).named(
            "mtp_active_printed", "MTP: active parameters with embedding, without projection", "V3's README"
        ),
    )


def _operations(m: ModelInputs, parameters: ParameterFigures, seq_len: Tokens) -> OperationFigures:
    """Return the operations of a token: 2 for each active parameter, and attention's over the context.

    DSA is counted in the sparse stage of its training.
    """
    source = "INS, table 2"
    seen, keys = seq_len / TOKENS(2), mean_keys(m, seq_len)  # a token sees half of a sequence on average
    pair = (m.n_heads * (key_width(m) + m.v_head_dim)).named("pair_products", "Multiply-adds of a query and a key")
    multiply_add = FLOPS_PER_TOKEN(2)
    attention = (m.n_layers * pair * keys * multiply_add).named(
        "attention_flops", "Operations of attention over the context, forward, causal", source
    )
    products = parameters.parameters_active * multiply_add
    mtp = parameters.mtp_active * multiply_add + m.n_mtp_layers * pair * keys * multiply_add
    whole, learned, learned_square, indexer = products + attention, 3 * mtp, 3 * (products + 2 * attention), None
    learning, forward = 3 * whole, whole
    if is_sparse(m):
        of_indexer = indexer_training_products(m, keys, seen) * multiply_add
        indexer = (m.n_layers * of_indexer).named(
            "indexer_flops", "Operations of indexers over the context in training, causal", "V3.2, section 2.1"
        )
        forward = whole + m.n_layers * score_products(m) * seen * multiply_add
        learning, learned = learning + indexer, learned + m.n_mtp_layers * of_indexer
        every = 2 * seen  # a mask hides keys that were not picked, and saves nothing
        square = m.n_layers * (3 * pair * every + indexer_training_products(m, every, every)) * multiply_add
        learned_square = 3 * products + square
    return OperationFigures(
        pair_products=pair,
        attention_flops=attention,
        forward_flops=forward.named("forward_flops", "Operations of a token, forward", source),
        indexer_flops=indexer,
        training_flops=learning.named("training_flops", "Operations of a token in training", source),
        training_flops_full_square=learned_square.named(
            "training_flops_full_square", "Operations of a token in training, without a causal half", source
        ),
        training_flops_mtp=(learning + learned).named(
            "training_flops_mtp", "Operations of a token in training, with MTP", source
        ),
    )
