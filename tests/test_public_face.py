"""The public names and signatures are those of public_face.txt: what changes there may break a reader's code.

python -m tests.test_public_face        writes the file again, after a change that CONTRIBUTING.md allows
"""

import difflib
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import pytest

import dsmini

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).with_name("public_face.txt")
MODULES = ("accounting", "config", "inference", "nn", "numerics", "ops")
"""Modules whose names are public one by one; dsmini's own are of the package, wherever they come from."""


def names_of(module: ModuleType) -> list[str]:
    """Return a module's __all__, or else the names that it defines."""
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
        and not isinstance(value, TypeVar | ParamSpec)
    ]
    return sorted(getattr(module, "__all__", defined))


def lines_of(path: str, value: Any) -> Iterator[str]:
    """Yield a line for a name, and for each public method and property of a class that dsmini defines."""
    if isinstance(value, ModuleType) or not callable(value):
        yield path
        return
    yield f"{path}{signature(value)}"
    if not inspect.isclass(value):
        return
    members = {name: member for cls in reversed(value.__mro__) if _is_ours(cls) for name, member in vars(cls).items()}
    for name, member in sorted(members.items()):
        if name.startswith("_"):
            continue
        found = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(found):
            yield f"{path}.{name}{signature(found)}"
        elif isinstance(found, property):
            yield f"{path}.{name}"


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "dsmini"


def signature(value: Any) -> str:
    """Return the names, kinds and defaults of parameters. Types are pyright's, as their text differs by Python."""
    try:
        found = inspect.signature(value)
    except ValueError:  # an exception or a type of C
        return "(...)"
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def public_face() -> list[str]:
    """Return a line for each public name."""
    lines = [line for name in dir(dsmini) for line in lines_of(f"dsmini.{name}", getattr(dsmini, name))]
    for home in MODULES:
        module = importlib.import_module(f"dsmini.{home}")
        shown = [name for name in names_of(module) if getattr(dsmini, name, None) is not getattr(module, name)]
        lines += [line for name in shown for line in lines_of(f"dsmini.{home}.{name}", getattr(module, name))]
    return lines


def test_public_names_and_signatures_are_those_that_were_promised() -> None:
    changed = [
        line
        for line in difflib.unified_diff(STORED.read_text().splitlines(), public_face(), n=0, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert changed == [], "the public face changed; if CONTRIBUTING.md allows it: python -m tests.test_public_face"


# an installed dsmini is found from any folder, also from one that holds a clone of the repository


@pytest.mark.parametrize("package", ["dsmini", "dsmini_kernels"])
def test_import_next_to_the_clone_finds_the_package(tmp_path: Path, package: str) -> None:
    """The clone is a folder named dsmini without an __init__.py: a namespace package, if nothing better is found."""
    (tmp_path / "dsmini").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "dsmini_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
    code = f"import {package}; print({package}.__file__)"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert Path(done.stdout.strip()).name == "__init__.py", done.stderr or done.stdout


def test_version_is_that_of_the_package_and_the_citation() -> None:
    assert dsmini.__version__ == metadata.version("dsmini")
    assert f"\nversion: {dsmini.__version__}\n" in (ROOT / "CITATION.cff").read_text()


if __name__ == "__main__":
    STORED.write_text("\n".join(public_face()) + "\n")
