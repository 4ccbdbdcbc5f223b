"""Reading and writing config files in tests."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def released(name: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(ModelConfig.from_file(CONFIGS / f"{name}.toml"), **changes)


def written(folder: Path, content: Any, name: str = "x.json") -> Path:
    """A file of this content: JSON, unless it is text already."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(read: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller looks at the sentence)
        read(*arguments, **more)
    return str(error.value)
