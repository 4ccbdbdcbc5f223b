"""Config files for tests, and the errors of wrong ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
DSA: dict[str, Any] = {"attention": "dsa", "index_n_heads": 3, "index_head_dim": 32, "index_topk": 8}
V4: dict[str, Any] = {
    "attention": "compressed",
    "n_layers": 3,
    "n_dense_layers": 0,
    "n_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "window_size": 8,
    "compress_ratios": [0, 4, 8],
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "score_func": "sqrtsoftplus",
    "n_expert_groups": 1,
    "n_limited_groups": 1,
}
"""V4's attention with a layer of each kind: window, CSA, HCA."""
V4_MODEL: dict[str, Any] = V4 | {"n_hash_layers": 1, "swiglu_limit": 0.5, "hc_mult": 4}
"""The same with all of V4's parts."""
"""Sparse attention whose top-k is shorter than the tests' sequences."""
V32: dict[str, Any] = {"attention": "dsa", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
"""The indexer of DeepSeek-V3.2, which is DeepSeek-V3 but for it."""
FP8_SIZES: dict[str, Any] = {
    **{"dim": 256, "inter_dim": 272, "moe_inter_dim": 136, "q_lora_rank": 128, "kv_lora_rank": 128},
    **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_heads": 4, "precision": "fp8"},
}
"""Model in simulated FP8, some of whose widths are not multiples of the tile, 128."""


def released(name: str, **changes: Any) -> ModelConfig:
    """Return the config of a file in configs/, with changes."""
    return dataclasses.replace(ModelConfig.from_file(CONFIGS / f"{name}.toml"), **changes)


def written(folder: Path, content: Any, name: str = "x.json") -> Path:
    """Write a file with this content, as JSON unless it is text, and return its path."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(read: Any, *arguments: Any, **more: Any) -> str:
    """Return the message of the ValueError that a call must raise."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller looks at the sentence)
        read(*arguments, **more)
    return str(error.value)
