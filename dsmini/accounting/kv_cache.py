"""Bytes of what decoding keeps of a token, and the twin that MLA's cache is compared with."""

import dataclasses
from typing import Literal

from dsmini.accounting.table import Bytes
from dsmini.accounting.tensors import BLOCK, MTP, SIZES
from dsmini.config import ModelConfig

CacheDtype = Literal["float32", "bfloat16", "fp8"]
"""fp8: V3.2's layout of MLA's rows."""


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2, dtype: CacheDtype | None = None) -> int:
    """Bytes of cache that a token occupies in all layers together, multi-token prediction's apart. V3 in BF16: 70,272.

    MLA keeps a latent and one rotary key, kv_lora_rank + qk_rope_head_dim numbers a layer; the twins keep a key and a
    value of each key-value head.

    Args:
        dtype: in place of bytes_per_number. "fp8" is 656 bytes a layer at V3's sizes: 512 codes, four FP32 scales, and
            64 numbers of rotary key in BF16.

    Source: DeepSeek-V2 report, table 1; "Insights into DeepSeek-V3", table 1 (its KB are 1000 bytes).
    Raises: ValueError for "fp8" where attention is not MLA.
    """
    return config.n_layers * (row_width(config) * bytes_per_number if dtype is None else row_bytes(config, dtype))


def mha_kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """kv_bytes_per_token of the mha_twin, also where qk_nope_head_dim is odd and there is no such twin to build."""
    return config.n_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.n_layers * bytes_per_number


def mha_twin(config: ModelConfig) -> ModelConfig:
    """The same model with multi-head attention of as many heads, keys qk_nope_head_dim and values v_head_dim wide.

    Against it V3's cache is 98.24 % smaller: 576 numbers a layer for 128 * (128 + 128) = 32768. That figure needs
    keys of 128; against MLA's own 192-wide expanded keys, 128 * (192 + 128) = 40960, the same cache saves 98.59 %.

    Raises: ValueError if qk_nope_head_dim is odd, since the twin rotates it.
    """
    return dataclasses.replace(config, attention="mha", n_kv_heads=None)


def cache_bytes(
    config: ModelConfig, *, max_seq_len: int, batch: int = 1, dtype: CacheDtype = "bfloat16", mtp: bool = False
) -> Bytes:
    """Bytes of the storage of Transformer.new_cache, all of which is allocated at once.

    Args:
        mtp: with what the multi-token prediction blocks keep, a layer's rows each.
    """
    rows = batch * max_seq_len * row_bytes(config, dtype)
    return Bytes.of([("cache", config.n_layers * rows), (MTP + "cache", config.n_mtp_layers * rows if mtp else 0)])


def row_width(c: ModelConfig) -> int:
    """Numbers that a layer keeps of a token."""
    if c.attention == "mla":
        return c.kv_lora_rank + c.qk_rope_head_dim
    return c.kv_heads * (c.qk_nope_head_dim + c.v_head_dim)


def row_bytes(c: ModelConfig, dtype: CacheDtype) -> int:
    """Bytes that a layer keeps of a token."""
    if dtype not in ("float32", "bfloat16", "fp8"):
        raise ValueError(f"a cache of dtype={dtype!r}; use float32, bfloat16 or fp8")
    if dtype != "fp8":
        return row_width(c) * SIZES[dtype]
    if c.attention != "mla":
        raise ValueError(f"dtype='fp8' is the layout of MLA's latent, not of attention={c.attention!r}; use bfloat16")
    return c.kv_lora_rank + 4 * -(-c.kv_lora_rank // BLOCK) + 2 * c.qk_rope_head_dim
