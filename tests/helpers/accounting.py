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
from tests.conftest import MODELS

WHOLE = 1 << 20
"""Number of queries in a block that holds all of them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SIZES, V4 = MODELS["accounting"], MODELS["accounting_v4"]
SHARED: dict[str, Any] = MODELS["dsa"] | {"indexer_types": ("full", "shared", "full"), "indexer_target": "served"}
"""Changes of it: DSA in which a layer takes another one's choice, and teaches its indexer."""
ATTENTIONS: dict[str, dict[str, Any]] = {
    "absorbed": {},
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
    if case == "normed heads":
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
