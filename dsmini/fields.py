"""Fields of frozen dataclasses, checked: names, kinds and ranges, with an error that says the fix."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

C = TypeVar("C")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        choice = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{name}={value} is not divisible by {divisor_name}={divisor}; use {choice}")


def read_toml(path: Path) -> dict[str, Any]:
    return parse_file(path, tomllib.loads)


def parse_file(path: Path, loads: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    try:
        raw = loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}; check the name") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the config file {path}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, want a table of keys")
    return raw


def refuse_unknown(given: dict[str, Any], known: list[str], source: str, prefix: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean '{prefix}{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown key '{prefix}{key}' in {source}; {fix}")


def build(cls: type[C], values: dict[str, Any], source: str, prefix: str, base: C | None = None) -> C:
    """Make a config from parsed values: names checked, "none" read as None, wrong types refused.

    Args:
        base: has the values that are left out; without it, the defaults.
    """
    if not isinstance(values, dict):
        raise ValueError(f"'{prefix.rstrip('.')}' in {source} is {values!r}, want a table [{prefix.rstrip('.')}]")
    known = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    refuse_unknown(values, known, source, prefix)
    hints = typing.get_type_hints(cls)
    try:
        given = {key: _from_toml(value, hints[key]) for key, value in values.items()}
        return cls(**given) if base is None else dataclasses.replace(base, **given)  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _from_toml(value: Any, hint: Any) -> Any:
    """TOML has neither null nor paths: "none" is None where None may be, and a text a path where a path belongs."""
    choices = typing.get_args(hint)
    if value == "none" and type(None) in choices:
        return None
    return Path(value) if isinstance(value, str) and Path in choices else value


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse a value of the wrong kind; an int where a float belongs becomes one."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if any(_is_a(value, choice) for choice in choices):
            continue
        if float in choices and _is_a(value, int):
            object.__setattr__(config, f.name, float(value))
            continue
        want = " or ".join(_describe(choice) for choice in choices)
        raise ValueError(f"{prefix}{f.name}={value!r} is not {want}{_nearest(value, choices)}")


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(arg) for arg in typing.get_args(hint))
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}
    return words.get(hint, '"none"')


def _nearest(value: Any, choices: tuple[Any, ...]) -> str:
    options = [arg for choice in choices if typing.get_origin(choice) is Literal for arg in typing.get_args(choice)]
    near = difflib.get_close_matches(str(value), options, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def plain(value: Any) -> Any:
    """TOML has no null: None becomes "none", a path its text."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if not (key == "out" and inner is None)}
    return "none" if value is None else str(value) if isinstance(value, Path) else value
