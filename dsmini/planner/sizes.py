"""Sizes that no ModelConfig can express, read from data/*.toml, where every number names its source.

    prefix = "flash_"
    [sizes]
    n_layers = { value = 43, source = "config.json: num_hidden_layers" }

A dataclass says which sizes a model has, and its docstrings are the titles. The prefix keeps the names of two models
apart in one formula: flash_n_layers and n_layers.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar, get_type_hints

from dsmini.config import ModelConfig
from dsmini.console.commandline import field_docstrings
from dsmini.planner.inputs import ModelInputs
from dsmini.planner.quantity import BYTES, COUNT, Anything, Bytes, Quantity
from dsmini.reading import read_toml

FOLDER = Path(__file__).parent / "data"
S = TypeVar("S")


def read_sizes(kind: type[S], path: Path) -> S:
    """Return the sizes of a file as a dataclass whose fields are Counts or Bytes.

    Raises: ValueError for a size that is missing, unknown, or without a value or a source.
    """
    content = read_toml(path)
    hints = get_type_hints(kind)
    titles = field_docstrings(kind)
    given = content.get("sizes", {})
    if given.keys() != hints.keys():
        odd = ", ".join(sorted(given.keys() ^ hints.keys()))
        raise ValueError(f"[sizes] of {path.name} and {kind.__name__} differ in {odd}; give each size once")

    def size(name: str) -> Anything:
        entry = given[name]
        value, source = (entry.get(key) if isinstance(entry, dict) else None for key in ("value", "source"))
        if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(source, str) or not source:
            raise ValueError(f"sizes.{name} of {path.name} is {entry!r}; write {{ value = 1, source = '...' }}")
        unit = BYTES if hints[name] == Bytes else COUNT
        return unit(value, f"{content.get('prefix', '')}{name}", titles[name].partition(".")[0], source)

    return kind(**{name: size(name) for name in hints})


def renamed(model: ModelInputs, prefix: str) -> ModelInputs:
    """Return the inputs of a model under names with a prefix, for a formula that compares two models."""

    def input_of(name: str) -> Anything:
        old = getattr(model, name)
        assert isinstance(old, Quantity)
        return COUNT(old.value, f"{prefix}{old.name}", old.title, old.source)

    names = [field.name for field in dataclasses.fields(model) if field.name != "config"]
    config: ModelConfig = model.config
    return ModelInputs(config=config, **{name: input_of(name) for name in names})
