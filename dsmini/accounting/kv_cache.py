"""Bytes of what decoding stores of a token, and the MHA that MLA's cache is compared with.

    MLA              kv_lora_rank + qk_rope_head_dim numbers a layer
    DSA              index_head_dim numbers more: the indexer's key
    MHA, GQA, MQA    n_kv_heads (d_k + d_v) numbers a layer

Worked example, DeepSeek-V3 in BF16: (512 + 64) * 61 layers * 2 bytes = 70,272 bytes a token. MHA with as many heads of
128 would store 128 * (128 + 128) = 32,768 numbers a layer, and 1 - 576 / 32768 = 98.24 % of them are saved.

Source: DeepSeek-V2 report, table 1; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 1.
"""

import dataclasses
from typing import Any, Literal

from dsmini.accounting.tensors import BLOCK, MTP, SIZES, Bytes, ceiling
from dsmini.config import ModelConfig
from dsmini.config.model import NO_INDEXER

CacheDtype = Literal["float32", "bfloat16", "fp8"]
"""fp8: V3.2's layout of MLA's rows."""


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2, dtype: CacheDtype | None = None) -> int:
    """Return the bytes of cache that a token occupies in all layers together. V3 in BF16: 70,272.

    The rows of multi-token prediction blocks are not in it.

    Args:
        dtype: in place of bytes_per_number. "fp8" is 656 bytes a layer at V3's sizes: 512 codes, four FP32 scales, and
            64 numbers of rotary key in BF16. DSA's are 132 more, the indexer's key: 48,068 in all layers of V3.2.

    Source: DeepSeek-V2 report, table 1; "Insights into DeepSeek-V3", table 1 (its KB are 1000 bytes).
    Raises: ValueError for "fp8" where attention is not MLA.
    """
    if dtype is None:
        return config.n_layers * (row_width(config) + (config.index_head_dim or 0)) * bytes_per_number
    return config.n_layers * (row_bytes(config, dtype) + index_row_bytes(config, dtype))


def mha_kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Return kv_bytes_per_token of the mha_twin, also where qk_nope_head_dim is odd and no such model can be built."""
    return config.n_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.n_layers * bytes_per_number


def mha_twin(config: ModelConfig) -> ModelConfig:
    """Return the same model with multi-head attention of as many heads: the baseline of MLA's cache.

    Its keys are qk_nope_head_dim wide and its values v_head_dim. Against it V3's cache is 98.24 % smaller: 576 numbers
    a layer next to 128 * (128 + 128) = 32768. That figure needs keys of 128; against MLA's own 192-wide expanded keys,
    128 * (192 + 128) = 40960, the same cache saves 98.59 %.

    Raises: ValueError if qk_nope_head_dim is odd, since the baseline rotates it.
    """
    return dataclasses.replace(config, attention="mha", n_kv_heads=None, **NO_INDEXER)


def cache_bytes(
    config: ModelConfig, *, max_seq_len: int, batch: int = 1, dtype: CacheDtype = "bfloat16", mtp: bool = False
) -> Bytes:
    """Return the bytes of the storage of Transformer.new_cache, all of which is allocated at once.

    Args:
        mtp: with the rows of the multi-token prediction blocks, a layer's each.
    """
    rows = batch * max_seq_len * (row_bytes(config, dtype) + index_row_bytes(config, dtype))
    return Bytes.of([("cache", config.n_layers * rows), (MTP + "cache", config.n_mtp_layers * rows if mtp else 0)])


def row_width(c: ModelConfig) -> Any:
    """Return the numbers that a layer stores of a token for attention."""
    if c.is_mla:
        return c.kv_lora_rank + c.qk_rope_head_dim
    return c.kv_heads * (c.qk_nope_head_dim + c.v_head_dim)


def row_bytes(c: ModelConfig, dtype: CacheDtype) -> Any:
    """Return the bytes that a layer stores of a token for attention."""
    if dtype not in ("float32", "bfloat16", "fp8"):
        raise ValueError(f"a cache of dtype={dtype!r}; use float32, bfloat16 or fp8")
    if dtype != "fp8":
        return row_width(c) * SIZES[dtype]
    if not c.is_mla:
        raise ValueError(f"dtype='fp8' is the layout of MLA's latent, not of attention={c.attention!r}; use bfloat16")
    return c.kv_lora_rank + 4 * ceiling(c.kv_lora_rank, BLOCK) + 2 * c.qk_rope_head_dim


def index_row_bytes(c: ModelConfig, dtype: CacheDtype) -> Any:
    """Return the bytes that a layer stores of a token for its indexer: 132 of V3.2 in FP8; 0 without an indexer."""
    d = c.index_head_dim or 0
    return d + 4 * ceiling(d, BLOCK) if dtype == "fp8" else d * SIZES[dtype]
