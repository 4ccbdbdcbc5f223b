"""Figures of a model alone: parameters, operations, cache, and the weights of a deployment.

All follow from the one list of dsmini.accounting: the sizes of a config become figures, and the sums over its tensors
explain themselves. Each part of a block has a name, so that a formula reads

    parameters_main = vocabulary_parameters + n_layers × (attention_parameters + norm_parameters) + ...

Worked example, DeepSeek-V3 at 4096 tokens: 671,026,404,352 parameters, of which a token uses 36,624,596,992; training
takes 6 * 36.62e9 + 3 * 61 * 128 * (192 + 128) * 4096 = 250.4 GFLOP a token, printed as 250.

Source: DeepSeek-V3 report, section 4.2; "Insights into DeepSeek-V3" (INS, arXiv 2505.09343), tables 1 and 2.
"""  # noqa: RUF002

from collections.abc import Iterable, Iterator
from typing import Any

from dsmini.accounting.flops import LOSS, flops_per_token
from dsmini.accounting.memory import index_row_bytes, mha_kv_bytes_per_token, row_bytes
from dsmini.accounting.tensors import (
    INDEXER,
    OVER,
    SCORES,
    SIZES,
    TensorUse,
    blocks,
    tensors,
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
    ("mtp", "norms"): "mtp_norm_layer",
    ("mtp", "projection"): "mtp_projection_layer",
    ("mtp", "head"): "vocabulary_parameters",
}
"""Names of the parameters of a part: by the blocks that have it, and its kind."""


class ModelSizes:
    """Stand-in for a ModelConfig whose sizes are inputs of a sheet; accounting's formulas take either."""

    def __init__(self, config: ModelConfig, sheet: Sheet, source: str) -> None:
        self.plain, self._sheet, self._source = config, sheet, source

    def __getattr__(self, name: str) -> Any:
        kind = getattr(ModelConfig, name)
        if isinstance(kind, property) and kind.fget is not None:
            return kind.fget(self)
        value = getattr(self.plain, name)
        if isinstance(value, int) and not isinstance(value, bool) and name in titles():
            return self._sheet.put(name, value, self._source)
        return value


def placed_tensors(s: Sheet, c: ModelConfig) -> list[TensorUse]:
    """Return all tensors, whose numbers of blocks are figures."""
    s.dense_layers, s.moe_layers, s.mtp_dense_layers, s.mtp_moe_layers = blocks(c)
    main = {"ends": 1, "block": c.n_layers, "dense": s.dense_layers, "moe": s.moe_layers}
    mtp = {"mtp": c.n_mtp_layers, "block": c.n_mtp_layers, "dense": s.mtp_dense_layers, "moe": s.mtp_moe_layers}
    return [use._replace(times=(mtp if use.mtp else main)[use.place]) for use in tensors(c)]


def named_parts(s: Sheet, uses: Iterable[TensorUse]) -> Iterator[TensorUse]:
    """Yield one use for each part of a block or of the ends, whose numbers are a figure of its name."""
    parts: dict[tuple[str, str, bool], list[TensorUse]] = {}
    for use in uses:
        parts.setdefault((use.place, use.kind, use.mtp), []).append(use)
    for (place, kind, _), found in parts.items():
        if kind in (OVER, SCORES):
            yield found[0]
        else:
            numbers = s.name(PARAMETERS[place, kind], total(use.numbers for use in found))
            yield found[0]._replace(shape=(numbers,))


def model_figures(s: Sheet, c: ModelConfig) -> None:
    """Name the parameters and the operations of a token; the sheet has seq_len.

    DSA is counted in the sparse stage of its training.
    """
    uses = list(named_parts(s, placed_tensors(s, c)))
    main, mtp = ([use for use in uses if use.mtp == of] for of in (False, True))
    s.parameters_main = total(use.parameters for use in main)
    s.mtp_parameters = total(use.parameters for use in mtp)
    s.parameters_total = s.parameters_main + s.mtp_parameters
    s.parameters_active = total(use.per_token for use in main)
    s.mtp_active = total(use.per_token for use in mtp)
    training = flops_per_token(c, s.seq_len, training=True, uses=main)
    s.attention_flops = flops_per_token(c, s.seq_len, uses=main).by_module[OVER]
    if SCORES in training.by_module:
        s.indexer_flops = training.by_module[SCORES] + training.by_module[LOSS]
    s.training_flops = training.total


def cache_figures(s: Sheet, c: ModelConfig, dtype: Any) -> None:
    """Name the cache of a token in a dtype. Raises: ValueError for "fp8" where attention is not MLA."""
    row = row_bytes(c, dtype)
    if c.attention == "dsa":
        s.index_row = index_row_bytes(c, dtype)
        row = row + s.index_row
    s.cache_row = row
    s.kv_cache = c.n_layers * s.cache_row
    s.mha_kv_cache = mha_kv_bytes_per_token(c, SIZES[dtype])
    s.cache_saving = (s.mha_kv_cache - s.kv_cache) / s.mha_kv_cache


def weight_figures(s: Sheet, c: ModelConfig, dtype: str) -> None:
    """Name the bytes and the multiply-adds of the parts that a deployment divides differently.

    Heads' matrices and the vocabulary are divided by tensor parallelism, routed experts by expert parallelism; all else
    is whole on each GPU. A matrix [o, i] takes o * i multiply-adds of a token. Its bytes are 4 or 2 a number, or in FP8
    one and an FP32 scale for each block of 128x128. `absorbed` are the two halves of wkv_b that decoding applies to
    queries and sums: as many numbers, in the compute dtype.
    """
    size, uses = SIZES[dtype], [use for use in placed_tensors(s, c) if not use.mtp]

    def of(*splits: str, kind: str = "") -> list[TensorUse]:
        apart = ("embedding", "head", "routed experts", "shared experts")
        return [use for use in uses if (use.kind == kind if kind else use.split in splits and use.kind not in apart)]

    s.head_matrices_bytes = _held(of("heads"), dtype)
    s.latent_up_bytes = _held(of("up"), dtype)
    s.latent_up_products = total(use.per_token for use in of("up"))
    s.absorbed_bytes = s.latent_up_products * size
    s.whole_bytes = _held(of("whole", "width"), dtype)
    s.shared_experts_bytes = _held(of(kind="shared experts"), dtype)
    s.expert_bytes = total(use.bytes(dtype) for use in of(kind="routed experts"))
    s.vocabulary_bytes = c.vocab_size * c.dim * size
    experts = s.moe_layers * c.n_routed_experts * s.expert_bytes + s.shared_experts_bytes
    attention = s.head_matrices_bytes + s.latent_up_bytes
    s.model_bytes = attention + experts + s.whole_bytes + 2 * s.vocabulary_bytes
    inside = [use for use in uses if use.visits and use.kind != "head" and use.split != "up"]
    s.matrix_products = total(use.per_token for use in inside if use.form == "fp8")
    s.other_products = total(use.per_token for use in inside if use.form != "fp8")


def _held(uses: Iterable[TensorUse], dtype: str) -> Any:
    """Return the bytes of some tensors in all their blocks."""
    places: dict[str, list[TensorUse]] = {}
    for use in uses:
        places.setdefault(use.place, []).append(use)
    return total(found[0].times * total(use.bytes(dtype) for use in found) for found in places.values())
