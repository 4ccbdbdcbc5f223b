"""Run pages as they are written: python docs/pages.py [PAGE ...] [--record] [--fresh]

Each page runs from top to bottom in a copy of the clone. A line says how long that took, next to the time that the page
names; others say where it printed something else. Without PAGE: README, the walkthrough and all tutorials.

    --record    write what is printed now into the page
    --fresh     in a new environment, which README's pip commands fill, or one of '.[bpe]' without README; else pip
                commands are left out

Code in ```bash and ```python runs, and so does ```bash long, which no test runs. A block that follows is its output:

    ```text         words are equal, and numbers up to the last digit; of commands other lines may lie between
    ```text about   numbers are within a tenth: a training run's
    ```text once    numbers of one machine, or a model's own words: recorded, not compared

A comment before the output of commands may choose from it:

    <!-- lines: validation|cache -->    lines in which this pattern is found
    <!-- bars: tokens/s -->             a bar for each command, named by its comment: the best of three such numbers
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(
    r"^```(?P<kind>\w+)(?: (?P<option>\w+))?\n(?P<body>.*?)^```$|^<!-- (?P<how>lines|bars): (?P<what>.*?) -->$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
OPTIONS = ("", "about", "once")
"""Of a block of text that is output."""
ABOUT = 0.1
"""Share of the largest number in a line by which its numbers may differ, for a training run: CPUs round differently."""
LONGEST_BAR, COLUMNS = 40, 140
"""Widths of the longest bar and of the terminal, in characters."""
NOT_COPIED = (
    *(".git", "runs", "results", "comparisons", "site", "api"),
    *(".venv", "__pycache__", ".*_cache", "corpus-cache"),
)


@dataclass
class Code:
    """A block of code on a page."""

    kind: str
    """python or bash."""
    code: str
    line: int
    """Number of lines before the code on its page."""
    long: bool
    printed: str = ""
    """The block of text that follows before any other code; "" without one, and for ```text once."""
    option: str = ""
    """Of the text: about, once or ""."""
    how: str = ""
    """How the output is chosen: lines, bars or ""."""
    what: str = ""
    """Pattern of lines, or unit of bars."""
    output: tuple[int, int] | None = None
    """Begin and end of the output in the text of the page, without its fences."""

    @property
    def commands(self) -> list[str]:
        return self.code.replace("\\\n", " ").strip().splitlines()


def read(page: Path) -> list[Code]:
    """Return the blocks of python and bash of a page, in order.

    Raises: ValueError for two outputs of one block.
    """
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        kind, option = match["kind"], match["option"] or ""
        if kind in ("python", "bash"):
            line = text.count("\n", 0, match.start("body"))
            found.append(Code(kind, match["body"], line, long=option == "long"))
        elif kind is None and found:
            found[-1].how, found[-1].what = match["how"], match["what"]
        elif kind == "text" and found and option in OPTIONS:
            if found[-1].output:
                raise ValueError(f"{page.name}: two blocks of output after line {found[-1].line}; remove one")
            found[-1].option, found[-1].output = option, match.span("body")
            found[-1].printed = "" if option == "once" else match["body"]
    return found


def differences(got: str, want: str, about: bool = False) -> list[str]:
    """Compare output with what a page shows, line by line: words are equal, numbers agree.

    A number with a decimal point may be off by one in its last digit. Spaces do not count.
    """
    lines = got.splitlines(), want.splitlines()
    wrong = [f"{len(lines[0])} lines, the page has {len(lines[1])}"] if len(lines[0]) != len(lines[1]) else []
    for got_line, want_line in zip(*lines, strict=False):
        if shape(got_line) != shape(want_line) or not _near(got_line, want_line, about):
            wrong.append(f"printed {got_line!r}, the page has {want_line!r}")
    return wrong


def missing(got: str, want: str) -> list[str]:
    """Return the lines of a page that commands did not print, whatever their numbers and the time left."""
    got, want = (re.sub(r" +[\d:]+ left$", "", text, flags=re.MULTILINE) for text in (got, want))
    shapes = set(map(shape, got.splitlines()))
    return [f"did not print {line!r}" for line in want.splitlines() if line.strip() and shape(line) not in shapes]


def shape(line: str) -> str:
    """Return a line with # for each number and single spaces."""
    return " ".join(NUMBER.sub("#", line).split())


def _near(got: str, want: str, about: bool) -> bool:
    numbers = [float(number.replace(",", "")) for number in NUMBER.findall(want)]
    share = ABOUT * max(map(abs, numbers), default=0) if about else 0
    pairs = zip(NUMBER.findall(got), NUMBER.findall(want), numbers, strict=True)
    return all(abs(float(a.replace(",", "")) - value) <= max(share, _unit(b)) * 1.001 for a, b, value in pairs)


def _unit(number: str) -> float:
    """Return the weight of the last digit of a number with a decimal point, and 0 for a whole number."""
    mantissa, _, exponent = number.partition("e")
    if "." not in mantissa and not exponent:
        return 0.0
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def printed_by(command: str, folder: Path, pip: bool) -> str:
    """Run a command and return what it prints on both streams.

    Args:
        pip: True runs the dsmini that pip installed, False that of the folder.

    Raises: RuntimeError if it fails.
    """
    print(f"$ {command}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    env = os.environ | {"COLUMNS": str(COLUMNS)}
    if not pip:
        env["PYTHONPATH"] = os.pathsep.join((str(folder), str(folder / "kernels")))
    how: dict[str, Any] = {"shell": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, env=env, executable="/bin/bash", **how)
    print(f"  {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with status {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def chosen(block: Code, outputs: dict[str, str]) -> str:
    """Return of the outputs of a block's commands what its page shows."""
    lines = "".join(outputs.values()).splitlines()
    if block.how == "bars":
        lines = bars({command.partition("# ")[2]: text for command, text in outputs.items()}, block.what)
    elif block.how == "lines":
        lines = [line for line in lines if re.search(block.what, line)]
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def bars(outputs: dict[str, str], unit: str) -> list[str]:
    """Return a line with a bar for each output by its name: the largest number before the unit."""
    found = {name: re.findall(rf"([\d.,]+) {re.escape(unit)}", text) for name, text in outputs.items()}
    values = {name: max(float(number.replace(",", "")) for number in numbers) for name, numbers in found.items()}
    longest, width = max(values.values()), max(map(len, values))
    drawn = {name: "█" * max(1, round(LONGEST_BAR * value / longest)) for name, value in values.items()}
    return [f"{name:{width}}  {bar:{LONGEST_BAR}}  {values[name]:>6,.0f} {unit}" for name, bar in drawn.items()]


def run_block(block: Code, page: Path, folder: Path, names: dict[str, Any], pip: bool) -> str:
    """Run a block in a folder and return its output, as the page would show it.

    Args:
        names: variables of the page's Python so far.
        pip: True runs pip commands too.
    """
    if block.kind == "bash":
        commands = [line if pip else re.sub(r"^pip install [^&]*(&& )?", "", line) for line in block.commands]
        commands = [line for line in commands if line and not line.startswith("#")]
        outputs = dict.fromkeys(commands, "")
        for command in commands * (3 if block.how == "bars" else 1):  # in turns: others use the machine too
            outputs[command] += printed_by(command, folder, pip)
        if pip:
            site.addsitedir(sysconfig.get_path("purelib"))  # python code that follows imports what pip installed
        return chosen(block, outputs)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(folder):
        # the lines of an error are those of the page
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
    return out.getvalue()


def run_page(page: Path, folder: Path, record: bool, pip: bool) -> list[str]:
    """Run a page in a copy of the clone and return what it printed otherwise; record writes that into the page."""
    wrong: list[str] = []
    names: dict[str, Any] = {"__name__": page.stem}
    for i, block in enumerate(read(page)):
        place = f"line {block.line + 1}"
        try:
            got = run_block(block, page, folder, names, pip)
        except Exception as error:
            wrong.append(f"{place}: {error if isinstance(error, RuntimeError) else traceback.format_exc()}")
            continue
        if record and (output := read(page)[i].output):  # at once: an interrupt loses one block
            text = page.read_text()
            page.write_text(text[: output[0]] + got + text[output[1] :])
        elif block.kind == "bash":
            wrong += [f"{place}: {line}" for line in missing(got, block.printed)]
        elif block.printed:
            wrong += [f"{place}: {line}" for line in differences(got, block.printed, block.option == "about")]
    return wrong


def main() -> int:
    """Run pages, print the table, and return 1 if one failed."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", metavar="PAGE", nargs="*", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--pip", action="store_true", help=argparse.SUPPRESS)  # in the environment of --fresh
    args = parser.parse_args()
    tutorials = [page for page in sorted(TUTORIALS.glob("*.md")) if page.name != "README.md"]
    pages = args.pages or [ROOT / "README.md", ROOT / "docs" / "walkthrough.md", *tutorials]
    if gone := [str(page) for page in pages if not page.is_file()]:
        parser.error(f"there is no page {', '.join(gone)}")
    failed = 0
    with tempfile.TemporaryDirectory() as top:
        if args.fresh:
            venv.create(f"{top}/venv", with_pip=True)
            env = os.environ | {"PATH": f"{top}/venv/bin{os.pathsep}{os.environ['PATH']}"}
            if ROOT / "README.md" not in map(Path.resolve, pages):  # whose commands install more
                subprocess.run([f"{top}/venv/bin/pip", "install", "-q", f"{ROOT}[bpe]"], check=True)
            flags = ["--pip", *(["--record"] if args.record else [])]
            return subprocess.run([f"{top}/venv/bin/python", __file__, *flags, *map(str, pages)], env=env).returncode
        if not args.pip:
            sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
        for page in map(Path.resolve, pages):
            folder = Path(top) / page.stem
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
            begun = time.monotonic()
            wrong = run_page(page, folder, args.record, args.pip)
            named = re.search(r"^\*(\d+) minutes", page.read_text(), re.MULTILINE)
            limit = f", of {named[1]} that it names" if named else ""
            print(f"{page.name}: {(time.monotonic() - begun) / 60:.1f} minutes{limit}", flush=True)
            print("".join(f"  {line}\n" for line in wrong), end="", flush=True)
            failed += bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
