"""The file of a comparison: a first line that says what is compared, then one for each finished run.

A run that was killed has no line and is done again; a line that was cut at the end of the file is dropped. A file is
continued by the same comparison alone, and all its runs are made by the same sources, on the same kind of machine.
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsmini.atomic import lock
from dsmini.comparison.arms import Comparison
from dsmini.machine import card
from dsmini.reading import brief, read_bytes, readable
from dsmini.sources import own_sources

Line = dict[str, Any]
"""Arm, seed, and the figures of trial.run_trial."""


HEAD = {"dsmini", "question", "source", "hypothesis", "margin", "arms"}
"""Keys of a first line."""
BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors of a line of something else, or nested too deeply."""
MADE_BY = {
    "sources": "other sources",
    "processor": "another processor",
    "device": "another device",
    "torch": "another version of torch",
    "scored": "other bytes of the text",
}
"""Keys of a run that say what made it or scored it, and what a run with another value is of."""
TIMED = 2
"""Number of seeds whose runs are made here even if another file has them: times of two sittings cannot be compared."""
START = b'{"dsmini": "'
NUMBERS = {"loss", "active", "cpu_seconds", "train_seconds", "cache_bytes", "max_vio", "acceptance"}
"""Figures of a run that an answer shows."""


@dataclass(kw_only=True)
class Results:
    """Contents of a file of results."""

    path: Path
    head: dict[str, Any]
    lines: list[Line] = field(default_factory=list)

    def done(self, arm: str, seed: int) -> bool:
        """Return True if a run has its line."""
        return any(line["arm"] == arm and line["seed"] == seed for line in self.lines)

    @property
    def names(self) -> list[str]:
        """Names of the arms, the base first."""
        return list(self.head["arms"])

    @property
    def clock(self) -> str:
        """The figure of a run's time: its CPU seconds; on a GPU, where the process waits, those that passed."""
        return "cpu_seconds" if all(line.get("device", "cpu") == "cpu" for line in self.lines) else "train_seconds"

    def values(self, arm: str, figure: str = "loss") -> dict[int, float]:
        """Return a figure of an arm by seed, of the runs that have it and ended: times of others are too short."""
        lines = [line for line in self.lines if line["arm"] == arm and line["loss"] is not None]
        return {line["seed"]: line[figure] for line in lines if line.get(figure) is not None}

    def mean(self, arm: str, figure: str) -> float | None:
        """Return the mean of a figure of an arm; None if no run has it."""
        values = self.values(arm, figure).values()
        return statistics.fmean(values) if values else None

    def diverged(self, arm: str) -> int:
        """Return the number of an arm's runs that have no loss."""
        return sum(line["arm"] == arm and line["loss"] is None for line in self.lines)

    def differences(self, arm: str, figure: str = "loss") -> list[float]:
        """Return a figure of an arm less that of the base, for each seed that both have."""
        mine, base = self.values(arm, figure), self.values(self.names[0], figure)
        return [mine[seed] - base[seed] for seed in sorted(mine.keys() & base.keys())]

    def add(self, line: Line) -> None:
        """Write a finished run to the end of the file, whole or not at all; all of them to a file that was removed."""
        new = [line] if self.path.exists() else [self.head, *self.lines, line]
        content = b"".join(json.dumps(each).encode() + b"\n" for each in new)
        with self.path.open("ab", buffering=0) as file:  # a buffer would write the rest when it is closed
            start = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, start)
                raise
        self.lines.append(line)


def made_here(device: torch.device) -> dict[str, Any]:
    """Return what makes a run now: these sources of dsmini, on this machine."""
    here = card(device)
    return {"sources": own_sources(), **{key: here[key] for key in ("processor", "device", "torch", "python")}}


def made_otherwise(line: Line, made: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what made a run and differs from what is wanted: in words, its value, and the one that is wanted."""
    for key, words in MADE_BY.items():
        if line.get(key) != made.get(key):
            unknown = f"commit {line['commit']}" if "commit" in line else "unknown"
            yield words, readable(str(line.get(key) or unknown)), readable(str(made.get(key)))


def head_of(comparison: Comparison, corpora: Mapping[str, str], version: str) -> dict[str, Any]:
    """Return the first line of a comparison's file.

    Args:
        corpora: hash of the corpus of each arm.
        version: of dsmini.
    """
    return {
        "dsmini": version,
        "question": comparison.question,
        "source": comparison.source,
        "hypothesis": comparison.hypothesis,
        "margin": comparison.margin,
        "arms": {arm.name: arm.describe() | {"corpus": corpora[arm.name]} for arm in comparison.arms},
    }


def read_results(path: Path) -> Results | None:
    """Return what a file holds; None if there is none, or if it was killed before its first line.

    Raises: ValueError for a file of something else, which names its first line that is not a run.
    """
    if not path.exists():
        return None
    *whole, cut = read_bytes(path).split(b"\n")
    try:
        head = json.loads(whole[0]) if whole else {}
        known = head.keys() >= HEAD and all(isinstance(arm, dict) for arm in head["arms"].values())
        known = known and isinstance(head["margin"], float) and head["margin"] > 0
    except BROKEN:
        known, head = False, {}
    if not whole and START.startswith(cut[: len(START)]):
        return None
    if not known:
        raise ValueError(f"{path} is not a file of a comparison; name another")
    runs: dict[tuple[str, int], Line] = {}
    for number, text in enumerate(whole[1:], 2):
        try:
            line = json.loads(text)
            numbers = [line[key] for key in line.keys() & NUMBERS if line[key] is not None]
            fits = line["arm"] in head["arms"] and isinstance(line["seed"], int) and "loss" in line
            fits = fits and all(isinstance(x, float | int) and math.isfinite(x) for x in numbers)
        except BROKEN:
            fits, line = False, {}
        if not fits:
            raise ValueError(f"line {number} of {path} is not a finished run; remove it")
        first = next(iter(runs.values()), line)
        for what, theirs, ours in made_otherwise(line, first):
            raise ValueError(f"line {number} of {path} is of {what}, {theirs} where others have {ours}; part them")
        runs.setdefault((line["arm"], line["seed"]), line)
    return Results(path=path, head=head, lines=[*runs.values()])


@contextmanager
def opened(path: Path, head: dict[str, Any], made: Mapping[str, Any]) -> Iterator[Results]:
    """Yield the results of a file, new or continued, and keep other commands out of it meanwhile.

    Args:
        made: what makes its next runs, as in made_here, and the bytes on which they are scored.

    Raises: ValueError for a file of another comparison or corpus, with runs that other sources or another machine made,
        and for one that is in use.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            lock(file, path)
        except BlockingIOError:
            raise ValueError(f"another command is measuring into {path}; wait for it, or name another --out") from None
        results = read_results(path)
        if results is None or not results.lines:  # without a run nothing is lost
            file.truncate(0)
            file.write(json.dumps(head).encode() + b"\n")
            file.flush()
            results = Results(path=path, head=head)
        else:
            refuse_other(results, head, made)
            file.truncate(read_bytes(path).rfind(b"\n") + 1)
        yield results


def reuse(results: Results, seeds: int, made: Mapping[str, Any]) -> dict[Path, int]:
    """Copy the runs of equal arms, of these seeds, from other files of the folder; return how many each file had.

    Copies have no times, and the first seeds are not copied.

    Args:
        made: as in opened; by other sources or elsewhere the same run gives other bits.
    """
    path, head, found = results.path, results.head, dict[Path, int]()
    for other in sorted({*path.parent.glob("*.jsonl")} - {path}):
        try:
            theirs = read_results(other)
        except ValueError:  # a file of something else
            continue
        if theirs is None:
            continue
        lines = [line for line in theirs.lines if TIMED <= line["seed"] < seeds and not [*made_otherwise(line, made)]]
        for line, (name, arm) in itertools.product(lines, head["arms"].items()):
            if theirs.head["arms"][line["arm"]] == arm and not results.done(name, line["seed"]):
                results.add(line | {"arm": name, "train_seconds": None, "cpu_seconds": None})
                found[other] = found.get(other, 0) + 1
    return found


def refuse_other(results: Results, head: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Raise ValueError for a file of another comparison, or made otherwise, with the first thing that differs."""
    fix = f"name another file with --out, or remove {results.path}"
    was, now = results.names[0], next(iter(head["arms"]))
    differences = [*_differences("", results.head, head)]
    if any(where.endswith(".corpus") for where, _, _ in differences):
        default = "the default one is the library of the Python that runs, so use the same Python"
        raise ValueError(f"{results.path} was begun on another text; {default}, or {fix}")
    for what, theirs, ours in made_otherwise(results.lines[0], made):
        raise ValueError(f"{results.path} has runs of {what}, {theirs}; this would add those of {ours}; {fix}")
    if was != now and head["arms"].keys() == results.head["arms"].keys():
        raise ValueError(f"{results.path} was begun with the base {brief(was)}, this has {brief(now)}; {fix}")
    for where, old, new in differences:
        raise ValueError(f"{results.path} was begun with {where or 'it'} {brief(old)}, this has {brief(new)}; {fix}")


def _differences(where: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(f"{where}.{key}".lstrip("."), old.get(key), new.get(key))
    elif old != new and not (isinstance(old, float) and isinstance(new, float) and math.isclose(old, new)):
        yield where, old, new
