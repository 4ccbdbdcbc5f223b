"""Axes of a variation: a name and its values, read from a text such as kv_lora_rank=128,256,512.

A name is hardware, another field of the request, or a field of the model's config.
"""

import difflib
import types
import typing
from dataclasses import dataclass
from typing import Any

from dsmini.config import ModelConfig
from dsmini.planner.request import PlanRequest
from dsmini.reading import brief


@dataclass(frozen=True, kw_only=True, slots=True)
class VariedAxis:
    """One thing that is varied."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """Values in words."""
        return [f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v) for v in self.values]

    @property
    def numeric(self) -> bool:
        """True if all values are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)


def read_axis(text: str) -> VariedAxis:
    """Read an axis such as "kv_lora_rank=128,256,512".

    Raises: ValueError for a text without values, an unknown name with the nearest known ones, and a value of a wrong
        type.
    """
    name, equals, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    if not equals or not words:
        raise ValueError(f"--vary {brief(text)} has no values; write it like kv_lora_rank=128,256,512")
    hints = _fields()
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=3)
        fix = (
            f"did you mean {' or '.join(near)}?" if near else "vary hardware, or a field of the model or of --help-all"
        )
        raise ValueError(f"unknown --vary name {brief(name)}; {fix}")
    return VariedAxis(name=name, values=tuple(dict.fromkeys(_value(name, word, hints[name]) for word in words)))


def _fields() -> dict[str, Any]:
    """Return what can be varied, with the types of values. `precision` is that of the request."""
    return typing.get_type_hints(ModelConfig) | typing.get_type_hints(PlanRequest)


def _value(name: str, word: str, hint: Any) -> Any:
    """Return a word as a value of a type."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in choices and word == "none":
        return None
    for choice in choices:
        if typing.get_origin(choice) is typing.Literal:
            options = {str(option): option for option in typing.get_args(choice)}
            if word in options:
                return options[word]
        elif choice is bool:
            if word in ("true", "false"):
                return word == "true"
        elif choice in (int, float):
            try:
                return choice(word) if choice is float else _whole(word)
            except ValueError:
                continue
        elif choice is str:
            return word
    allowed = [str(o) for c in choices if typing.get_origin(c) is typing.Literal for o in typing.get_args(c)]
    fix = f"use one of {', '.join(allowed)}" if allowed else "use numbers like 128"
    raise ValueError(f"--vary {name} has the value {brief(word)}, which it cannot have; {fix}")


def _whole(word: str) -> int:
    """Return a whole number, also written like 1e6."""
    number = float(word)
    if not number.is_integer():
        raise ValueError(f"{word} is not whole")
    return int(word) if word.lstrip("+-").isdigit() else int(number)
