"""The file of results: a line of JSON for every figure, appended case by case, so that nothing done is ever lost.

Its lines, in the order in which they come:

    {"kind": "start", ...}     a run: date, commit, versions, command, setting, and the cases it is going to measure
    {"kind": "roofs", ...}     the machine's card and rates
    {"kind": "figure", ...}    one number; counts once its case is done
    {"kind": "done", ...}      a case, with the seconds it took and how steady the machine was
    {"kind": "error", ...}     a case that raised, with the traceback

All but the first carry the fingerprint of what they depend on: device, dtype, threads, quick or not, machine, versions
and code. A case that is done under a fingerprint is not measured again under it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmini.measure.rates import Roofs, from_json
from dsmini.report.figures import Figure

Key = tuple[str, str]
"""A question's name, a case's key."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of python -m benchmarks."""

    date: str
    command: str
    commit: str | None
    """Of the checkout, "-dirty" behind it where files differ from it; None without git."""
    code: str
    """A hash of the sources that are measured and that measure."""
    versions: Mapping[str, str]
    quick: bool
    device: str
    dtype: str
    threads: int
    machine: Mapping[str, str]
    plan: Mapping[str, Sequence[str]]
    """The keys of the cases of each question, those that were done before included."""
    fresh: bool = False
    """What was done before of these questions does not count."""

    @property
    def fingerprint(self) -> str:
        """What a figure depends on. Not the commit: one that changes the documentation alone changes no figure."""
        parts = [self.code, self.versions, self.quick, self.device, self.dtype, self.threads, self.machine]
        text = json.dumps([dict(p) if isinstance(p, Mapping) else p for p in parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Done:
    figures: list[Figure]
    seconds: float
    steadiness: float = 1.0
    """What the machine gave of its kept rates, before or after, whichever was less."""


@dataclass
class Finished:
    """What one fingerprint has."""

    run: Run
    """The latest."""
    plan: dict[str, list[str]] = field(default_factory=dict)
    roofs: Roofs | None = None
    """None if an older version measured other rates."""
    done: dict[Key, Done] = field(default_factory=dict)
    errors: dict[Key, str] = field(default_factory=dict)
    """Tracebacks, of cases that have not been done since."""

    def figures(self, question: str) -> list[Figure]:
        """In the order of the cases, whenever they were measured."""
        keys = [key for name, key in self.done if name == question]
        order = self.plan.get(question, [])
        keys.sort(key=lambda key: order.index(key) if key in order else len(order))
        return [figure for key in keys for figure in self.done[question, key].figures]

    def steadiness(self, question: str) -> dict[str, float]:
        """By case."""
        return {key: done.steadiness for (name, key), done in self.done.items() if name == question}

    def left(self, question: str) -> int:
        """Cases that are still to be measured."""
        return sum((question, key) not in self.done for key in self.plan.get(question, []))


@dataclass
class Results:
    """A file of results, read."""

    by_fingerprint: dict[str, Finished] = field(default_factory=dict)
    """The latest last."""

    @property
    def latest(self) -> Finished | None:
        return next(reversed(self.by_fingerprint.values()), None)

    def of_question(self, name: str) -> Finished | None:
        """The latest that has figures or errors of a question."""
        having = [f for f in self.by_fingerprint.values() if any(name == q for q, _ in [*f.done, *f.errors])]
        return having[-1] if having else None

    def seconds(self, question: str, key: str, quick: bool) -> float | None:
        """How long a case took the last time that it was as quick, under whatever fingerprint."""
        having = [f for f in self.by_fingerprint.values() if (question, key) in f.done and f.run.quick == quick]
        return having[-1].done[question, key].seconds if having else None


def read(path: Path) -> Results:
    """Read a file of results; one that is not there is empty. A last line that was half written is passed over.

    Raises: ValueError naming the line that is not one of results.
    """
    results, pending = Results(), dict[tuple[str, str, str], list[Figure]]()
    for number, line in _lines(path):
        try:
            _take(results, pending, line)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is no line of results ({error!r}); remove it") from None
    return results


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise ValueError(f"line {number} of {path} is not JSON: {line.strip()[:60]!r}; remove it") from None
        yield number, value


def _take(results: Results, pending: dict[tuple[str, str, str], list[Figure]], line: dict[str, Any]) -> None:
    kind = line.pop("kind")
    if kind == "start":
        pending.clear()  # of a case that was being written when its run was killed
        run = Run(**{f.name: line[f.name] for f in dataclasses.fields(Run) if f.name in line})
        mine = results.by_fingerprint.pop(run.fingerprint, None) or Finished(run=run)
        results.by_fingerprint[run.fingerprint] = mine
        mine.run = run
        mine.plan |= {name: list(keys) for name, keys in run.plan.items()}
        if run.fresh:
            mine.done = {key: done for key, done in mine.done.items() if key[0] not in run.plan}
            mine.errors = {key: error for key, error in mine.errors.items() if key[0] not in run.plan}
        return
    fingerprint = line.pop("fingerprint")
    mine = results.by_fingerprint[fingerprint]
    if kind == "roofs":
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # of a version that kept other rates
            mine.roofs = from_json(line)
        return
    question, key = line["question"], line.pop("key")
    if kind == "figure":
        figures = pending.setdefault((fingerprint, question, key), [])
        figure = Figure(**{f.name: line[f.name] for f in dataclasses.fields(Figure) if f.name in line})
        numbers = (figure.measured, figure.predicted, figure.low, figure.high)
        if not isinstance(figure.case, dict) or any(isinstance(n, str | list | dict) for n in numbers):
            raise TypeError("a figure's case is an object and its values are numbers")
        figures.append(figure)
    elif kind == "done":
        figures = pending.pop((fingerprint, question, key), [])
        mine.done[question, key] = Done(
            figures=figures, seconds=line["seconds"], steadiness=line.get("steadiness", 1.0)
        )
        mine.errors.pop((question, key), None)
    elif kind == "error":
        mine.errors[question, key] = line["error"]


class Writer:
    """Appends lines to a file of results; each call is on the disk when it returns.

    Raises: ValueError if the folder cannot be written or another run is writing there.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab+")
        except OSError as error:
            raise ValueError(
                f"{path.parent} cannot be written: {error.strerror or error}; choose another folder by --out"
            ) from None
        self._lock(path)
        self._end_line()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def start(self, run: Run, roofs: Roofs) -> None:
        self._add({"kind": "start"} | dataclasses.asdict(run))
        self._add({"kind": "roofs", "fingerprint": run.fingerprint} | dataclasses.asdict(roofs))

    def done(self, run: Run, question: str, key: str, done: Done) -> None:
        """The figures of a case, and that it is done, in one go."""
        place = {"fingerprint": run.fingerprint, "question": question, "key": key}
        lines = [{"kind": "figure"} | place | as_json(figure) for figure in done.figures]
        self._add(
            *lines,
            {"kind": "done"} | place | {"seconds": round(done.seconds, 3), "steadiness": round(done.steadiness, 3)},
        )

    def error(self, run: Run, question: str, key: str, error: str) -> None:
        place = {"fingerprint": run.fingerprint, "question": question, "key": key}
        self._add({"kind": "error"} | place | {"error": error})

    def _add(self, *lines: Mapping[str, Any]) -> None:
        self.file.write("".join(json.dumps(_plain(line)) + "\n" for line in lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise ValueError(f"{path} is being written by another run; wait for it, or choose another --out") from None

    def _end_line(self) -> None:
        """What a killed run left of a line is cut off; a whole line gets its end."""
        self.file.seek(0)
        text = self.file.read()
        last = text[text.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            self.file.truncate(len(text) - len(last))
        else:
            self.file.write(b"\n")


def as_json(figure: Figure) -> dict[str, Any]:
    """A figure as it stands in the file and in the last line of a run."""
    return _plain(dataclasses.asdict(figure) | {"case": dict(figure.case), "ratio": figure.ratio})


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
