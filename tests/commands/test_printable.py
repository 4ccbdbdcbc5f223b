"""Text that is not ours reaches no terminal as it is."""

import subprocess
import sys

import pytest
from rich.console import Console

from dsmini.console.messages import printable, say

HOSTILE = "name\x1b[31m\x07\x9b2J\r\u202e\x7f"
SHOWN = "name␛[31m␇\ufffd2J␍\ufffd␡"


def test_control_characters_become_pictures() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("a line\n\tand é 日本 🙂 \u200f") == "a line\n\tand é 日本 🙂 \u200f"


def test_lines_errors_and_warnings_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]12 :smile: " + "x" * 300
    say(Console(width=200), text + HOSTILE)
    assert capsys.readouterr().out == text + SHOWN + "\n"
    program = (
        "import warnings; from dsmini.console.command import run\n"
        "def main(args):\n    warnings.warn(args[0])\n    raise ValueError(args[0])\n"
        "run(main)"
    )
    done = subprocess.run([sys.executable, "-c", program, HOSTILE], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"warning: {SHOWN}\nerror: {SHOWN}\n"
    assert "\x1b" not in done.stderr
