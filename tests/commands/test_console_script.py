"""`dsmini COMMAND` next to `python -m dsmini.COMMAND`."""

import importlib
import tomllib
from pathlib import Path

import dsmini
from dsmini.__main__ import COMMANDS, main
from tests.helpers.commands import ROOT, run_all

BAD = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "zzz": f"unknown command 'zzz'; there are {', '.join(COMMANDS)}",
}


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


def test_script_is_installed_as_dsmini() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["dsmini"].partition(":")
    assert list(scripts) == ["dsmini"] and getattr(importlib.import_module(module), name) is main
