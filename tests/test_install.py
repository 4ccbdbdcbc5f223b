"""An installed dsmini is found from any folder, also from one that holds a clone of the repository."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import dsmini

ROOT = Path(__file__).parent.parent


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
