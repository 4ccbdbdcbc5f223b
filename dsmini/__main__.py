"""dsmini: the commands in one place. `dsmini train ...` is the same as `python -m dsmini.train ...`."""

import ast
import difflib
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from dsmini.console.command import run
from dsmini.distributed.failure import tell

COMMANDS = (
    *("train", "generate", "compare", "tokenize", "convert", "vectors"),
    *("explain", "plan", "diagnose", "selfcheck"),
)


def main() -> None:
    """Run the console script."""
    run(_main, tell)


def _main(args: Sequence[str]) -> int:
    """Run the command that is named first, or print help; return the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"dsmini {importlib.import_module('dsmini').__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command '{name}'; {fix}")
    sys.argv = [name, *rest]
    # as a program, as python -m does
    runpy.run_module(f"dsmini.{name}", run_name="__main__", alter_sys=True)
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: dsmini COMMAND [FLAGS]",
            "",
            *(f"  {name:{width}}{_about(name)}" for name in COMMANDS),
            "",
            "Flags of a command: dsmini COMMAND --help; the version: dsmini --version",
        ]
    )


def _about(name: str) -> str:
    """Return the description of a command: the first line of its module, without its name."""
    said = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")))
    return (said or "").partition("\n")[0].partition(": ")[2]


if __name__ == "__main__":
    main()
