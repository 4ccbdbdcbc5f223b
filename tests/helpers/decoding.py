"""Models for decoding steps, whose weights are held in FP32, BF16 or FP8 codes, and their caches."""

from typing import Any

import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.nn import Cache
from dsmini.nn.fp8 import hold_all_fp8
from tests.conftest import MODELS as SIZES
from tests.conftest import SMALL, randomise

WEIGHTS = ("float32", "bfloat16", "fp8")
CACHES = (torch.float32, torch.bfloat16, "fp8")
ROOM = 400
ODD = SMALL | {"n_mtp_layers": 0, "max_seq_len": ROOM}
"""Sizes that no vector divides."""
BLOCKS = ODD | SIZES["blocks"]
GREEDY = {"score_func": "softmax", "topk_method": "greedy", "n_expert_groups": 1, "n_limited_groups": 1}
MODELS: dict[str, dict[str, Any]] = {
    "odd": ODD,
    "blocks": BLOCKS,
    "direct query, no shared experts": ODD | {"q_lora_rank": None, "n_shared_experts": 0},
    "softmax, greedy": ODD | GREEDY | {"norm_topk_prob": False},
    "every expert": ODD | {"n_expert_groups": 1, "n_limited_groups": 1, "n_activated_experts": 8},
    "wide": ODD | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_heads": 5},
}
GROUPED: dict[str, dict[str, Any]] = {
    "mha": ODD | {"attention": "mha"},
    "gqa": ODD | {"attention": "gqa", "n_heads": 6, "n_kv_heads": 2},
    "mqa": ODD | {"attention": "mqa", "n_heads": 5},
    "gqa, blocks": BLOCKS | {"attention": "gqa", "n_heads": 9, "n_kv_heads": 3},
    "gqa, wide": ODD | {"attention": "gqa", "n_heads": 8, "n_kv_heads": 2, "qk_nope_head_dim": 128, "v_head_dim": 64},
}
"""Models of MHA, GQA and MQA."""
INDEX = {"attention": "dsa", "index_n_heads": 3, "index_head_dim": 32, "index_topk": 40}
SPARSE: dict[str, dict[str, Any]] = {
    "dsa": ODD | INDEX,
    "dsa, direct query": ODD | INDEX | {"q_lora_rank": None, "indexer_rope_interleave": True},
    "dsa, blocks": BLOCKS | INDEX | {"index_n_heads": 6, "index_head_dim": 64, "index_topk": 65},
}
"""Models of DSA."""

COMPRESSED: dict[str, dict[str, Any]] = {
    "v4": ODD | SIZES["v4"] | {"n_hash_layers": 1, "swiglu_limit": 0.5, "hc_mult": 4},
    "v4, rounded": ODD | SIZES["v4"] | {"qat": True, "hc_mult": 2, "hc_kind": "identity"},
    "v4, all entries": ODD | SIZES["v4"] | {"index_topk": 200, "window_size": 3},
    "v4, blocks": BLOCKS
    | SIZES["v4"]
    | {"head_dim": 130, "qk_rope_head_dim": 10, "n_heads": 6, "o_groups": 3, "o_lora_rank": 37, "q_lora_rank": 144}
    | {"index_n_heads": 5, "index_head_dim": 64, "index_topk": 9, "window_size": 20, "compress_ratios": [128, 4, 0]},
}
"""Models of V4's attention."""


def model_of(name: str, weights: str = "float32", **changes: Any) -> Transformer:
    """Make a model, with changes of its config, whose matrices are held so; it computes in FP32."""
    model = randomise(
        Transformer(
            ModelConfig(**((MODELS | GROUPED | SPARSE | COMPRESSED)[name] | changes)), compute_dtype=torch.float32
        )
    ).eval()
    if weights == "bfloat16":
        return model.to(torch.bfloat16)
    return hold_all_fp8(model, "ue8m0") if weights == "fp8" else model


def filled(model: Transformer, lengths: list[int], dtype: Any) -> Cache:
    """Return a cache whose rows have these lengths and random content."""
    cache = model.new_cache(len(lengths), ROOM, dtype)
    c = model.config
    grouped = c.kv_heads * (c.qk_nope_head_dim + c.v_head_dim)
    width = c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else grouped
    numbers = torch.randn(len(model.layers), len(lengths), ROOM, width)
    for store, rows in zip(cache.stores, numbers, strict=True):
        store.data.copy_(store.codec.encode(rows))
    for store in cache.index_stores:
        store.data.copy_(store.codec.encode(torch.randn(len(lengths), ROOM, c.index_head_dim or 0)))
    cache.lengths = torch.tensor(lengths)
    return cache


def rows_of(cache: Cache) -> list[Tensor]:
    """Return what each layer stores, as FP32 numbers."""
    return [store.read(cache.max_seq_len, torch.float32) for store in cache.stores]
