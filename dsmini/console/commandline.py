"""Read the command line: flags from the fields of a dataclass, and a help screen that fits a terminal."""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from dsmini.console.command import speaks
from dsmini.reading import brief

C = TypeVar("C")


def take_folder(args: Sequence[str], flag: str) -> tuple[Path | None, list[str]]:
    """Take a flag with its folder off a command line; return the last of its folders and the rest.

    Such a folder decides the defaults of all other flags, so it is read before them.

    Raises: ValueError for a flag without a folder.
    """
    found, rest, words = None, list[str](), iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or (not equals and value.startswith("-")):
            raise ValueError(f"{flag} needs a folder, got {value or 'nothing'}; use {flag} runs/toy-001")
        found = Path(value)
    return found, rest


def refuse_twice(args: Sequence[str], *flags: str) -> None:
    """Raise ValueError for a flag of several values that is given twice: the last would replace the first."""
    given = [arg.partition("=")[0].replace("_", "-") for arg in args]
    if twice := [flag for flag in flags if given.count(flag) > 1]:
        raise ValueError(f"{twice[0]} given twice; write all after one: {twice[0]} A B, each in quotes")


def parse(
    kind: type[C], name: str, args: Sequence[str], *, main: Sequence[str] | None = None, default: C | None = None
) -> C:
    """Read the arguments into a dataclass; explain a wrong one and exit with status 2.

    Args:
        name: the command module, as in python -m NAME.
        main: fields that --help lists, such as "train.steps"; None: all. --help-all explains every flag.
        default: the values that flags change; None: the dataclass's own defaults.
    """
    prog = f"python -m {name}"
    if {"-h", "--help"} & set(args):
        if speaks():
            print(short_help(kind, prog, main, default))
        sys.exit(0)
    if args[:1] == [""]:
        raise ValueError(f"the first argument is empty; see {prog} --help")
    args = _checked(args, dict(_types(kind)), f"Every flag: {prog} --help-all")
    options: dict[str, Any] = {} if default is None else {"default": default}
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where tyro draws a box around an error
            value, extra = tyro.cli(kind, prog=prog, args=args, return_unknown_args=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        usage = f"an argument is missing or wrong; want {calls_of(kind, prog)[0]}"
        raise ValueError(_said_by_a_check(stop) or usage) from None
    if extra:
        raise ValueError(f"unexpected {brief(extra[0])}; leave it out, or see {prog} --help")
    return value


def _said_by_a_check(error: BaseException | None) -> str:
    """Return the sentence of the dataclass's own check, from which an error arose; "" if it arose from none."""
    while error is not None and not isinstance(error, ValueError):
        error = error.__context__
    return str(error or "")


def _checked(args: Sequence[str], kinds: Mapping[str, Any], more: str) -> list[str]:
    """Return the arguments, with a whole number such as 1e6 in digits, as int() reads it.

    Args:
        kinds: the type of each flag.
        more: a sentence that names all flags.

    Raises: ValueError for an unknown flag, one without a value, and a value of the wrong type.
    """
    checked = list(args)
    for i, (word, following) in enumerate(itertools.zip_longest(args, args[1:])):
        typed, equals, value = word.partition("=")
        flag = typed.replace("_", "-")
        if not flag.startswith("--") or flag in ("--", "--help", "--help-all") or flag.startswith("--tyro-"):
            continue
        *inner, last = flag[2:].split(".")
        hint = kinds.get(flag)
        if hint is None and kinds.get(switched_on := "--" + ".".join([*inner, last.removeprefix("no-")])) is bool:
            hint = kinds[switched_on]
        if hint is None:
            near = difflib.get_close_matches(flag, kinds, n=1, cutoff=0.7)
            fix = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"unknown flag {brief(typed)}{fix} {more}")
        value = value if equals else following
        if hint is bool:
            continue
        if value is None or (not equals and value.startswith("--")):
            raise ValueError(f"{typed} needs a value, got {value or 'nothing'}; give it one, or leave the flag out")
        if value == "none" and type(None) in _choices(hint):  # as in a config
            value = "None"
            checked[i if equals else i + 1] = f"{typed}=None" if equals else value
        if int in _choices(hint) and (digits := _in_digits(value)):
            value = digits
            checked[i if equals else i + 1] = f"{typed}={digits}" if equals else digits
        several = not equals and any(get_origin(choice) is tuple for choice in _choices(hint))
        values = itertools.takewhile(lambda v: not v.startswith("--"), args[i + 1 :]) if several else [value]
        for value in values:
            if want := _wanted(value, hint):
                want += " or none" if type(None) in _choices(hint) else ""
                raise ValueError(f"{typed} {brief(value)} is not {want}; change it, or leave the flag out")
    return checked


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the types that a value may have."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _wanted(value: str, hint: Any) -> str:
    """Return in words what a value should be; "" for one that is right, and for types that are checked later."""
    if value == "None" and type(None) in _choices(hint):
        return ""
    for choice in _choices(hint):
        if choice is Path and not value:  # else it would be the current folder
            return "a path"
        if get_origin(choice) is Literal:
            allowed = [str(one) for one in get_args(choice)]
            return "" if value in allowed else f"one of {', '.join(allowed)}"
        if get_origin(choice) is tuple and (one := _wanted(value, get_args(choice)[0])):
            return f"{one} (--flag 1 2 gives two)"
        if choice in (int, float):
            try:
                choice(value)
            except ValueError:
                return "a number" if choice is float else "a whole number"
    return ""


def _in_digits(value: str) -> str:
    """Return "1000000" for 1e6; "" for what is not a whole number or is in digits already."""
    with contextlib.suppress(ValueError, OverflowError):
        return str(int(float(value))) if "e" in value.lower() and float(value).is_integer() else ""
    return ""


def _types(kind: type, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yield the flags of a command with their types, those of inner dataclasses included."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _types(hint, f"{flag}.")
        elif not _is_positional(hint):
            yield flag, hint


def _is_positional(hint: Any) -> bool:
    """Return True for the type of a field that is known by its position."""
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def short_help(kind: type, prog: str, main: Sequence[str] | None = None, default: Any = None) -> str:
    """Return a screen of help: usage, examples, and the main flags as one would type them, each with its default."""
    width = min(shutil.get_terminal_size().columns, 120)
    fields = {path: (flag, said) for path, flag, said in flags(kind, default)}
    shown = [fields[path] for path in main or fields]
    column = max(len(flag) for flag, _ in shown) + 2
    about = (kind.__doc__ or "").partition("\n")[0]
    usage, *examples = calls_of(kind, prog)
    lines = [f"usage: {usage}", *textwrap.wrap(about, width), "", *(f"  {example}" for example in examples), ""]
    for flag, said in shown:
        sentence = said.partition(". ")[0].rstrip(".")
        lines.append(f"  {flag:{column}}{textwrap.shorten(sentence, max(width - column - 2, 10), placeholder='...')}")
    return "\n".join([*lines, f"All {len(fields)} in full: {prog} --help-all"])


def calls_of(kind: type, prog: str) -> list[str]:
    """Return the usage of a command, then its examples: the indented lines of its module's docstring, of its source."""
    said = ast.get_docstring(ast.parse(inspect.getsource(sys.modules[kind.__module__])), clean=False) or ""
    return [line.strip() for line in said.splitlines() if line.startswith(" ")] or [f"{prog} [FLAGS]"]


def flags(kind: type, default: Any = None, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield each field of a command: its path, its flag with the default as one would type it, and its docstring.

    A field that is a dataclass yields its own fields: "train.steps", "--train.steps 1450", "Number of optimizer steps."
    """
    said, hints = field_docstrings(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        value = field.default_factory() if callable(field.default_factory) else field.default
        value = value if default is None else getattr(default, field.name)
        path = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from flags(type(value), value, f"{path}.")
        else:
            typed = path.upper() if _is_positional(hints[field.name]) else _typed(path, value, hints[field.name])
            yield path, typed, said.get(field.name, "")


def field_docstrings(kind: type) -> dict[str, str]:
    """Read from the source the docstring of each field of a dataclass, inherited ones included, as one line."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def _typed(path: str, value: Any, hint: Any) -> str:
    """Return a flag as one would type it: --train.steps 1450; if None, --data.path PATH."""
    flag = "--" + path.replace("_", "-")
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if isinstance(value, bool):
        return f"{flag} (on)" if value else flag
    if value == ():
        return f"{flag} {get_args(hint)[0].__name__.upper()} ..."  # of tuple[str, ...]
    if value is None:
        kind = get_args(hint)[0]  # of int | None, or of Literal["none", "full"] | None
        return f"{flag} {'|'.join(map(str, get_args(kind))) or kind.__name__.upper()}"
    text = str(value)
    return f"{flag} {text}" if text and text.isprintable() else f"{flag} {value!r}"
