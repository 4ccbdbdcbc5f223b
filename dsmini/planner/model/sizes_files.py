"""Sizes that no ModelConfig can express, read from data/*.toml, where every number names its source.

    title = "DeepSeek-V4-Flash"
    prefix = "flash_"
    [sizes]
    dim = { value = 4096, source = "config.json: hidden_size" }

A dataclass says which sizes a model has, and its docstrings are the titles. The prefix keeps the names of two models
apart in one formula: flash_dim and dim.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar, get_type_hints

from dsmini.config import ModelConfig
from dsmini.console.commandline import field_docstrings
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import BYTES, COUNT, Anything, Bytes, Quantity
from dsmini.reading import read_toml

FOLDER = Path(__file__).parent / "sizes"
S = TypeVar("S")


def read_sizes(kind: type[S], path: Path) -> S:
    """Return the sizes of a file as a dataclass with the fields title and prefix, and Counts or Bytes.

    Raises: ValueError for a size that is missing, unknown, or without a value or a source.
    """
    content = read_toml(path)
    words = {"title", "prefix"}
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in words}
    titles = field_docstrings(kind)
    given = content.get("sizes")
    if not isinstance(given, dict) or not all(isinstance(content.get(word), str) for word in words):
        raise ValueError(f"{path.name} has no title, prefix or [sizes]; write all three")
    if given.keys() != hints.keys():
        odd = ", ".join(sorted(given.keys() ^ hints.keys()))
        raise ValueError(f"[sizes] of {path.name} and {kind.__name__} differ in {odd}; give each size once")

    def size(name: str) -> Anything:
        entry = given[name]
        value, source = (entry.get(key) if isinstance(entry, dict) else None for key in ("value", "source"))
        if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(source, str) or not source:
            raise ValueError(f"sizes.{name} of {path.name} is {entry!r}; write {{ value = 1, source = '...' }}")
        unit = BYTES if hints[name] == Bytes else COUNT
        return unit(value, f"{content['prefix']}{name}", titles[name].partition(".")[0], source)

    return kind(**{word: content[word] for word in words}, **{name: size(name) for name in hints})


def renamed(model: ModelInputs, prefix: str) -> ModelInputs:
    """Return the inputs of a model under names with a prefix, for a formula that compares two models."""

    def input_of(name: str) -> Anything:
        old = getattr(model, name)
        assert isinstance(old, Quantity)
        return COUNT(old.value, f"{prefix}{old.name}", old.title, old.source)

    names = [field.name for field in dataclasses.fields(model) if field.name != "config"]
    config: ModelConfig = model.config
    return ModelInputs(config=config, **{name: input_of(name) for name in names})
