"""File of results: a line of JSON for each case, so that nothing that was measured is lost.

    {"question": "decode", "key": "batch=1 context=128", "run": {"date", "command", "commit", "setting", "rates"},
     "figures": [...], "steadiness": 0.97, "error": ""}

A case that failed has its traceback as "error", and no figures. A case is done for the setting that it was measured in:
device, dtype, threads, sizes, machine, versions and sources.
"""

import contextlib
import dataclasses
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dsmini
from dsmini.reading import is_there, parse_json, read_bytes, refusing
from dsmini.report.figures import Figure, plain
from dsmini.report.units import plural
from dsmini.sources import hash_of

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
    text: str = ""
    """File that --text names."""
    disturbed: str = ""
    """Sentence about what disturbed the measurement of the rates that predictions rest on; "" for nothing."""

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


def of_question(results: Iterable[Result], question: str, setting: Mapping[str, Any] | None = None) -> list[Result]:
    """Return the results of a question in this setting; if there are none, in the setting of its latest run."""
    mine = [result for result in results if result.question == question]
    here = [result for result in mine if result.run.setting == setting]
    latest = max(mine, key=lambda result: result.run.date, default=None)
    return here or [result for result in mine if latest and result.run.setting == latest.run.setting]


def figures_of(results: Iterable[Result]) -> list[Figure]:
    """Return the figures of results, in their order."""
    return [figure for result in results for figure in result.figures]


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
    return hash_of([ROOT / folder for folder in SOURCES], {".py", ".cpp", ".h", ".toml"})


def versions() -> dict[str, str]:
    """Return the versions of dsmini, Python, and the packages that figures depend on."""
    found = {"dsmini": dsmini.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


# --- the file


def start(path: Path) -> list[Result]:
    """Make the folder of a file of results, end its last line, and return its contents.

    Raises: ValueError if the folder cannot be written, or the file is damaged.
    """
    with refusing(f"{path.parent} cannot be written", "choose another folder by --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = read_bytes(path) if is_there(path) else b""
        with path.open("ab") as file:
            file.truncate(content.rfind(b"\n") + 1)  # a killed run was writing the rest
    return read(path)


def read(path: Path) -> list[Result]:
    """Return the results of a file, empty without one. A case that was measured again in its setting counts once.

    Raises: ValueError that names the damaged line, or a file that is not a regular one.
    """
    found: dict[tuple[str, str, str], Result] = {}
    lines = read_bytes(path).decode("utf-8", errors="replace").splitlines() if is_there(path) else []
    for number, line in enumerate(lines, 1):
        try:
            result = _result(parse_json(line, f"line {number} of {path}"))
            found[result.question, result.key, json.dumps(result.run.setting, sort_keys=True)] = result
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is not a line of results ({error!r}); remove it") from None
    return [*found.values()]


def append(path: Path, result: Result) -> None:
    """Add a line to a file."""
    line = plain(dataclasses.asdict(result) | {"figures": [figure.as_json() for figure in result.figures]})
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(line)}\n")


def _result(line: dict[str, Any]) -> Result:
    names = {field.name for field in dataclasses.fields(Figure)}
    figures = [Figure(**{k: v for k, v in figure.items() if k in names}) for figure in line["figures"]]
    return Result(**{**line, "run": Run(**line["run"]), "figures": figures})
