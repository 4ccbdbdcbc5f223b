"""dsmini: the commands in one place. `dsmini train ...` is the same as `python -m dsmini.train ...`."""

import ast
import difflib
import importlib
import io
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Union

from dsmini.console.command import run
from dsmini.distributed.meeting import tell

COMMANDS = ("train", "generate", "tokenize", "convert", "explain", "plan", "diagnose")
SHELLS = ("bash", "zsh", "fish")
"""Shells for which tyro writes completions on its own."""


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
    if args[0].startswith("--tyro-"):
        return _complete(args)
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
            "Completion in bash, and likewise in zsh and fish: dsmini --tyro-write-completion bash FILE; source FILE",
        ]
    )


def _about(name: str) -> str:
    """Return the description of a command: the first line of its module, without its name."""
    said = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")))
    return (said or "").partition("\n")[0].partition(": ")[2]


def _complete(args: Sequence[str]) -> int:
    """Write or print the completion of all commands for a shell, by the flags that tyro has for it."""
    flag, *rest = args
    want = {"--tyro-write-completion": 2, "--tyro-print-completion": 1}.get(flag)
    if want != len(rest) or rest[0] not in SHELLS:
        raise ValueError(
            f"'{' '.join(args)}' is not complete; use dsmini --tyro-write-completion SHELL FILE, where SHELL is "
            f"one of {', '.join(SHELLS)}"
        )
    script = _completion(rest[0])
    if want == 1:
        print(script)
    else:
        Path(rest[1]).write_text(script, encoding="utf-8")
    return 0


def _completion(shell: str) -> str:
    """Return tyro's completion script, with descriptions of one line each.

    A shell takes each line that the script prints for a candidate, so a line break in a description would offer words.
    """
    import tyro

    kinds = [
        Annotated[
            getattr(importlib.import_module(f"dsmini.{name}"), f"{name.capitalize()}Command"),
            tyro.conf.subcommand(name=name, description=_about(name)),
        ]
        for name in COMMANDS
    ]
    every: Any = Union[tuple(kinds)]  # noqa: UP007
    with redirect_stdout(io.StringIO()) as out:
        try:
            tyro.cli(every, prog="dsmini", args=["--tyro-print-completion", shell])
        except SystemExit as stop:
            if stop.code:
                raise
    lines = out.getvalue().rstrip("\n").split("\n")
    return "\n".join(line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC = ") else line for line in lines)


if __name__ == "__main__":
    main()
