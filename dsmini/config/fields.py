"""Fields of configs: a dataclass declares the bounds of a value and the effect of a change, and is checked by that.

    steps: int = setting(1450, least=1, most=10**12)
    seed: int = setting(0, least=0, resume="refused")

Each check names the field, its value, what is wanted, and a fix.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from dsmini.config.retired import without_retired
from dsmini.reading import brief, check_path, listed

C = TypeVar("C")
MOST_NAMED = 16
"""Number of known keys up to which a refusal of an unknown one names all."""

Effect = Literal["refused", "recipe", "rounding", "none"]
"""Effect of another value on a run that resumes: it would not be the same run; the schedule or the recipe changes from
here on; numbers are rounded or summed otherwise; neither numbers nor the schedule change."""


class Bounds(NamedTuple):
    """Values that a number may have: from `least` to `most`, or above and below two that are excluded."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def check(self, name: str, value: float) -> None:
        """Raise ValueError for a value outside, with the nearest one inside."""
        least, above, most, below = self
        if (least is not None and value < least) or (above is not None and value <= above):
            fault = "negative" if least == 0 else "not positive"
            fault = "too small" if value > 0 else fault
            fix = f"more than {above:g}" if least is None else f"{least:g} or more"
            fix = "more than 0" if value <= 0 < (least or 0) < 1 else fix  # a least number that is no round one
        elif (most is not None and value > most) or (below is not None and value >= below):
            largest = below if most is None else most
            number = f"{largest:,}" if isinstance(largest, int) else f"{largest:g}"
            fault, fix = "too large", f"less than {number}" if most is None else f"{number} or less"
        else:
            return
        raise ValueError(f"{name}={brief(value)} is {fault}; use {fix}")


def setting(
    default: Any,
    *,
    resume: Effect = "recipe",
    none_stays: bool = False,
    function: bool = False,
    only: tuple[str, ...] | None = None,
    **bounds: float,
) -> Any:
    """Declare a field of a config.

    Args:
        resume: the effect of another value on a run that resumes.
        none_stays: a run that resumes may neither begin nor end to have a value.
        function: in Python it may be a function too. Its type stays that of files and flags.
        only: the kinds of attention that have it; needed there if the default is None, and left out elsewhere.
        bounds: least or above, most or below; see Bounds.
    """
    said = {"resume": resume, "none_stays": none_stays, "function": function, "only": only}
    return dataclasses.field(default=default, metadata={**said, "bounds": Bounds(**bounds) if bounds else None})


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError unless the value is a multiple of the divisor, with the nearest multiples."""
    below = value // divisor * divisor
    choice = f"{below} or {below + divisor}" if below else divisor
    require(below == value, f"{name}={value} is not divisible by {divisor_name}={divisor}; use {name}={choice}")


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


def derives(made: Any, base: type) -> bool:
    """Return True for a class that is derived from a base, and for a partial of one."""
    made = getattr(made, "func", made)
    return isinstance(made, type) and issubclass(made, base)


def refuse_unknown(given: dict[str, Any], known: list[str], source: str, prefix: str) -> None:
    """Raise ValueError for the first key that is not known, with the nearest known one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean '{prefix}{near[0]}'?" if near else f"known are {', '.join(known)}"
            if not near and len(known) > MOST_NAMED:
                nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.0)
                fix = f"the nearest of {len(known)} that are known are {', '.join(nearest)}"
            raise ValueError(f"unknown key {brief(prefix + key)} in {source}; {fix}")


def build(cls: type[C], values: dict[str, Any], source: str, prefix: str, base: C | None = None) -> C:
    """Make a config from parsed values, inner configs included: check names, and read "none" as None.

    Args:
        base: config with the values that are left out; None: the defaults.

    Raises: ValueError naming the unknown key and the nearest right one, or the wrong value.
    """
    table = prefix.rstrip(".")
    require(isinstance(values, dict), f"'{table}' in {source} is {brief(values)}, want a table [{table}]")
    hints, values = _hints(cls), without_retired(cls, values, source, prefix)
    refuse_unknown(values, [f.name for f in dataclasses.fields(cls)], source, prefix)  # pyright: ignore[reportArgumentType]
    given = {}
    for key, value in values.items():
        choices = typing.get_args(hints[key])
        if dataclasses.is_dataclass(hints[key]):
            value = build(hints[key], value, source, f"{prefix}{key}.", base and getattr(base, key))
        elif value == "none" and type(None) in choices:  # TOML has neither None nor paths
            value = None
        elif isinstance(value, str) and Path in choices:
            require(value != "", f"{source}: {prefix}{key} is empty; name a file or a folder, or leave it out")
            value = Path(value)
        given[key] = value
    try:
        return cls(**given) if base is None else dataclasses.replace(base, **given)  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


@functools.cache  # a search makes thousands of one kind
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def check_types(config: Any, prefix: str = "", whole: Bounds = Bounds(), real: Bounds = Bounds()) -> None:
    """Refuse a value of the wrong type or out of bounds.

    An int becomes a float, and a list a tuple, where the field has that type.

    Args:
        whole, real: bounds of the whole and of the other numbers whose fields declare none.
    """
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # the latter is Literal[...] | None
        name, choices = f"{prefix}{f.name}", typing.get_args(hint) if union else (hint,)
        if float in choices and _is_a(value, int) and abs(value) < 2**1023:  # else it is beyond any float
            value = float(value)
        if isinstance(value, list):
            value = tuple(value)
        if not any(_is_a(value, choice) for choice in choices) and not (callable(value) and f.metadata.get("function")):
            want = " or ".join(_describe(choice) for choice in choices if choice is not type(None))
            fix = _nearest(value, choices) or ('; use one, or "none" to leave it out' if type(None) in choices else "")
            raise ValueError(f"{name}={brief(getattr(config, f.name))} is not {want}{fix}")
        object.__setattr__(config, f.name, value)
        if isinstance(value, str | Path):
            try:
                str(value).encode()
            except UnicodeEncodeError:
                what = f"{name}={brief(str(value))} has bytes that are not UTF-8"
                raise ValueError(f"{what}, which no config can hold; rename it, or write it in UTF-8") from None
        if isinstance(value, Path):
            check_path(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            (f.metadata.get("bounds") or (whole if isinstance(value, int) else real)).check(name, value)


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:  # of any number of parts of one type, as in tuple[str, ...]
        return isinstance(value, tuple) and all(_is_a(part, typing.get_args(hint)[0]) for part in value)
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    kind = typing.get_origin(hint) or hint  # dict, of dict[str, Any]
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}
    kind = typing.get_origin(hint) or hint
    if kind in (words := words | {dict: "a table"}):
        return words[kind]
    part = next(iter(typing.get_args(hint)), str)
    several = {int: "whole numbers", str: "texts"}
    return f"a list of {several.get(part) or ' and '.join(map(repr, typing.get_args(part)))}"


def _nearest(value: Any, choices: tuple[Any, ...]) -> str:
    literals = [arg for hint in choices if typing.get_origin(hint) is Literal for arg in typing.get_args(hint)]
    near = difflib.get_close_matches(brief(value, 100).strip("'"), map(str, literals), n=1)
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
    if not all(_is_a(id, int) and id >= 0 for id in ids):
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
    if callable(value):
        raise ValueError(f"a config with the function {brief(value)} cannot be written; give one that has a name")
    return str(value) if isinstance(value, Path) else value
