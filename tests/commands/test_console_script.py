"""What all commands share: `dsmini COMMAND`, quick imports, printable words, one word after Ctrl-C; and explain."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
import tyro
from rich.console import Console

import dsmini
from dsmini.__main__ import COMMANDS, main
from dsmini.console.command import outcome_of
from dsmini.console.commandline import flags, parse
from dsmini.console.messages import printable, say
from tests.conftest import SMALL
from tests.helpers.commands import ROOT, run_all, run_apart
from tests.helpers.corpora import lay_out

BAD = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "zzz": f"unknown command 'zzz'; there are {', '.join(COMMANDS)}",
}
HOSTILE = "name\x1b[31m\x07\x9b2J\r\u202e\x7f"
SHOWN = "name␛[31m␇\ufffd2J␍\ufffd␡"
HEAVY = ("torch", "matplotlib", "tokenizers", "jinja2", "safetensors")
PLAN = f"dsmini.plan {ROOT / 'configs' / 'deepseek-v3.toml'} --json"
# command lines that load none of them; a plan may load jinja2
LIGHT = ["dsmini --help", *(f"dsmini.{name} --help" for name in COMMANDS), PLAN]
PROGRAM = """
import contextlib, io, json, runpy, sys
import dsmini
loaded = {"import dsmini": sorted(set(sys.modules) & set(HEAVY))}
for line in LIGHT:
    module, *sys.argv[1:] = line.split()
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ("usage" if line.endswith("--help") else '"fits": true') in said.getvalue(), line
    loaded[line] = sorted(set(sys.modules) & set(HEAVY))
print(json.dumps(loaded))
"""


def test_script_lists_the_commands_and_runs_them(tmp_path: Path) -> None:
    asked = ["--help", "-h", "", "--version", *BAD, *(f"{name} --help" for name in COMMANDS)]
    alone = [(f"dsmini.{name}", "--help") for name in COMMANDS]
    function = dsmini.generate
    answers = run_all([*(("dsmini", arguments) for arguments in asked), *alone], tmp_path)
    said = dict(zip(asked, answers, strict=False))
    assert said["--help"] == said["-h"] == (0, said[""][1]) and said[""][0] == 2
    lines = said["--help"][1].splitlines()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert 20 < len(line) <= 120
    assert said["--version"] == (0, f"dsmini {dsmini.__version__}\n")
    for arguments, sentence in BAD.items():
        assert said[arguments] == (2, f"error: {sentence}\n")
    assert answers[-2 * len(COMMANDS) : -len(COMMANDS)] == answers[-len(COMMANDS) :]
    assert dsmini.generate is function, "the command of that name does not replace it"


def test_no_help_speaks_of_python(tmp_path: Path) -> None:
    for status, said in run_all([(f"dsmini.{name}", "--help-all") for name in COMMANDS if name != "explain"], tmp_path):
        assert status == 0 and "Raises" not in said and "ValueError" not in said


def test_every_help_is_a_screen_in_the_words_of_a_reader(tmp_path: Path) -> None:
    for status, said in run_all([(f"dsmini.{name}", "--help") for name in COMMANDS], tmp_path):
        assert status == 0 and "{None}" not in said and re.search(r"All \d+ in full: .* --help-all\n$", said)
        assert [line for line in said.splitlines() if line != line.rstrip()] == []


def test_help_names_what_a_flag_of_several_values_takes() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Command:
        """Try."""

        python: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
        """Another Python."""

    assert [typed for _, typed, _ in flags(Command)] == ["--python PATH ..."]


def test_flags_leave_a_value_out_by_the_word_of_configs() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Command:
        """Try."""

        threads: int | None = 3
        """Number of threads."""
        rate: float | None = 0.5
        """Rate."""

    for words in (["--threads", "none", "--rate=none"], ["--threads=None", "--rate", "None"]):
        assert parse(Command, "try", words, default=Command()) == Command(threads=None, rate=None)


def test_script_is_installed_as_dsmini() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["dsmini"].partition(":")
    assert list(scripts) == ["dsmini"] and getattr(importlib.import_module(module), name) is main


def test_explain_command_prints_a_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMINI_BACKEND", "eager")
    (status, table), (status_json, line) = run_all([("dsmini.explain", ""), ("dsmini.explain", "--json")], tmp_path)
    assert status == status_json == 0
    assert "DSMINI_BACKEND: eager; forced here: eager" in table and "\nlinear " in table and "\nmuon_update " in table
    said = json.loads(line.splitlines()[-1])
    assert said.keys() >= {"quantize", "linear", "blocks_step", "muon_update", "topk_attention"}
    assert said["experts"] == {"backend": "eager", "why": "forced"}
    assert said["quantize"] == {"backend": "reference", "why": "no eager version"}


@pytest.mark.parametrize(
    ("command", "module"), [("plan --help", "tyro.py"), ("train", "dsmini_kernels/cpu/__init__.py")]
)
def test_ctrl_c_at_the_start_is_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    """A module of the name of the first or of a late import of the command sends the signal. Before, Python answers."""
    lay_out(tmp_path, {"dsmini_kernels/__init__.py": b"", module: b"import os\nos.kill(os.getpid(), 2)\n"})
    monkeypatch.setenv("EXTRA_PATH", str(tmp_path))
    monkeypatch.setenv("DSMINI_BACKEND", "cpu")
    done = run_apart(f"dsmini.{command}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


# words that are not ours reach no terminal as they are


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


# what a command says of an error that is not the user's


def test_only_what_does_not_fit_is_too_large_for_this_machine() -> None:
    for size in ((1 << 52,), (1 << 40, 1 << 40)):
        with pytest.raises(RuntimeError) as met:
            torch.empty(size)
        assert outcome_of(met.value)[0].startswith("too large for this machine: ")  # pyright: ignore[reportOptionalMemberAccess]
    for words in (
        *("CUDA out of memory. Tried to allocate 2.00 GiB.", "MPS backend out of memory (MPS allocated: 8 GB)"),
        *("CUDA error: out of memory", "not enough memory: you tried to allocate 8 bytes"),
    ):
        assert "too large" in (outcome_of(RuntimeError(words))[0] or ""), words
    for words in (
        *("CUDA error: an illegal memory access was encountered", "CUDA error: misaligned address"),
        *("pin_memory needs a CUDA device", "Expected a tensor in contiguous memory format"),
    ):
        assert outcome_of(RuntimeError(words)) == (None, 1), words


# heavy libraries are loaded where they are used


def printed_by(program: str) -> str:
    """Return what a program prints in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_plans_load_no_heavy_library() -> None:
    loaded = json.loads(printed_by(f"HEAVY, LIGHT = {HEAVY!r}, {LIGHT!r}\n{PROGRAM}"))
    assert set(loaded.pop(PLAN)) <= {"jinja2"}, "importing torch alone takes longer than a plan may"
    assert loaded == {line: [] for line in ["import dsmini", *LIGHT[:-1]]}


def test_layers_and_loading_load_no_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes longer to import than all of dsmini."""
    dsmini.save_pretrained(dsmini.Transformer(**SMALL), tmp_path / "m")
    code = f"import sys, dsmini; dsmini.generate, dsmini.load_pretrained({str(tmp_path / 'm')!r})"
    assert printed_by(f"{code}; print('torch._dynamo' in sys.modules)") == "False\n"
