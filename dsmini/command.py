"""What all commands share: how a command line is read, and how a user's mistake ends."""

import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

C = TypeVar("C")


def take_file(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A leading FILE.toml of a command line, and the rest."""
    if args and not args[0].startswith("-"):
        return Path(args[0]), list(args[1:])
    return None, list(args)


def parse(kind: type[C], name: str, args: Sequence[str], default: C | None = None) -> C:
    """Read the arguments into a dataclass; a wrong one is explained and ends with status 2.

    Args:
        name: of the command module, as in python -m dsmini.NAME.
    """
    prog = f"python -m dsmini.{name}"
    if default is None:
        return tyro.cli(kind, prog=prog, args=args)
    return tyro.cli(kind, prog=prog, args=args, default=default)


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
