"""Figures of a model alone: parameters, operations, weights, cache, and what V3.2's indexer would save.

All follow from the one list of dsmini.accounting: the sizes of a config become figures, and the sums over its tensors
explain themselves. Each part of a block has a name, so that a formula reads

    parameters_main = vocabulary_parameters + dim + n_layers × (attention_parameters + norm_parameters) + ...

Worked example, DeepSeek-V3 at 4096 tokens: 671,026,404,352 parameters, of which a token uses 36,624,596,992; training
takes 6 * 36.62e9 + 3 * 61 * 128 * (192 + 128) * 4096 = 250.4 GFLOP a token, printed as 250.

Source: DeepSeek-V3 report, section 4.2; "Insights into DeepSeek-V3" (INS, arXiv 2505.09343), tables 1 and 2.
"""  # noqa: RUF002

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dsmini.accounting.flops import LOSS, absorbed_pair, flops_per_token, twice_the_keys
from dsmini.accounting.kv_cache import index_row_bytes, row_bytes, row_width
from dsmini.accounting.tensors import (
    INDEXER,
    MTP,
    OVER,
    SCORES,
    SIZES,
    TensorUse,
    blocks,
    key_width,
    main_tensors,
    mtp_tensors,
    total,
)
from dsmini.config import ModelConfig
from dsmini.planner.figure import Sheet, titles

PARAMETERS = {
    ("ends", "embedding"): "vocabulary_parameters",
    ("ends", "head"): "vocabulary_parameters",
    ("ends", "norms"): "final_norm_parameters",
    ("block", "norms"): "norm_parameters",
    ("block", "attention"): "attention_parameters",
    ("block", INDEXER): "indexer_parameters",
    ("dense", "dense feed-forward"): "dense_parameters",
    ("moe", "gates"): "gate_parameters",
    ("moe", "routed experts"): "expert_parameters",
    ("moe", "shared experts"): "shared_parameters",
    ("ends", "mtp norms"): "mtp_norm_layer",
    ("ends", "mtp projection"): "mtp_projection_layer",
}
"""Names of the parameters of a part: by the blocks that have it, and its module."""
PARTS = {
    ("block", "heads"): "head_matrices",
    ("block", "up"): "latent_up",
    ("block", "whole"): "latent_down",
    ("dense", "dense feed-forward"): "dense_ffn",
    ("moe", "routed experts"): "expert",
    ("moe", "shared experts"): "shared_experts",
    ("moe", "gates"): "gate",
    ("block", "fp32"): "block_norms",
    ("ends", "norms"): "final_norms",
    ("ends", MTP): "mtp_projection",
}
"""Names of parts of serving, which expert and tensor parallelism divide differently: by the blocks that have it, and
its module or how it is divided."""


class ModelSizes:
    """Stand-in for a ModelConfig whose sizes are inputs of a sheet; accounting's formulas take either."""

    def __init__(self, config: ModelConfig, sheet: Sheet, source: str) -> None:
        self._config, self._sheet, self._source = config, sheet, source

    def __getattr__(self, name: str) -> Any:
        kind = getattr(ModelConfig, name)
        if isinstance(kind, property) and kind.fget is not None:
            return kind.fget(self)
        value = getattr(self._config, name)
        if isinstance(value, int) and not isinstance(value, bool) and name in titles():
            return self._sheet.put(name, value, self._source)
        return value


def placed_tensors(s: Sheet, c: ModelConfig) -> tuple[list[TensorUse], list[TensorUse]]:
    """Return the tensors of the model and of multi-token prediction, whose numbers of blocks are figures."""
    s.dense_layers, s.moe_layers, s.mtp_dense_layers, s.mtp_moe_layers = blocks(c)
    times = {"ends": 1, "block": c.n_layers, "dense": s.dense_layers, "moe": s.moe_layers}
    mtp_times = {
        "ends": c.n_mtp_layers,
        "block": c.n_mtp_layers,
        "dense": s.mtp_dense_layers,
        "moe": s.mtp_moe_layers,
    }
    main = [use._replace(times=times[use.place]) for use in main_tensors(c)]
    return main, [use._replace(times=mtp_times[use.place]) for use in mtp_tensors(c)]


def named_parts(s: Sheet, uses: Iterable[TensorUse]) -> Iterator[TensorUse]:
    """Yield one use for each part of a block or of the ends, whose numbers are a figure of its name."""
    parts: dict[tuple[str, str], list[TensorUse]] = {}
    for use in uses:
        own = use.place == "ends" and use.module != "mtp head"
        parts.setdefault((use.place, use.module if own else use.module.removeprefix(MTP)), []).append(use)
    for (place, module), found in parts.items():
        if module == OVER:
            s.pair_products = found[0].per_pair
            yield found[0]._replace(per_pair=s.pair_products)
        elif module == SCORES:
            yield found[0]
        else:
            name = PARAMETERS[place, module]
            setattr(s, name, total(use.numbers for use in found))
            yield found[0]._replace(shape=(getattr(s, name),))


def model_figures(s: Sheet, c: ModelConfig) -> None:
    """Name the parameters and the operations of a token; the sheet has seq_len.

    DSA is counted in the sparse stage of its training.
    """
    uses, mtp_uses = placed_tensors(s, c)
    main, mtp = list(named_parts(s, uses)), list(named_parts(s, mtp_uses))
    s.parameters_main = total(use.parameters for use in main)
    s.mtp_parameters_without_projection = total(use.parameters for use in mtp if use.name != "eh_proj")
    s.mtp_projection_parameters = total(use.parameters for use in mtp if use.name == "eh_proj")
    s.mtp_parameters = s.mtp_parameters_without_projection + s.mtp_projection_parameters
    s.parameters_total = s.parameters_main + s.mtp_parameters
    s.routing_biases = total(use.times * use.buffers for use in uses + mtp_uses if use.buffers)
    s.parameters_active = total(use.per_token for use in main)
    s.parameters_active_with_embedding = s.parameters_active + s.vocabulary_parameters
    s.mtp_active = total(use.per_token for use in mtp)
    s.mtp_active_printed = s.mtp_active - s.mtp_projection_parameters + c.n_mtp_layers * s.vocabulary_parameters
    forward, training = (flops_per_token(c, s.seq_len, training=it, uses=main) for it in (False, True))
    s.attention_flops = forward.by_module[OVER]
    s.forward_flops = forward.total
    if SCORES in training.by_module:
        s.indexer_flops = training.by_module[SCORES] + training.by_module[LOSS]
    s.training_flops = training.total
    s.training_flops_full_square = flops_per_token(c, s.seq_len, causal=False, training=True, uses=main).total
    s.training_flops_mtp = s.training_flops + flops_per_token(c, s.seq_len, training=True, uses=mtp).total


def mean_keys(c: ModelConfig, seq_len: Any) -> Any:
    """Return the mean number of keys that a token of a sequence attends to, causal."""
    return twice_the_keys(c.index_topk, seq_len) / 2


def keys_met(c: ModelConfig, context: Any) -> Any:
    """Return the number of keys that a new token attends to, of those of its context."""
    return context if c.index_topk is None else np.minimum(context, c.index_topk)


def cache_figures(s: Sheet, c: ModelConfig, dtype: Any) -> None:
    """Name the cache of a token in a dtype. Raises: ValueError for "fp8" where attention is not MLA."""
    row = row_bytes(c, dtype)
    if c.attention == "dsa":
        s.index_row = index_row_bytes(c, dtype)
        row = row + s.index_row
    s.cache_row = row
    s.kv_cache = c.n_layers * s.cache_row
    head = c.qk_nope_head_dim + c.v_head_dim
    s.mha_kv_cache = c.n_layers * (c.n_heads * head * SIZES.get(dtype, 2))
    s.cache_saving = (s.mha_kv_cache - s.kv_cache) / s.mha_kv_cache
    numbers = row_width(c) + (c.index_head_dim or 0)
    s.equal_gqa_groups = numbers / head
    s.cache_heads = numbers / c.v_head_dim


def weight_figures(s: Sheet, c: ModelConfig, dtype: str) -> None:
    """Name the bytes and the multiply-adds of the parts that a deployment treats differently.

    A matrix [o, i] takes o * i multiply-adds of a token that meets it. Its bytes are 4 or 2 a number, or in FP8 one and
    an FP32 scale for each block of 128x128. `absorbed` are the two halves of wkv_b that decoding applies to queries and
    sums: as many numbers, in the compute dtype.
    """
    size = SIZES.get(dtype, 2)
    parts: dict[str, list[TensorUse]] = {name: [] for name in PARTS.values()}
    for use in [*main_tensors(c), *(use for use in mtp_tensors(c) if use.place == "ends" and use.owned)]:
        inside = "fp32" if use.form == "fp32" else use.split
        key = MTP if use.module.startswith(MTP) else inside if use.place == "block" else use.module
        parts.setdefault(PARTS.get((use.place, key), ""), []).append(use)
    for name in PARTS.values():
        setattr(s, f"{name}_bytes", total(use.bytes(dtype) for use in parts[name]))
    for name in ("head_matrices", "latent_up", "latent_down", "block_norms"):  # others have one module's parameters
        setattr(s, f"{name}_products", total(use.numbers for use in parts[name] if use.visits))
    s.absorbed_bytes = s.latent_up_products * size
    s.vocabulary_bytes = c.vocab_size * c.dim * size
    block = s.head_matrices_bytes + s.latent_up_bytes + s.latent_down_bytes + s.block_norms_bytes
    experts = c.n_routed_experts * s.expert_bytes + s.shared_experts_bytes + s.gate_bytes
    inside = c.n_layers * block + s.dense_layers * s.dense_ffn_bytes + s.moe_layers * experts
    s.model_bytes = inside + 2 * s.vocabulary_bytes + s.final_norms_bytes


def context_products(c: ModelConfig) -> Any:
    """Return the multiply-adds of a token with one cached token in a layer, all heads; MLA absorbed."""
    return absorbed_pair(c) if c.is_mla else c.n_heads * (key_width(c) + c.v_head_dim)


def sparse_figures(s: Sheet, c: ModelConfig, context: Any, indexer: ModelConfig) -> None:
    """Name what an indexer saves a decoded token that sees this many cached tokens, next to dense MLA.

    Every layer has an indexer whose heads score all t cached tokens in FP8; attention reads only the k best. At 128K
    tokens V3.2 takes 2.15 GFLOP of scores and 0.57 of attention a layer, dense 36.5: 13.4 times fewer. Bytes read are
    4.6 times fewer. From t = k / (1 - 16384 / 278528) = 2176 tokens on, scores and k tokens are less work than all
    tokens. The cache grows by the keys: 48,068 bytes a token. Where scores cost more than attention, as in a model with
    few narrow heads, the indexer never computes less.

    Args:
        c: a model with MLA or DSA.
        indexer: config with the sizes of the indexer: the model's own, or V3.2's.
    """
    h, d, k = indexer.index_n_heads, indexer.index_head_dim, indexer.index_topk
    assert h is not None and d is not None and k is not None, "the config has an indexer"
    chosen = np.minimum(context, k)
    s.v32_row = row_bytes(c, "fp8")
    s.v32_index_row = index_row_bytes(indexer, "fp8")
    s.v32_kv_cache = c.n_layers * (s.v32_row + s.v32_index_row)
    s.v32_cache_ratio = (s.v32_row + s.v32_index_row) / s.v32_row
    score, attend = 2 * (h * d), 2 * absorbed_pair(c)
    s.v32_index_flops = score * context
    s.v32_attention_flops = attend * chosen
    s.v32_dense_flops = attend * context
    s.v32_flops_ratio = s.v32_dense_flops / (s.v32_index_flops + s.v32_attention_flops)
    if score < attend:
        s.v32_crossover = k * (attend / (attend - score))
    s.v32_read = s.v32_index_row * context + s.v32_row * chosen
    s.v32_dense_read = s.v32_row * context
    s.v32_read_ratio = s.v32_dense_read / s.v32_read
