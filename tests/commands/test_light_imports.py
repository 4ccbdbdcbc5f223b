"""Heavy libraries are loaded where they are used: the package, its help and its completion are quick."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dsmini
from dsmini.__main__ import COMMANDS
from tests.conftest import SMALL
from tests.helpers.commands import ROOT

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


def test_help_and_plans_load_no_heavy_library() -> None:
    code = f"HEAVY, LIGHT = {HEAVY!r}, {LIGHT!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert set(loaded.pop(PLAN)) <= {"jinja2"}, "importing torch alone takes longer than a plan may"
    assert loaded == {line: [] for line in ["import dsmini", *LIGHT[:-1]]}


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(dsmini.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {
        node.module: {alias.name for alias in node.names} for node in block.body if isinstance(node, ast.ImportFrom)
    }
    packages = seen.pop("dsmini")
    assert seen == {home: set(names) for home, names in dsmini.HOMES.items()}
    assert packages <= set(dsmini.PACKAGES)
    assert set(dsmini.__all__) == {"__version__"} | packages | {name for names in seen.values() for name in names}
    assert set(dsmini.__all__) <= set(dir(dsmini))


def test_unknown_name_of_the_package_raises() -> None:
    with pytest.raises(AttributeError, match="module 'dsmini' has no attribute 'Nothing'"):
        _ = dsmini.Nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_function_generate_survives_the_import_of_its_command() -> None:
    command = importlib.import_module("dsmini.generate")
    assert isinstance(command, ModuleType) and callable(command.main)
    assert dsmini.generate is importlib.import_module("dsmini.inference").generate


def test_layers_and_loading_load_no_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes longer to import than all of dsmini."""
    dsmini.save_pretrained(dsmini.Transformer(**SMALL), tmp_path / "m")
    code = f"import sys, dsmini; dsmini.generate, dsmini.load_pretrained({str(tmp_path / 'm')!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch._dynamo' in sys.modules)"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "False", done.stdout + done.stderr
