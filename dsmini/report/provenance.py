"""Where figures come from: the commit, the sources, the versions, the command."""

import contextlib
import hashlib
import platform
import shlex
import subprocess
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dsmini import ops

ROOT = Path(__file__).parents[2]
MEASURED = ("dsmini", "kernels", "benchmarks", "configs")
SHOWN = ("benchmarks/__main__.py", "benchmarks/runner.py", "benchmarks/session.py", "dsmini/report/")
"""Sources that show figures and change none."""


def commit() -> str | None:
    """The checkout's commit, "-dirty" behind it where files differ from it; None without git."""
    head = _git("rev-parse", "HEAD")
    return head and head + ("-dirty" if _git("status", "--porcelain") else "")


def code() -> str:
    """A hash of all sources that are measured or that measure."""
    found = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            shows = str(path.relative_to(ROOT)).startswith(SHOWN)
            if path.suffix in (".py", ".cpp", ".h", ".toml") and not shows:
                found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = {"dsmini": project["version"], "torch": torch.__version__, "python": platform.python_version()}
    for package in ("transformers", "llama_cpp_python", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"kernels": ops.serving("cpu")}


def command(args: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "benchmarks", *args])


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
