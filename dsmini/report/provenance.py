"""Provenance of figures: the command, the commit, the sources, the versions, the machine."""

import contextlib
import hashlib
import json
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from dsmini.report.units import plural

ROOT = Path(__file__).parents[2]
"""The checkout; of an installed package, the folder that it is in."""
MEASURED = ("dsmini", "kernels", "benchmarks", "configs")
INSTALLED = ("dsmini", "dsmini_kernels")
SHOWING = ("__main__", "command_line", "runner", "session", "display", "answers", "clock")
SHOWN = (*(f"benchmarks/{name}.py" for name in SHOWING), "dsmini/report/")
"""Sources that show figures and change none."""
PACKAGES = ("transformers", "llama_cpp_python", "triton")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of a command that measures."""

    date: str
    command: str
    commit: str | None
    """Commit of the checkout, with "-dirty" where files differ from it. None without git or a checkout."""
    code: str
    """Hash of the sources that are measured and that measure."""
    versions: Mapping[str, str]
    quick: bool
    device: str
    dtype: str
    threads: int
    machine: Mapping[str, str]
    plan: Mapping[str, Sequence[str]]
    """Keys of the cases of each question, those that were done before included."""
    fresh: bool = False
    """Cases of these questions that were done before do not count."""
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Reason for each case that takes too long here, by question and key."""

    @property
    def fingerprint(self) -> str:
        """Hash of what a figure depends on. A commit that changes the documentation alone changes no figure."""
        parts = [self.code, self.versions, self.quick, self.device, self.dtype, self.threads, self.machine]
        text = json.dumps([dict(p) if isinstance(p, Mapping) else p for p in parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def short_commit(self) -> str:
        """Twelve digits of the commit, or "unknown"."""
        commit = self.commit or "unknown"
        return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")

    @property
    def setting(self) -> str:
        """Setting in a few words: bfloat16 on cpu, 2 threads, quick."""
        return f"{self.dtype} on {self.device}, {plural(self.threads, 'thread')}, {'quick' if self.quick else 'full'}"

    def facts(self) -> dict[str, str]:
        """Return the run in names and values."""
        device = f"{self.device}, {plural(self.threads, 'thread')}"
        facts = {"date": self.date[:16].replace("T", " "), "commit": self.short_commit, "device": device}
        return facts | {"dtype": self.dtype, "sizes": "quick" if self.quick else "full"} | dict(self.versions)


def commit() -> str | None:
    """Return the checkout's commit, with "-dirty" where files differ from it. None without git or a checkout."""
    if not _is_checkout():
        return None
    head = _git("rev-parse", "HEAD")
    return head and head + ("-dirty" if _git("status", "--porcelain") else "")


def code() -> str:
    """Return a hash of all sources that are measured or that measure: the checkout's, or the installed package's."""
    found = hashlib.sha256()
    for folder in MEASURED if _is_checkout() else INSTALLED:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".cpp", ".h", ".toml") and not name.startswith(SHOWN):
                found.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions of dsmini, Python, and the packages that figures depend on."""
    # of a checkout from its source: what was installed may be older
    source = (ROOT / "dsmini" / "__init__.py").read_text("utf-8") if _is_checkout() else ""
    stated = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    ours = stated[1] if stated else metadata.version("dsmini")
    found = {"dsmini": ours, "torch": torch.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def command(args: Sequence[str]) -> str:
    """Return a command line as one would type it."""
    return shlex.join(["python", "-m", *args])


def _is_checkout() -> bool:
    # a wheel may lie inside the checkout of another project, so that asking git is not enough
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "dsmini").is_dir()


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
