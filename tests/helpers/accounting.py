"""Small models for the tests of accounting, and ways to run them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig
from dsmini.functional import attention as fast
from dsmini.nn import attention

WHOLE = 1 << 20
"""Number of queries in a block that holds all of them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# no width equals a number of rows read from a cache (100 or 128), or of tokens (220)
SIZES: dict[str, Any] = dict(vocab_size=51, dim=40, inter_dim=72, moe_inter_dim=24, n_layers=3, n_heads=4)
SIZES |= dict(q_lora_rank=20, kv_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14)
SIZES |= dict(n_routed_experts=16, n_activated_experts=2, n_expert_groups=1, n_limited_groups=1)
V4: dict[str, Any] = {
    "attention": "compressed",
    "compress_ratios": (0, 4, 8, 128, 4),
    "n_layers": 5,
    "head_dim": 64,
    "n_hash_layers": 2,
}
V4 |= {"window_size": 8, "o_groups": 2, "o_lora_rank": 12, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 3}
V4 |= {"n_dense_layers": 0, "score_func": "sqrtsoftplus", "hc_mult": 4, "n_mtp_layers": 2}
"""DeepSeek-V4 with each kind of layer: changes of SIZES."""
ATTENTIONS: dict[str, dict[str, Any]] = {
    "absorbed": {},
    "expanded": {},
    "query not compressed": {"q_lora_rank": None},
    "normed heads": {"qk_norm": True},
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "n_kv_heads": 2},
    "mqa": {"attention": "mqa"},
}
# torch's counter takes its grouped product for nothing: rows by widths
GROUPED: dict[Any, Any] = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}


def sized(**changes: Any) -> ModelConfig:
    return ModelConfig(**(SIZES | changes))


def form_of(case: str) -> Any:
    """Return the form in which a case of ATTENTIONS attends to a cache."""
    if case in ("expanded", "normed heads"):
        return "expanded"
    return "auto" if case in ("mha", "gqa", "mqa") else "absorbed"


@contextmanager
def attention_by(function: Callable[..., Tensor], block: int = 128) -> Iterator[None]:
    """Let all attentions compute by this function, with this many queries in a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "causal_attention", function)  # attend calls it there
        patch.setattr(fast, "BLOCK", block)
        yield


explicit = fast.explicit_attention
"""Attention that makes its square of logits."""


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """Attend by torch's flash attention, with values in their own storage."""
    return fast.flash_attention(q, k, v.contiguous(), scale, documents)
