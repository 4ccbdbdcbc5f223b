"""Config files that tests read and write, and refusals of wrong ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FP8_SIZES: dict[str, Any] = {
    "dim": 256,
    "inter_dim": 272,
    "moe_inter_dim": 136,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_heads": 4,
    "precision": "fp8",
}
"""A model in simulated FP8 of which some widths do not fill whole tiles of 128."""


def released(name: str, **changes: Any) -> ModelConfig:
    """Return the config of a file in configs/, with changes."""
    return dataclasses.replace(ModelConfig.from_file(CONFIGS / f"{name}.toml"), **changes)


def written(folder: Path, content: Any, name: str = "x.json") -> Path:
    """Write a file of this content and return its path: as JSON, unless it is text already."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(read: Any, *arguments: Any, **more: Any) -> str:
    """Return the sentence of the ValueError that a call must raise."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller looks at the sentence)
        read(*arguments, **more)
    return str(error.value)
