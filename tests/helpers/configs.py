"""Config files for tests, and the errors of wrong ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig
from tests.conftest import MODELS

CONFIGS = Path(__file__).parents[2] / "configs"
DSA, GLM, V4, FP8_SIZES, ENGRAM = (MODELS[name] for name in ("dsa", "glm", "v4", "fp8", "engram"))
V4_MODEL: dict[str, Any] = V4 | {"n_hash_layers": 1, "swiglu_limit": 0.5, "hc_mult": 4}
"""V4's attention with all of V4's parts."""
V32: dict[str, Any] = {"attention": "dsa", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
"""The indexer of DeepSeek-V3.2, which is DeepSeek-V3 but for it."""


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
