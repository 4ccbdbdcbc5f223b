"""Checks of the fields of frozen dataclasses: names, types and ranges, with an error that names the fix."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from dsmini.reading import brief, check_path, listed

C = TypeVar("C")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError unless the value is a multiple of the divisor, with the nearest multiples."""
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        choice = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{name}={value} is not divisible by {divisor_name}={divisor}; use {choice}")


def mask_function(given: C) -> C:
    """Return the mask of an attention; raise ValueError unless it is a function or None."""
    require(
        given is None or callable(given),
        f"mask is a {type(given).__name__}, want a function of the positions of queries and keys; use lambda q, k: "
        "hidden[q, k] for a tensor that is True for hidden keys",
    )
    return given


def require_subclass(name: str, given: Any, base: type) -> None:
    """Raise ValueError for a class that is not derived from the base. A function that makes modules may be anything."""
    require(
        callable(given) and (not isinstance(given, type) or issubclass(given, base)),
        f"{name} is {given.__name__ if isinstance(given, type) else brief(given)}, want {base.__name__}, a class "
        "derived from it, or a function that makes one",
    )


def refuse_unknown(given: dict[str, Any], known: list[str], source: str, prefix: str) -> None:
    """Raise ValueError for the first key that is not known, with the nearest known one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean '{prefix}{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown key {brief(prefix + key)} in {source}; {fix}")


def build(cls: type[C], values: dict[str, Any], source: str, prefix: str, base: C | None = None) -> C:
    """Make a config from parsed values: check names, read "none" as None, refuse wrong types.

    Args:
        base: config with the values that are left out; None: the defaults.
    """
    if not isinstance(values, dict):
        raise ValueError(f"'{prefix.rstrip('.')}' in {source} is {brief(values)}, want a table [{prefix.rstrip('.')}]")
    known = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    refuse_unknown(values, known, source, prefix)
    hints = typing.get_type_hints(cls)
    try:
        given = {key: _from_toml(value, hints[key]) for key, value in values.items()}
        return cls(**given) if base is None else dataclasses.replace(base, **given)  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _from_toml(value: Any, hint: Any) -> Any:
    """Return None for "none" and a path for a text, where the field has that type: TOML has neither."""
    choices = typing.get_args(hint)
    if value == "none" and type(None) in choices:
        return None
    return Path(value) if isinstance(value, str) and Path in choices else value


@functools.cache  # a search makes thousands of one kind
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse a value of the wrong type. An int becomes a float, and a list a tuple, where the field has that type."""
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if any(_is_a(value, choice) for choice in choices):
            if isinstance(value, Path):
                check_path(value, f"{prefix}{f.name}")
            continue
        if float in choices and _is_a(value, int) and value.bit_length() < 1024:  # else it is beyond any float
            object.__setattr__(config, f.name, float(value))
            continue
        if isinstance(value, list) and any(_is_a(tuple(value), choice) for choice in choices):
            object.__setattr__(config, f.name, tuple(value))
            continue
        want = " or ".join(_describe(choice) for choice in choices)
        raise ValueError(f"{prefix}{f.name}={_shown(value)} is not {want}{_nearest(value, choices)}")


def _shown(value: Any) -> str:
    too_long = isinstance(value, int) and value.bit_length() > 1024  # Python refuses to write out longer ones
    return "a number of hundreds of digits" if too_long else brief(value)


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:  # of any number of texts, as in tuple[str, ...]
        return isinstance(value, tuple) and all(_is_a(part, typing.get_args(hint)[0]) for part in value)
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(arg) for arg in typing.get_args(hint))
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}
    return words.get(hint, "a list of texts" if typing.get_origin(hint) is tuple else '"none"')


def _nearest(value: Any, choices: tuple[Any, ...]) -> str:
    options = [arg for choice in choices if typing.get_origin(choice) is Literal for arg in typing.get_args(choice)]
    near = difflib.get_close_matches(brief(value).strip("'"), options, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_unread(keys: Iterable[str], source: str) -> None:
    """Raise ValueError for keys of another project's file that nothing here reads, if there are any."""
    if unknown := sorted(keys):
        raise ValueError(f"{source} has keys that dsmini does not know and so cannot honour: {listed(unknown)}")


def token_ids(value: Any, vocab_size: Any, where: str) -> tuple[int, ...]:
    """Return one token id or a list of them, as eos_token_id has.

    Args:
        vocab_size: number of tokens of the model, if it is known.
        where: name of the key and its file, for the error.

    Raises: ValueError for anything else, and for an id that the model does not have.
    """
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise ValueError(f"{where} is {brief(value)}, which is neither a token's id nor a list of them")
    most = vocab_size if isinstance(vocab_size, int) else 2**31
    if any(id >= most for id in ids):
        raise ValueError(f"{where} is {brief(value)}, but the model has {most} tokens; want ids below that")
    return tuple(ids)


def plain(value: Any) -> Any:
    """Return a value that TOML can hold: "none" for None, and the text of a path."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if not (key == "out" and inner is None)}
    if isinstance(value, tuple):
        return [plain(inner) for inner in value]
    if value is None:
        return "none"
    return str(value) if isinstance(value, Path) else value
