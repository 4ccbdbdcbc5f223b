"""File of results: a line of JSON for each case, so that nothing that was measured is lost.

    {"question": "decode", "key": "batch=1 context=128", "run": {"date", "command", "commit", "setting", "rates"},
     "figures": [...], "steadiness": 0.97, "error": ""}

A case that failed has its traceback as "error", and no figures. A case is done for the setting that it was measured in:
device, dtype, threads, sizes, machine, versions and sources.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dsmini
from dsmini.reading import is_there, parse_json, read_bytes, refuse_special
from dsmini.report.figures import Figure, plain
from dsmini.report.units import plural

ROOT = Path(__file__).parents[1]
SOURCES = ("dsmini", "kernels", "benchmarks", "configs")
PACKAGES = ("transformers", "llama_cpp_python", "ik_llama_cpp_python", "triton")
STEADY = 0.75
"""Least share of its stored rates that a quiet machine reaches."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of python -m benchmarks."""

    date: str
    command: str
    commit: str
    setting: Mapping[str, Any]
    """All that a figure depends on."""
    rates: Mapping[str, str]
    """Rates of the machine, in words."""

    @property
    def words(self) -> str:
        """Setting in words: bfloat16 on cpu, 2 threads, quick."""
        s = self.setting
        sizes = "quick" if s["quick"] else "full"
        return f"{s['dtype']} on {s['device']}, {plural(s['threads'], 'thread')}, {sizes}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case that was measured, or that failed."""

    question: str
    key: str
    run: Run
    figures: Sequence[Figure] = ()
    steadiness: float = 1.0
    """Least share of its stored rates that the machine reached."""
    error: str = ""
    """Traceback of a case that failed."""

    @property
    def unsteady(self) -> bool:
        """True for times of a machine that was busy, or slower than its rates."""
        return self.steadiness < STEADY and any(f.is_time and f.measured is not None for f in self.figures)


class Results(list[Result]):
    """Contents of a file of results, in its order. A case that was measured again takes its old place."""

    def take(self, new: Result) -> None:
        """Take a result, in place of an older one of the same case and setting."""
        for i, old in enumerate(self):
            if (old.question, old.key, old.run.setting) == (new.question, new.key, new.run.setting):
                self[i] = new
                return
        self.append(new)

    def of(self, question: str, setting: Mapping[str, Any] | None = None) -> "Results":
        """Return the results of a question in this setting; if there are none, in the setting of its latest run."""
        mine = [result for result in self if result.question == question]
        here = [result for result in mine if result.run.setting == setting]
        latest = max(mine, key=lambda result: result.run.date, default=None)
        return Results(here or [r for r in mine if latest and r.run.setting == latest.run.setting])

    @property
    def figures(self) -> list[Figure]:
        return [figure for result in self for figure in result.figures]


def commit() -> str:
    """Return the commit of the checkout, with "-dirty" if files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def code() -> str:
    """Return a hash of the sources that figures depend on."""
    found = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".toml"):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions of dsmini, Python, and the packages that figures depend on."""
    found = {"dsmini": dsmini.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read(path: Path) -> Results:
    """Return the contents of a file of results, empty without a file. Skip a half-written last line.

    Raises: ValueError that names the damaged line, or a file that is not a regular one.
    """
    results = Results()
    if not is_there(path):
        return results
    lines = read_bytes(path).decode("utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break  # a killed run was writing it
        try:
            results.take(_result(parse_json(line, f"line {number} of {path}")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is not a line of results ({error!r}); remove it") from None
    return results


def _result(line: dict[str, Any]) -> Result:
    names = {field.name for field in dataclasses.fields(Figure)}
    figures = [Figure(**{k: v for k, v in figure.items() if k in names}) for figure in line["figures"]]
    return Result(**{**line, "run": Run(**line["run"]), "figures": figures})


class Writer:
    """Writer that appends whole lines. Each call returns after the data is on the disk.

    Raises: ValueError if the folder cannot be written, another run is writing there, or the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.ExitStack() as failed:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                refuse_special(path)  # opening a FIFO to append would wait
                self.file = failed.enter_context(path.open("ab+"))
            except OSError as error:
                why = error.strerror or error
                raise ValueError(f"{path.parent} cannot be written: {why}; choose another folder by --out") from None
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{path} is being written by another run; wait for it, or choose another --out"
                ) from None
            self.results = read(path)
            """Contents of the file."""
            failed.pop_all()
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, result: Result) -> None:
        """Append a line."""
        line = plain(dataclasses.asdict(result) | {"figures": [figure.as_json() for figure in result.figures]})
        self.file.write(f"{json.dumps(line)}\n".encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.results.take(_result(line))
