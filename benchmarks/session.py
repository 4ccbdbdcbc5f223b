"""One call of python -m benchmarks: measure what is left, keep it, show it."""

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks import answers, clock
from benchmarks.question import Case, Question, Setting
from dsmini.atomic import write_text
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.measure.calibration import steadiness
from dsmini.report import Section, comparison
from dsmini.report.provenance import Run
from dsmini.report.results import Done, Finished, Results, ResultsWriter, read
from dsmini.report.rows import case_words
from dsmini.report.terminal import show_question, show_table
from dsmini.report.units import duration, human, plural, words

Loader = Callable[[], Question]
Jobs = list[tuple[Question, Case, float]]
"""Cases that are to be measured, each with its estimated seconds."""
STOPPED = "DSMINI_BENCHMARKS_STOPPED"
"""Variable of the environment: what a call that was begun again leaves out, and the seconds it had taken before."""


def load(known: Mapping[str, Loader], name: str) -> tuple[Question | None, str | None]:
    """Return a question, and why it cannot run here if it cannot."""
    try:
        question = known[name]()
    except ModuleNotFoundError as error:
        return None, f"it needs {error.name}, which is not installed"
    return question, question.needs


@dataclass(kw_only=True)
class Session:
    """The questions of a call, where their figures go, and what is shown of them."""

    console: Console
    out: Path
    known: Mapping[str, Loader]
    names: Sequence[str]
    """Questions of this call. The page shows all that have figures."""
    undrawn: str = ""
    """Why the page could not be written the last time it was tried; empty if it was."""
    changes: Sequence[comparison.Change] = ()
    """Result of compare."""
    changed: Section | None = None
    """The same as a part of the page."""
    drawn: dict[str, Section] = field(default_factory=dict)
    """Other parts of the page."""

    @property
    def path(self) -> Path:
        """File of results."""
        return self.out / "results.jsonl"

    def measure(
        self, writer: ResultsWriter, run: Run, setting: Setting, asked: Sequence[tuple[Question, list[Case]]]
    ) -> int:
        """Measure what is not done yet. Return the exit status, 130 if it was interrupted."""
        before = json.loads(os.environ.pop(STOPPED, "{}"))
        began = time.monotonic() - before.get("seconds", 0.0)
        run, jobs = self._plan(run, setting, asked, before.get("cases", []))
        writer.start(run, dataclasses.asdict(setting.roofs))
        times = clock.Clock([estimate for *_, estimate in jobs])
        say(self.console, f"{plural(times.cases, 'case')}, about {duration(times.total)}")
        try:
            how = {"delay": 0, "line_every": 0, "stays": True, "refresh_per_second": 1}  # measuring is not disturbed
            with Progress(self.console, times.total, **how) as bar:
                for question, _ in asked:
                    for _, case, estimate in (job for job in jobs if job[0] is question):
                        where, spent = f"{question.name} {case.key}", time.monotonic() - began
                        if setting.quick and spent + estimate * times.factor > clock.QUICK:
                            times.skip(estimate)
                            say(self.console, f"{where} is left out: the two minutes of --quick are over")
                            continue
                        times.begin(estimate)
                        bar.update(times.expected, f"{times.nth}/{times.cases}  {where}", left=times.left())
                        self._run_case(writer, run, setting, question.name, case, estimate, began)
                        times.end(time.monotonic() - times.started)
                    results = read(self.path)
                    self._show(question, results.by_fingerprint[run.fingerprint])
                    self._draw(results)
        except KeyboardInterrupt:
            self._draw(read(self.path))
            return 130
        finished = read(self.path).by_fingerprint[run.fingerprint]
        failed = sum((name, key) in finished.errors for name, keys in run.plan.items() for key in keys)
        if failed:
            what = "1 case failed; its traceback is" if failed == 1 else f"{failed} cases failed; the tracebacks are"
            say(self.console, f"{what} in {self.path}", style="bold red")
        return 1 if self.unequal(finished) or failed else 0

    def _plan(
        self, run: Run, setting: Setting, asked: Sequence[tuple[Question, list[Case]]], stopped: list[list[str]]
    ) -> tuple[Run, Jobs]:
        """Return the run with its plan, and what is to be measured."""
        kept = read(self.path)
        finished = None if run.fresh else kept.by_fingerprint.get(run.fingerprint)
        done = {(name, key) for name, key in stopped} | set(finished.done if finished else ())
        jobs = [
            (q, case, kept.seconds(q.name, case.key, run.quick) or case.estimate(setting))
            for q, cases in asked
            for case in cases
            if (q.name, case.key) not in done
        ]
        every = sum(len(cases) for _, cases in asked)
        before = every - len(jobs) - len(stopped)
        if before > 0:
            said = f"{before} of {every} cases are done already, in {self.path}"
            say(self.console, f"{said}; --fresh measures them again")
        out = self._leave_out(jobs) if run.quick else {}
        plan = {q.name: [case.key for case in cases if case.key not in out.get(q.name, ())] for q, cases in asked}
        return dataclasses.replace(run, plan=plan, left_out=out), jobs

    def _leave_out(self, jobs: Jobs) -> dict[str, dict[str, str]]:
        """Take out the longest cases until the others fit into the time of --quick. Return why, by question and key."""
        out: dict[str, dict[str, str]] = {}
        for question, case, estimate in sorted(jobs, key=lambda job: -job[2]):
            if sum(seconds for *_, seconds in jobs) <= clock.QUICK:
                break
            jobs.remove((question, case, estimate))
            why = f"it takes about {duration(estimate)} here, and --quick has two minutes for all"
            out.setdefault(question.name, {})[case.key] = why
            say(self.console, f"{question.name} {case.key} is left out: {why}")
        return out

    def _run_case(
        self,
        writer: ResultsWriter,
        run: Run,
        setting: Setting,
        question: str,
        case: Case,
        estimate: float,
        began: float,
    ) -> None:
        """Measure a case and keep it."""
        start, before = time.monotonic(), steadiness(setting.roofs, setting.device)
        allowed = clock.allowed(estimate, start - began if setting.quick else None)
        too_long = f"stopped after {duration(allowed)}; its estimate was {human(estimate, 's')}"

        def fail(why: str, details: str = "") -> None:
            writer.error(run, question, case.key, details or why)
            say(self.console, f"{question} {case.key} failed: {why}", style="bold red")

        def restart() -> None:
            """Begin the command again without this case: nothing else ends a call into torch that does not return."""
            fail(too_long)
            self.console.show_cursor()  # that the bar has hidden
            cases = [list(key) for key in read(self.path).by_fingerprint[run.fingerprint].errors]
            os.environ[STOPPED] = json.dumps({"seconds": time.monotonic() - began, "cases": cases})
            os.execv(sys.executable, [arg for arg in sys.orig_argv if arg != "--fresh"])

        try:
            with clock.deadline(allowed, restart):
                figures = list(case.run())
            alien = [figure.question for figure in figures if figure.question != question]
            assert not alien, f"a case of {question} gave a figure of {alien[0]}"
        except clock.TookTooLong:
            return fail(too_long)
        except Exception as error:  # of the measured code; what writing raises is not caught here
            return fail(f"{type(error).__name__}: {error}", traceback.format_exc())
        steady = min(before, steadiness(setting.roofs, setting.device))
        done = Done(figures=figures, seconds=time.monotonic() - start, steadiness=steady)
        return writer.done(run, question, case.key, done)

    def show(self, results: Results) -> int:
        """Show the tables and the page, from what is kept. Return the exit status."""
        for question in self._shown(results, self.names):
            finished = results.of_question(question.name)
            assert finished is not None, "only questions that have something are shown"
            self._show(question, finished)
        self._draw(results)
        having = [finished for name in self.names if (finished := results.of_question(name))]
        return 1 if any([self.unequal(finished) for finished in having]) else 0

    def _show(self, question: Question, finished: Finished) -> None:
        figures = finished.figures(question.name)
        show_question(self.console, question.title, answers.finding(question, figures), figures)
        if unsteady := finished.unsteady(question.name):
            say(self.console, unsteady, style="yellow")

    def _draw(self, results: Results) -> None:
        """Write the page. A disk that is full stops no measurement: the figures are what counts."""
        path, before = self.out / "report.html", self.undrawn
        self.undrawn = ""
        try:
            write_text(path, answers.report(results, self._shown(results, self.known), self.drawn, self.changed).html())
        except OSError as error:
            self.undrawn = error.strerror or str(error)
            if not before:
                words = f"{path} could not be written: {self.undrawn}; the figures are kept. Then: --report-only"
                say(self.console, words, style="bold red")

    def _shown(self, results: Results, names: Iterable[str]) -> list[Question]:
        """Return questions that have something to show. One whose package is gone cannot say what its figures mean."""
        having = [name for name in self.known if name in set(names) and results.of_question(name)]
        return [question for name in having if (question := load(self.known, name)[0])]

    def compare(self, results: Results, old: Results, path: Path) -> None:
        """Show what changed in the questions of this call, and draw the page with it."""
        self.changes = comparison.compare(*(answers.figures(each, self.names) for each in (old, results)))
        warnings = answers.warnings_of_changes(self.names, old, results)
        self.changed = answers.changes_section(self.changes, str(path), warnings)
        different = [change for change in self.changes if change.verdict != "unchanged"]
        if different:
            show_table(self.console, comparison.table(different), f"Changes since {path}")
        say(self.console, f"{len(self.changes) - len(different)} of {len(self.changes)} figures are unchanged")
        for warning in warnings:
            say(self.console, warning, style="yellow")
        self._draw(results)

    def unequal(self, finished: Finished) -> int:
        """Return how many counts are not what they must be, and say which."""
        wrong = [figure for name in self.names for figure in finished.figures(name) if figure.equal is False]
        for f in wrong:
            said = f"{human(f.measured, f.unit, True)}, predicted were {human(f.predicted, f.unit, True)}"
            say(self.console, f"{f.question} {case_words(f)}: {words(f.metric)} is {said}", style="bold red")
        return len(wrong)
