"""Compressed attention of DeepSeek-V4, counted: parameters, cache and operations, next to V3.2's.

One entry of head_dim numbers is key and value of all heads. A layer sees a window of the last 128 tokens, and with
CSA the index_topk best of one entry for every 4 tokens, whose indexer scores all of them, or with HCA all of one
entry for every 128. An entry is 448 FP8 codes, 64 BF16 rotary numbers, 7 scales and a byte of padding: 584 bytes. The
indexer's entry is 128 numbers in FP4 and 4 scales: 68 bytes. Worked example, V4-Pro with 30 CSA and 31 HCA layers:

    30 * (584 + 68) / 4 + 31 * 584 / 128 = 5031.4 bytes a token, V3.2 has 48,068: 9.55 times more

Operations are in FP8 units, where one in BF16 counts twice and one in FP4 half. At 2^20 tokens V4-Pro takes 3.78
times fewer than V3.2, V4-Flash 10.03 times; with the activated parameters as printed 3.77 and 10.07. The report
prints 3.7 and 9.8.

V4 projects outputs in groups, mixes 4 residual streams around every sublayer with 24 weights each, and has experts in
all layers. Counted so, V4-Flash has 284,332,240,471 parameters, as its released files do, and V4-Pro
1,572,997,201,763.

V4.1 shares entries between layers and keeps them in FP4, 256 + 32 bytes, with an indexer's entry of 68. Three sources
with an entry for every 2 tokens and one with an entry for each make 3 * 356 / 2 + 356 = 890 bytes a token.

Source: DeepSeek-V4 report (arXiv 2606.19348), section 2; shapes of the released checkpoints; DeepSeek-V4.1 report.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from dsmini.planner.figure import Sheet

V32_ACTIVATED = 37e9
"""Activated parameters of V3.2 as printed (V3, abstract)."""


def compressed_figures(s: Sheet, context: Any, sizes: Mapping[str, Sequence[float]]) -> None:
    """Name the figures of both V4 models, and V4.1's cache, for a token that sees this many tokens.

    Args:
        s: sheet with V3.2's figures at the same context.
        sizes: of V4-Pro and of V4-Flash, by name.
    """
    for i, name in enumerate(("pro", "flash")):
        _model(s, s.each(f"{name}_{{}}"), context, SimpleNamespace(**{key: both[i] for key, both in sizes.items()}))
    s.v41_kv_cache = (3 / 2 + 1) * (512 / 2 + 512 / 16 + 128 / 2 + 128 / 32)


def _model(s: Sheet, t: Sheet, context: Any, z: Any) -> None:
    layers = z.window_layers + z.csa_layers + z.hca_layers
    t.parameters, t.active_products = _parameters(z, layers)
    codes = z.head_dim - z.rope_head_dim
    entry = codes + 2 * z.rope_head_dim + codes / z.scale_group + z.entry_pad
    index_entry = z.index_head_dim / 2 + z.index_head_dim / z.index_scale_group
    t.kv_cache = z.csa_layers * (entry + index_entry) / z.csa_ratio + z.hca_layers * entry / z.hca_ratio
    t.cache_ratio = s.v32_kv_cache / t.kv_cache
    t.baseline_share = t.kv_cache / (layers * z.baseline_groups * 2 * z.baseline_head_dim * 2)
    chosen = np.minimum(context / z.csa_ratio, z.index_topk)
    entries = layers * np.minimum(z.window, context) + z.csa_layers * chosen + z.hca_layers * (context / z.hca_ratio)
    attention = 2 * (2 * (2 * z.head_dim * z.n_heads) * entries)
    scores = 0.5 * (2 * z.index_n_heads * z.index_head_dim * z.csa_layers * (context / z.csa_ratio))
    t.context_flops = attention + scores
    t.flops_ratio = s.v32_token_flops / (2 * t.active_products + t.context_flops)
    t.rounded_ratio = (2 * V32_ACTIVATED + s.v32_context_flops) / (2 * z.activated + t.context_flops)


def _parameters(z: Any, layers: int) -> tuple[int, int]:
    """Return the parameters without multi-token prediction and hash routing's table, and those that a token uses."""
    m, c, q, heads = z.dim, z.head_dim, z.q_lora_rank, z.n_heads * z.head_dim
    attention = q * m + heads * q + c * m + z.o_lora_rank * heads + m * z.o_groups * z.o_lora_rank
    mixes = z.streams * (2 + z.streams)  # streams in, streams out, and between streams
    mixing = mixes * z.streams * m
    indexer = z.index_n_heads * (z.index_head_dim * q + m)
    expert, gate = 3 * m * z.moe_inter_dim, z.n_routed_experts * m
    widths = (c, z.index_head_dim)

    def compressor(width: int, ratio: int, series: int) -> int:
        """Return wkv, wgate, the position bias and the norm."""
        return 2 * series * width * m + ratio * series * width + width

    csa = indexer + sum(compressor(width, z.csa_ratio, z.csa_series) for width in widths)
    block = attention + q + c + z.n_heads + 2 * (mixing + mixes + 3) + 2 * m + gate
    block += (z.n_routed_experts + z.n_shared_experts) * expert
    ends = 2 * z.vocab_size * m + m + z.streams * z.streams * m + z.streams + 1
    biases = (layers - z.hash_layers) * z.n_routed_experts
    held = layers * block + biases + z.csa_layers * csa + z.hca_layers * compressor(c, z.hca_ratio, 1) + ends
    used = layers * (attention + 2 * mixing + gate + (z.n_activated_experts + z.n_shared_experts) * expert)
    used += z.csa_layers * (2 * z.csa_series * m * sum(widths) + indexer) + z.hca_layers * 2 * m * c
    return held, used + z.vocab_size * m + z.streams * z.streams * m
