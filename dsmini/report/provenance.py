"""Provenance of figures: command, commit, sources, versions, machine."""

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
"""Folder of the checkout, or the folder that contains the installed package."""
MEASURED = ("dsmini", "kernels", "benchmarks", "configs")
INSTALLED = ("dsmini", "dsmini_kernels")
SHOWING = ("__main__", "command_line", "runner", "session", "display", "answers", "clock")
SHOWN = (*(f"benchmarks/{name}.py" for name in SHOWING), "dsmini/report/")
"""Sources that show figures but change none."""
PACKAGES = ("transformers", "llama_cpp_python", "triton")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of a command that measures."""

    date: str
    command: str
    commit: str | None
    """Commit of the checkout, with "-dirty" if files differ from it. None without git or a checkout."""
    code: str
    """Hash of the sources that figures depend on."""
    versions: Mapping[str, str]
    quick: bool
    device: str
    dtype: str
    threads: int
    machine: Mapping[str, str]
    plan: Mapping[str, Sequence[str]]
    """Keys of the cases of each question, finished ones included."""
    fresh: bool = False
    """True if cases that were done before are measured again."""
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Reason for each case that was left out, by question and key."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that a figure depends on; a commit that changes only documentation keeps it."""
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
        """Setting in words: bfloat16 on cpu, 2 threads, quick."""
        return f"{self.dtype} on {self.device}, {plural(self.threads, 'thread')}, {'quick' if self.quick else 'full'}"

    def facts(self) -> dict[str, str]:
        """Return names and values that describe the run."""
        device = f"{self.device}, {plural(self.threads, 'thread')}"
        facts = {"date": self.date[:16].replace("T", " "), "commit": self.short_commit, "device": device}
        return facts | {"dtype": self.dtype, "sizes": "quick" if self.quick else "full"} | dict(self.versions)


def commit() -> str | None:
    """Return the commit of the checkout, with "-dirty" if files differ from it; None without git or a checkout."""
    if not _is_checkout():
        return None
    head = _git("rev-parse", "HEAD")
    return head and head + ("-dirty" if _git("status", "--porcelain") else "")


def code() -> str:
    """Return a hash of all sources that figures depend on, in the checkout or in the installed package."""
    found = hashlib.sha256()
    for folder in MEASURED if _is_checkout() else INSTALLED:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".cpp", ".h", ".toml") and not name.startswith(SHOWN):
                found.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions of dsmini, Python, and the packages that figures depend on."""
    # in a checkout from the source: an installed version may be older
    source = (ROOT / "dsmini" / "__init__.py").read_text("utf-8") if _is_checkout() else ""
    stated = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    ours = stated[1] if stated else metadata.version("dsmini")
    found = {"dsmini": ours, "torch": torch.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def command(args: Sequence[str]) -> str:
    """Return a command line as a user would type it."""
    return shlex.join(["python", "-m", *args])


def _is_checkout() -> bool:
    # asking git is not enough: a wheel may lie inside the checkout of another project
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "dsmini").is_dir()


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
