"""One call of python -m benchmarks: measure what is left, keep it, show it."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.question import Case, Figure, Question
from dsmini.measure.calibration import steadiness
from dsmini.measure.rates import Roofs
from dsmini.report import comparison as changes
from dsmini.report import page, units
from dsmini.report.results import Done, Finished, Results, Run, Writer, as_json, read
from dsmini.report.terminal import Bar, say, show_changes, show_question

Loader = Callable[[], Question]
Asked = tuple[Question, list[Case]]
CHANGE = ("question", "case", "metric", "unit", "old", "new", "verdict")
FACTS = ("date", "command", "commit", "code", "versions", "device", "dtype", "threads", "quick", "machine")


def load(known: Mapping[str, Loader], name: str) -> tuple[Question | None, str | None]:
    """A question, and why it cannot run here if it cannot."""
    try:
        question = known[name]()
    except ModuleNotFoundError as error:
        return None, f"it needs {error.name}, which is not installed"
    return question, question.needs


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a call is about, and where it puts and shows it."""

    console: Console
    out: Path
    known: Mapping[str, Loader]
    names: Sequence[str]
    """The questions of this call; the page shows all that have figures."""
    undrawn: list[str] = field(default_factory=list)
    """Why the page could not be written the last time it was tried; empty if it was."""
    changed: list[changes.Change] = field(default_factory=list)
    """What compare found."""

    @property
    def path(self) -> Path:
        return self.out / "results.jsonl"

    def measure(self, writer: Writer, run: Run, roofs: Roofs, asked: Sequence[Asked]) -> int:
        """Measure what is not done yet; returns the exit status, 130 if it was interrupted."""
        before = read(self.path)
        writer.start(run, roofs)
        done = read(self.path).by_fingerprint[run.fingerprint].done
        todo = [(q, [case for case in cases if (q.name, case.key) not in done]) for q, cases in asked]
        self._say_skipped(sum(len(cases) for _, cases in asked), sum(len(cases) for _, cases in todo))
        estimates = [before.seconds(q.name, case.key, run.quick) or case.seconds for q, cases in todo for case in cases]
        say(self.console, f"{len(estimates)} cases, about {units.duration(sum(estimates))}")
        failed = 0
        try:
            with Bar(self.console, estimates) as bar:
                for question, cases in todo:
                    for case in cases:
                        failed += not self._run_case(writer, run, roofs, question.name, case, bar)
                    results = read(self.path)
                    self._show(question, results.by_fingerprint[run.fingerprint])
                    self._draw(results)
        except KeyboardInterrupt:
            self._draw(read(self.path))
            return 130
        if failed:
            words = "1 case failed; its traceback is" if failed == 1 else f"{failed} cases failed; the tracebacks are"
            say(self.console, f"{words} in {self.path}", style="bold red")
        return 1 if self.unequal(read(self.path).by_fingerprint[run.fingerprint]) or failed else 0

    def _say_skipped(self, every: int, todo: int) -> None:
        if todo < every:
            where = f"{every - todo} of {every} cases are done already, in {self.path}"
            say(self.console, f"{where}; --fresh measures them again")

    def _run_case(self, writer: Writer, run: Run, roofs: Roofs, question: str, case: Case, bar: Bar) -> bool:
        """Measure a case and keep it; whether it went well."""
        bar.begin(question, case.key)
        start, device = time.monotonic(), torch.device(run.device)
        before = steadiness(roofs, device)
        try:
            figures = list(case.run())
            alien = [figure.question for figure in figures if figure.question != question]
            assert not alien, f"a case of {question} gave a figure of {alien[0]}"
        except Exception as error:  # of the measured code; what writing raises is not caught here
            writer.error(run, question, case.key, traceback.format_exc())
            say(self.console, f"{question} {case.key} failed: {type(error).__name__}: {error}", style="bold red")
            bar.end(time.monotonic() - start)
            return False
        steady = min(before, steadiness(roofs, device))
        taken = time.monotonic() - start
        writer.done(run, question, case.key, Done(figures=figures, seconds=taken, steadiness=steady))
        bar.end(taken)
        return True

    def show(self, results: Results) -> None:
        """The tables and the page, from what is kept."""
        for question in self._shown(results, self.names):
            finished = results.of_question(question.name)
            assert finished is not None, "only questions that have something are shown"
            self._show(question, finished)
        self._draw(results)

    def _show(self, question: Question, finished: Finished) -> None:
        figures = finished.figures(question.name)
        show_question(self.console, question.title, page.finding(question, figures), figures)
        if words := page.unsteady(finished, question.name):
            say(self.console, words, style="yellow")

    def _draw(
        self,
        results: Results,
        found: Sequence[changes.Change] | None = None,
        old: str = "",
        mind: Sequence[str] = (),
    ) -> None:
        """Write the page. A disk that is full stops no measurement: the figures are what counts."""
        path, before = self.out / "report.html", bool(self.undrawn)
        self.undrawn.clear()
        try:
            page.write_report(path, results, self._shown(results, self.known), found, old, mind)
        except OSError as error:
            self.undrawn.append(error.strerror or str(error))
            if not before:
                words = f"{path} could not be written: {self.undrawn[0]}; the figures are kept. Then: --report-only"
                say(self.console, words, style="bold red")

    def _shown(self, results: Results, names: Sequence[str] | Mapping[str, Loader]) -> list[Question]:
        """Questions that have something to show. One whose package is gone cannot say what its figures mean."""
        having = [name for name in self.known if name in names and results.of_question(name)]
        return [question for name in having if (question := load(self.known, name)[0])]

    def compare(self, results: Results, old: Results, path: Path) -> None:
        """Show what changed in the questions of this call, and draw the page with it."""
        self.changed[:] = changes.compare(self._figures(old), self._figures(results))
        show_changes(self.console, self.changed, str(path))
        mind = self._mind(old, results)
        for words in mind:
            say(self.console, words, style="yellow")
        self._draw(results, self.changed, str(path), mind)

    def _mind(self, old: Results, new: Results) -> list[str]:
        """What else than the code may have changed the figures."""
        said = []
        if old.latest and new.latest and (one := _setting(old.latest.run)) != (two := _setting(new.latest.run)):
            said.append(f"Mind that the settings differ: {one} before, {two} now.")
        for when, results in (("then", old), ("now", new)):
            having = [(name, finished) for name in self.names if (finished := results.of_question(name))]
            if busy := [name for name, finished in having if page.unsteady(finished, name)]:
                said.append(f"Mind that the machine was not steady {when} in {', '.join(busy)}.")
        return said

    def _figures(self, results: Results) -> list[Figure]:
        """All of this call's questions."""
        having = [(name, results.of_question(name)) for name in self.names]
        return [figure for name, finished in having if finished for figure in finished.figures(name)]

    def unequal(self, finished: Finished) -> int:
        """How many counts are not what they must be; says which."""
        wrong = [f for name in self.names for f in finished.figures(name) if page.tone(f) == "unequal"]
        for f in wrong:
            said = f"{units.human(f.measured, f.unit, True)}, predicted were {units.human(f.predicted, f.unit, True)}"
            say(
                self.console,
                f"{f.question} {page.case_words(f)}: {units.words(f.metric)} is {said}",
                style="bold red",
            )
        return len(wrong)

    def last_line(self, results: Results) -> dict[str, Any]:
        """All of it, for programs: the latest run's setting, its figures, and where they are not its own:

        failed: cases that raised; left: how many are still to be measured, by question; earlier: the setting of
        questions whose figures are an earlier run's; steadiness: the least share of its kept rates that the machine
        gave, by question; changes: what compare found.
        """
        latest = results.latest
        assert latest is not None, "the caller has begun a run, or found one"
        failed = [
            {"question": name, "case": key, "error": error.strip().splitlines()[-1]}
            for (name, key), error in latest.errors.items()
            if name in self.names
        ]
        having = {name: finished for name in self.names if (finished := results.of_question(name))}
        earlier = {name: _facts(f.run) for name, f in having.items() if f.run.fingerprint != latest.run.fingerprint}
        planned = having | dict.fromkeys(latest.plan, latest)
        left = {name: left for name in self.names if name in planned and (left := planned[name].left(name))}
        figures = [as_json(figure) for figure in self._figures(results)]
        steady = {name: min(f.steadiness(name).values(), default=None) for name, f in having.items()}
        notes = {"failed": failed, "left": left, "earlier": earlier, "steadiness": steady}
        changed = [as_json(c.name) | {"old": c.old, "new": c.new, "verdict": c.verdict} for c in self.changed]
        notes |= {"changes": [{k: c[k] for k in CHANGE} for c in changed if c["verdict"] != "unchanged"]}
        return _facts(latest.run) | {"figures": figures} | notes


def _facts(run: Run) -> dict[str, Any]:
    return {fact: getattr(run, fact) for fact in FACTS}


def _setting(run: Run) -> str:
    sizes = "quick" if run.quick else "full"
    machine = f"{run.machine.get('processor')}, torch {run.versions.get('torch')}"
    return f"{run.dtype} on {run.device}, {page.threads(run)}, {sizes}, {machine}"
