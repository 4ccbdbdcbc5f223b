"""File of results: lines of JSON, one for each finished case, so that nothing that was measured is lost.

    {"kind": "run", ...}      a call: date, command, commit, setting, rates of the machine, and its planned cases
    {"kind": "case", ...}     a finished case: its figures, its seconds, and how steady the machine was
    {"kind": "error", ...}    a case that failed, with the traceback

A case is done for the setting that it was measured in: device, dtype, threads, sizes, machine, versions and sources.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dsmini
from dsmini.reading import is_there, parse_json, read_bytes, refuse_special
from dsmini.report.figures import Figure, plain
from dsmini.report.units import plural

ROOT = Path(__file__).parents[1]
SOURCES = ("dsmini", "kernels", "benchmarks", "configs")
PACKAGES = ("transformers", "llama_cpp_python", "triton")
STEADY = 0.75
"""Least share of its stored rates that a quiet machine reaches."""
Key = tuple[str, str, str]
"""Setting, question and case."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of python -m benchmarks."""

    date: str
    command: str
    commit: str
    setting: Mapping[str, Any]
    """All that a figure depends on."""
    rates: Mapping[str, Any] = field(default_factory=dict)
    """Rates of the machine."""
    plan: Mapping[str, list[str]] = field(default_factory=dict)
    """Keys of the cases of each question."""
    fresh: bool = False
    """True if cases that were done before are measured again."""

    @property
    def id(self) -> str:
        """Hash of the setting."""
        return hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def words(self) -> str:
        """Setting in words: bfloat16 on cpu, 2 threads, quick."""
        s = self.setting
        sizes = "quick" if s["quick"] else "full"
        return f"{s['dtype']} on {s['device']}, {plural(s['threads'], 'thread')}, {sizes}"


def commit() -> str:
    """Return the commit of the checkout, with "-dirty" if files differ from it; "unknown" without git."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")[:12]
    return head + ("-dirty" if git("status", "--porcelain") else "") if head else "unknown"


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


class Measured(NamedTuple):
    """All that a file has of a question, in the setting of its latest run."""

    run: Run
    figures: list[Figure]
    errors: dict[str, str]
    """Tracebacks of failed cases by key."""
    left: list[str]
    """Keys of planned cases that are still to be measured."""
    steadiness: float
    """Least share of its stored rates that the machine reached; 1 for figures without times."""

    @property
    def unsteady(self) -> str:
        """Warning if the machine was busy, or faster than its rates; "" if not."""
        if self.steadiness >= STEADY:
            return ""
        return (
            f"The machine was busy or throttled: it reached as little as {self.steadiness:.0%} of the rates that "
            "predictions rest on. --fresh measures again."
        )


@dataclass
class Results:
    """Contents of a file of results."""

    runs: dict[str, Run] = field(default_factory=dict)
    """Latest run of each setting, the latest of all last."""
    cases: dict[Key, Mapping[str, Any]] = field(default_factory=dict)
    """Finished cases in the order of the file."""
    errors: dict[Key, str] = field(default_factory=dict)
    """Tracebacks of failed cases that have not been measured since."""

    @property
    def latest(self) -> Run:
        """Latest run; a caller has begun one, or found one."""
        return next(reversed(self.runs.values()))

    def of(self, question: str) -> Measured:
        """Return what there is of a question."""
        there = {key[0] for key in (*self.cases, *self.errors) if key[1] == question}
        run = next((run for id, run in reversed(self.runs.items()) if id in there), self.latest)
        place = run.id, question
        cases = {key[2]: line for key, line in self.cases.items() if key[:2] == place}
        errors = {key[2]: error for key, error in self.errors.items() if key[:2] == place}
        figures = [figure for line in cases.values() for figure in line["figures"]]
        timed = [line["steadiness"] for line in cases.values() if any(f.is_time for f in line["figures"])]
        left = [key for key in run.plan.get(question, []) if key not in cases]
        return Measured(run, figures, errors, left, min(timed, default=1.0))

    def figures(self, questions: Iterable[str]) -> list[Figure]:
        """Return the figures of some questions."""
        return [figure for name in questions for figure in self.of(name).figures]

    def take(self, line: dict[str, Any]) -> None:
        """Take a line of the file."""
        if line["kind"] == "run":
            run = Run(**_known(Run, line))
            before = self.runs.pop(run.id, None)
            self.runs[run.id] = dataclasses.replace(run, plan={**(before.plan if before else {}), **run.plan})
            if run.fresh:
                self.cases = {k: v for k, v in self.cases.items() if k[0] != run.id or k[1] not in run.plan}
            return
        key = self.runs[line["setting"]].id, line["question"], line["key"]
        self.errors.pop(key, None)
        if line["kind"] == "error":
            self.errors[key] = line["error"]
        else:
            figures = [Figure(**_known(Figure, figure)) for figure in line["figures"]]
            self.cases[key] = {**line, "figures": figures}


def _known(kind: type, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that a line has; other versions have other fields."""
    return {f.name: line[f.name] for f in dataclasses.fields(kind) if f.name in line}


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
            results.take(parse_json(line, f"line {number} of {path}"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is not a line of results ({error!r}); remove it") from None
    return results


class Writer:
    """Writer that appends whole lines. Each call returns after the data is on the disk.

    Raises: ValueError if the folder cannot be written, another run is writing there, or the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_special(path)  # opening a FIFO to append would wait
            self.file = path.open("ab+")
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"{path.parent} cannot be written: {why}; choose another folder by --out") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise ValueError(f"{path} is being written by another run; wait for it, or choose another --out") from None
        try:
            self.results = read(path)
            """Contents of the file."""
        except ValueError:
            self.file.close()
            raise
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, kind: str, **line: Any) -> None:
        """Append a line."""
        text = json.dumps(plain({"kind": kind, **line}))
        self.file.write(f"{text}\n".encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.results.take(json.loads(text))
