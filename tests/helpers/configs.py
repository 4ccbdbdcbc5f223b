"""Config files that tests read and write, and refusals of wrong ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"


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
