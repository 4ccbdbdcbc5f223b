"""What all commands share: how a command line is read, and how a user's mistake ends."""

import ast
import dataclasses
import inspect
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Help:
    """What --help shows of a command that has more flags than a screen has lines; --help-all shows them all."""

    usage: str
    """What follows python -m dsmini.NAME."""
    examples: tuple[str, ...]
    """Command lines behind python -m dsmini.NAME; a comment may follow."""
    main: tuple[str, ...]
    """The fields to list, such as "train.steps"; what is said of them is read from the dataclasses."""


def take_file(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A leading FILE.toml of a command line, and the rest."""
    if args and not args[0].startswith("-"):
        return Path(args[0]), list(args[1:])
    return None, list(args)


def parse(kind: type[C], name: str, args: Sequence[str], default: C | None = None, help: Help | None = None) -> C:
    """Read the arguments into a dataclass; a wrong one is explained and ends with status 2.

    Args:
        name: of the command module, as in python -m dsmini.NAME.
        default: what the flags change; left out: the dataclass's own defaults.
        help: a screen of it, for --help; left out: --help explains every flag, as --help-all does.
    """
    prog = f"python -m dsmini.{name}"
    if help is not None and {"-h", "--help"} & set(args):
        print(short_help(kind, prog, help, default))
        sys.exit(0)
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        return tyro.cli(kind, prog=prog, args=["--help" if arg == "--help-all" else arg for arg in args], **options)
    except SystemExit as stop:
        if stop.code and help is not None:  # tyro names --help alone
            print(f"Every flag: {prog} --help-all", file=sys.stderr)
        raise


def short_help(kind: type, prog: str, help: Help, default: Any = None, width: int | None = None) -> str:
    """A screen of help: usage, examples, and the main flags as one would type them, each with its default.

    Args:
        width: in columns; left out: the terminal's.
    """
    width = width or min(shutil.get_terminal_size().columns, 120)
    fields = {path: (flag, said) for path, flag, said in flags(kind, default)}
    shown = [fields[path] for path in help.main]
    column = max(len(flag) for flag, _ in shown) + 2
    about = (kind.__doc__ or "").partition("\n")[0]
    lines = [f"usage: {prog} {help.usage}", *textwrap.wrap(about, width), ""]
    lines += [f"  {prog} {example}".rstrip() for example in help.examples] + [""]
    lines += [f"  {flag:{column}}{_clipped(said, width - column - 2)}" for flag, said in shown]
    return "\n".join([*lines, f"All {len(fields)} in full: {prog} --help-all"])


def flags(kind: type, default: Any = None, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Each field of a command: its path, its flag with the default as one would type it, and its docstring.

    Fields that are dataclasses are entered: "train.steps", "--train.steps 1600", "Number of optimizer steps."
    """
    said, hints = field_docstrings(kind), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name) if default is not None else _default(field)
        path = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from flags(type(value), value, f"{path}.")
        else:
            yield path, _typed(path, value, hints[field.name]), said.get(field.name, "")


def field_docstrings(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, those it inherits included, on one line. Read from the source."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _typed(path: str, value: Any, hint: Any) -> str:
    """A field as one would type it: --train.steps 1600; off, --data.path PATH; an argument known by its place, RUN."""
    flag = "--" + path.replace("_", "-")
    if value is dataclasses.MISSING:
        return path.upper()
    if isinstance(value, bool):
        return f"{flag} (on)" if value else flag
    if value == ():
        return f"{flag} {get_args(hint)[0].__name__.upper()} ..."  # of tuple[str, ...]
    if value is None:
        return f"{flag} {get_args(hint)[0].__name__.upper()}"  # of int | None
    text = str(value)
    return f"{flag} {text}" if text and text.isprintable() else f"{flag} {value!r}"


def _clipped(text: str, width: int) -> str:
    """What fits of the first sentence: whole clauses if that is half a line or more, else words."""
    first = text.partition(". ")[0].rstrip(".")
    if len(first) <= width:
        return first
    clause = max(first.rfind(mark, 0, width + 1) for mark in ("; ", ", "))
    return first[:clause] if clause >= width // 2 else textwrap.shorten(first, max(width, 10), placeholder="...")


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command's main and exit with its status. What the user got wrong: one sentence, status 2."""
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        status = main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except ArithmeticError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stderr.close()
        status = 1
    except OSError as error:
        print(f"error: {error}; free some space or choose another folder; what was saved is untouched", file=sys.stderr)
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|alloc|overflow", str(error)):
            raise
        first = (str(error).splitlines() or ["no memory is left"])[0]
        print(f"error: too large for this machine: {first}; use a smaller model or batch", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)
