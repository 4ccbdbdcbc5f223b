"""File of results: lines of JSON, appended case by case, so that no finished case is lost.

Its lines, in order:

    {"kind": "start", ...}     a run: date, commit, versions, command, setting, and the planned cases
    {"kind": "roofs", ...}     the machine's card and rates
    {"kind": "figure", ...}    one number; valid once its case is done
    {"kind": "done", ...}      a case, with its seconds and the steadiness of the machine
    {"kind": "error", ...}     a case that raised, with the traceback

All but the first have the fingerprint of their run: device, dtype, threads, quick or not, machine, versions and code.
A case that is done under a fingerprint is not measured again under it.
"""

import dataclasses
import fcntl
import json
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmini.reading import is_there, parse_json, read_bytes, refuse_special
from dsmini.report.figures import Figure, plain
from dsmini.report.provenance import Run

Key = tuple[str, str]
"""Name of a question and key of a case."""
STEADY = 0.75
"""Least share of its stored rates that a quiet machine reaches."""
WIDE = 0.25
"""Median spread of repeated times above which the machine was busy."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """Figures of a finished case."""

    figures: list[Figure]
    seconds: float
    steadiness: float = 1.0
    """Share of its stored rates that the machine reached, before or after, whichever was less."""


@dataclass
class Finished:
    """All results under one fingerprint."""

    run: Run
    """Latest run."""
    plan: dict[str, list[str]] = field(default_factory=dict)
    rates: Mapping[str, Any] = field(default_factory=dict)
    """Rates of the machine, as in the file."""
    done: dict[Key, Done] = field(default_factory=dict)
    errors: dict[Key, str] = field(default_factory=dict)
    """Tracebacks of failed cases that have not been measured since."""

    @property
    def questions(self) -> set[str]:
        """Names of the questions that have figures or errors."""
        return {name for name, _ in [*self.done, *self.errors]}

    def figures(self, question: str) -> list[Figure]:
        """Return a question's figures in the order of its cases."""
        keys = [key for name, key in self.done if name == question]
        order = self.plan.get(question, [])
        keys.sort(key=lambda key: order.index(key) if key in order else len(order))
        return [figure for key in keys for figure in self.done[question, key].figures]

    def steadiness(self, question: str) -> dict[str, float]:
        """Return the steadiness of each case."""
        return {key: done.steadiness for (name, key), done in self.done.items() if name == question}

    def left(self, question: str) -> int:
        """Return the number of cases that are still to be measured."""
        return sum((question, key) not in self.done for key in self.plan.get(question, []))

    def warnings(self, question: str, latest: Run) -> list[str]:
        """Return warnings that a reader must see before a question's figures."""
        said, run = [], self.run
        if run.fingerprint != latest.fingerprint:
            said.append(
                f"Measured by an earlier run than the rest: {run.date[:10]}, commit {run.short_commit}, {run.setting}."
            )
        if words := self.unsteady(question):
            said.append(words)
        if left := self.left(question):
            said.append(
                f"{left} of {len(self.plan[question])} cases {'is' if left == 1 else 'are'} still to be measured."
            )
        return said + [f"{key} was left out: {why}." for key, why in run.left_out.get(question, {}).items()]

    def unsteady(self, question: str) -> str:
        """Return a warning if the machine was busy, or faster than its rates; "" if not, or without any times."""
        timed = [figure for figure in self.figures(question) if figure.is_time]
        if not timed:
            return ""
        steadiness = self.steadiness(question)
        slow = {key: share for key, share in steadiness.items() if share < STEADY}
        fast = max(steadiness.values(), default=1.0)
        if slow:
            which = ", ".join(slow) if len(slow) <= 3 else f"{len(slow)} of {len(steadiness)} cases"
            return (
                f"The machine was busy or throttled: in {which} it reached as little as {min(slow.values()):.0%} of "
                "the rates that predictions rest on. --fresh measures again."
            )
        spreads = [f.spread for f in timed if f.unit != "x" and f.spread is not None]
        if spreads and (middle := statistics.median(spreads)) > WIDE:
            return (
                f"The machine was busy: the median spread of repeated times is ±{middle:.0%}, so smaller differences "
                "mean nothing. --fresh measures again."
            )
        if fast > 1 / STEADY:
            return (
                f"The machine was up to {fast:.2f} times as fast as when its rates were measured, so predictions are "
                "too low. --fresh measures its rates again."
            )
        return ""


@dataclass
class Results:
    """Contents of a file of results."""

    by_fingerprint: dict[str, Finished] = field(default_factory=dict)
    """Results by fingerprint, the latest run last."""
    _pending: dict[tuple[str, Key], list[Figure]] = field(default_factory=dict)
    """Figures of cases without a "done" line so far, by fingerprint and case."""

    @property
    def latest(self) -> Finished | None:
        """Results of the latest run, None in an empty file."""
        return next(reversed(self.by_fingerprint.values()), None)

    @property
    def is_empty(self) -> bool:
        """True if no case is done."""
        return not any(finished.done for finished in self.by_fingerprint.values())

    def of_questions(self, names: Iterable[str]) -> dict[str, Finished]:
        """Return the latest results with figures or errors of each of these questions."""
        latest = {name: finished for finished in self.by_fingerprint.values() for name in finished.questions}
        return {name: latest[name] for name in names if name in latest}

    def figures(self, names: Iterable[str]) -> list[Figure]:
        """Return the latest figures of these questions."""
        return [figure for name, finished in self.of_questions(names).items() for figure in finished.figures(name)]

    def unsteady(self, names: Iterable[str]) -> list[str]:
        """Return those of these questions during which the machine was not steady."""
        return [name for name, finished in self.of_questions(names).items() if finished.unsteady(name)]

    def seconds(self, question: str, key: str, quick: bool) -> float | None:
        """Return the seconds of the last run of a case with the same quick, under any fingerprint."""
        having = [f for f in self.by_fingerprint.values() if (question, key) in f.done and f.run.quick == quick]
        return having[-1].done[question, key].seconds if having else None

    def take(self, line: dict[str, Any]) -> None:
        """Add a line of the file.

        Raises: KeyError, TypeError or AttributeError for anything but a line of results.
        """
        kind = line.pop("kind")
        if kind == "start":
            self._pending.clear()  # of a case that a killed run was writing
            self._start(Run(**_known(Run, line)))
            return
        fingerprint = line.pop("fingerprint")
        mine = self.by_fingerprint[fingerprint]
        if kind == "roofs":
            mine.rates = line
            return
        case = line["question"], line.pop("key")
        if kind == "figure":
            self._pending.setdefault((fingerprint, case), []).append(_figure(line))
        elif kind == "done":
            figures = self._pending.pop((fingerprint, case), [])
            mine.done[case] = Done(figures=figures, seconds=line["seconds"], steadiness=line.get("steadiness", 1.0))
            mine.errors.pop(case, None)
        elif kind == "error":
            mine.errors[case] = line["error"]

    def _start(self, run: Run) -> None:
        mine = self.by_fingerprint.pop(run.fingerprint, None) or Finished(run=run)
        self.by_fingerprint[run.fingerprint] = mine  # the latest last
        mine.run = run
        mine.plan |= {name: list(keys) for name, keys in run.plan.items()}
        if run.fresh:
            mine.done = {case: done for case, done in mine.done.items() if case[0] not in run.plan}
            mine.errors = {case: error for case, error in mine.errors.items() if case[0] not in run.plan}


def read(path: Path) -> Results:
    """Return the contents of a file of results, empty without a file. Skip a half-written last line.

    Raises: ValueError that names the damaged line, or a file that is not a regular one.
    """
    results = Results()
    if not is_there(path):
        return results
    lines = read_bytes(path).decode("utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line, f"line {number} of {path}")
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"line {number} of {path} is not JSON: {line.strip()[:60]!r}; remove it") from None
        try:
            results.take(value)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is not a line of results ({error!r}); remove it") from None
    return results


def _figure(line: dict[str, Any]) -> Figure:
    figure = Figure(**_known(Figure, line))
    numbers = (figure.measured, figure.predicted, figure.low, figure.high)
    if not isinstance(figure.case, dict) or any(isinstance(n, str | list | dict) for n in numbers):
        raise TypeError("the case of a figure must be an object and its values numbers")
    return figure


def _known(kind: type[Run] | type[Figure], line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that a line has; other versions have other fields."""
    return {f.name: line[f.name] for f in dataclasses.fields(kind) if f.name in line}


class ResultsWriter:
    """Writer that appends whole lines to a file of results. Each call returns after the data is on the disk.

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
        self._end_line()
        try:
            self.results = read(path)
            """Contents of the file."""
        except ValueError:
            self.file.close()
            raise

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def start(self, run: Run, rates: Mapping[str, Any]) -> None:
        """Begin a run on a machine with these rates."""
        self._add({"kind": "start"} | dataclasses.asdict(run))
        self._add({"kind": "roofs", "fingerprint": run.fingerprint} | dict(rates))

    def done(self, run: Run, question: str, key: str, done: Done) -> None:
        """Append the figures of a case and its "done" line in one write."""
        place = {"fingerprint": run.fingerprint, "question": question, "key": key}
        lines = [{"kind": "figure"} | place | figure.as_json() for figure in done.figures]
        end = {"seconds": round(done.seconds, 3), "steadiness": round(done.steadiness, 3)}
        self._add(*lines, {"kind": "done"} | place | end)

    def error(self, run: Run, question: str, key: str, error: str) -> None:
        """Append the error of a case."""
        place = {"fingerprint": run.fingerprint, "question": question, "key": key}
        self._add({"kind": "error"} | place | {"error": error})

    def _add(self, *lines: Mapping[str, Any]) -> None:
        texts = [json.dumps(plain(line)) for line in lines]
        self.file.write("".join(f"{text}\n" for text in texts).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        for text in texts:
            self.results.take(json.loads(text))

    def _end_line(self) -> None:
        """Remove the half-written line of a killed run, or end a complete one."""
        self.file.seek(0)
        text = self.file.read()
        last = text[text.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            parse_json(last.decode(errors="replace"), "the last line")
        except ValueError:
            self.file.truncate(len(text) - len(last))
        else:
            self.file.write(b"\n")
