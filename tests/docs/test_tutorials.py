"""Each tutorial runs from top to bottom and prints what the page shows."""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from docs.pages import TUTORIALS, Code, differences, missing, read
from docs.tutorials.make_notebook import PAGES as NOTEBOOKS
from docs.tutorials.make_notebook import notebook
from tests.helpers.commands import ROOT, let_prices_be_invented

CHEAP = ("mla", "gate", "v4", "fp8_by_hand", "own_loop")
PAGES = sorted(path for path in TUTORIALS.glob("*.md") if path.name != "README.md")
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
SMALL_TRAIN = "--train.seq-len 32 --train.batch-size 4 --train.eval-tokens 64 --train.sample-tokens 8 --train.threads 1"
SMALL = (
    "--model.dim 32 --model.inter-dim 48 --model.moe-inter-dim 16 --model.n-layers 2 --model.n-routed-experts 8 "
    f"--model.max-seq-len 32 {SMALL_TRAIN}"
)
"""Flags that make a run of a page small. Its steps are divided by 100."""


def smaller(command: str) -> str:
    """Return a command of a page, made small enough for a test. One that sets model.dim is small already.

    Blocks of ```bash long are left out: torchrun's processes import torch for seconds, and tests/distributed runs the
    same layouts.
    """
    command = re.sub(r"\s+#.*", "", command)
    if "--model.dim" in command or "four.toml" in command:
        return command
    if command.startswith("python -m dsmini.diagnose"):
        return f"{re.sub(r' --(rounds|only) .*', '', command)} --rounds 5 --only replay"
    command = re.sub(r"--train\.steps (\d+)", lambda steps: f"--train.steps {int(steps[1]) // 100}", command)
    if command.startswith("python -m dsmini.train") and "--resume" not in command:
        own_model = "--init" in command or (".toml" in command and "configs/" not in command)
        return f"{command} {SMALL_TRAIN if own_model else SMALL}"
    long = command.startswith("python -m dsmini.generate") and "--max-new-tokens" not in command
    return f"{command} --max-new-tokens 4" if long else command


def run_command(command: str) -> None:
    """Run `[NAME=VALUE] python -m MODULE ...` or `python -c CODE` in this process, as its main program."""
    words = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch:
        while "=" in words[0]:  # a variable of the environment
            patch.setenv(*words.pop(0).split("=", 1))
        program, option, what, *arguments = words
        assert program == "python" and option in ("-m", "-c"), command
        if option == "-c":
            exec(compile(what, command, "exec"), {"__name__": "__main__"})
            return
        patch.setattr(sys, "argv", [what, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    assert not stopped.value.code, command


def printed_by(block: Code, page: Path, names: dict[str, Any]) -> str:
    """Run a block and return what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out if block.kind == "bash" else sys.stderr):
        if block.kind == "python":
            # the lines of an error are those of the page
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        else:
            for command in block.commands:
                run_command(smaller(command))
    return out.getvalue()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.stem in CHEAP else pytest.mark.slow, id=page.stem)
        for page in (*PAGES, WALKTHROUGH)
    ],
)
def test_page_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    let_prices_be_invented(monkeypatch)
    for configs in (Path("configs"), Path("docs/tutorials")):
        shutil.copytree(ROOT / configs, tmp_path / configs, ignore=shutil.ignore_patterns("*.png", "*.md"))
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = read(page)
    assert any(block.printed for block in blocks)
    for block in (block for block in blocks if not block.long):
        got = printed_by(block, page, names)
        alike = missing(got, block.printed) if block.kind == "bash" else []
        if block.kind == "python" and block.option != "once":
            alike = differences(got, block.printed, block.option == "about")
        assert alike == [], f"{page.name}, line {block.line + 1}"
    for drawn in tmp_path.glob("*.png"):  # the page shows the picture that its code draws
        assert imread(drawn).shape == imread(TUTORIALS / drawn.name).shape


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_made_from_its_page(name: str) -> None:
    page = TUTORIALS / f"{name}.md"
    stored = json.loads((TUTORIALS / f"{name}.ipynb").read_text())
    assert stored == notebook(page.read_text()), "run: python docs/tutorials/make_notebook.py"
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [("".join(cell["source"]), _shown(cell)) for cell in cells] == [
        (block.code.rstrip("\n"), block.printed) for block in read(page) if block.kind == "python"
    ]


def _shown(cell: dict[str, Any]) -> str:
    return "".join(line for output in cell["outputs"] for line in output["text"])


def test_output_may_differ_in_the_last_digit_and_more_where_the_page_says_about() -> None:
    want = "loss 1.23, -1.2"
    for other, about in (("loss  1.24, -1.2", False), ("loss 1.30, -1.2", True)):
        assert differences(other, want, about) == []
    for other, about in (("loss 1.26, -1.2", False), ("loss 1.53, -1.2", True), ("cost 1.23, -1.2", True)):
        assert differences(other, want, about) != []
    for other in ("loss 1.23, 1.2", f"{want}\ntwo", ""):
        assert differences(other, want, False) != []
    assert differences("by +0.00", "by -0.01") == [], "a sign is part of its number"
