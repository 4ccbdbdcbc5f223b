"""The tutorials as a test reads them: blocks of code, and what each of them is said to print."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import ROOT

TUTORIALS = ROOT / "docs" / "tutorials"
FENCE = re.compile(r"^```(\w+)( \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Code:
    """A block of code on a page."""

    kind: str
    """Language of the block: python or bash."""
    code: str
    line: int
    """Number of lines before the code on its page."""
    printed: str
    """The text block that follows before any other code; empty if there is none, or it is ```text once: a model's own
    words, and figures of one machine."""
    about: bool
    """True for a block ```text about: its numbers hold within ABOUT, as those of a training run."""


def read(page: Path) -> list[Code]:
    """Return the blocks of python and bash of a page, in order."""
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        kind, option, body = match.group(1), (match.group(2) or "").strip(), match.group(3)
        if kind in ("python", "bash"):
            found.append(Code(kind, body, text.count("\n", 0, match.start(3)), "", False))
        elif kind == "text" and found and option != "once":
            last = found[-1]
            assert not last.printed, f"{page.name}: two blocks of output after line {last.line}"
            found[-1] = Code(last.kind, last.code, last.line, body, option == "about")
    return found


ABOUT = 0.1
"""Share of the largest number in a line by which its numbers may differ, for a training run: CPUs round differently."""


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
