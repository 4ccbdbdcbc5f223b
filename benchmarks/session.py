"""Measure the cases of one call that are not done, one after the other, and stop a case that takes too long."""

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks import clock
from benchmarks.case import Case, Setting
from benchmarks.display import Display
from benchmarks.questions import Question
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.measure.calibration import steadiness
from dsmini.report.provenance import Run
from dsmini.report.results import Done, ResultsWriter
from dsmini.report.units import duration, human, plural

Asked = Sequence[tuple[Question, list[Case]]]
STOPPED = "DSMINI_BENCHMARKS_STOPPED"
"""Environment variable of a restarted call: the cases to leave out, and the seconds that have passed."""


class Job(NamedTuple):
    """Case to measure."""

    question: Question
    case: Case
    estimate: float
    """Expected seconds."""

    def __str__(self) -> str:
        return f"{self.question.name} {self.case.key}"


@dataclass(kw_only=True)
class Session:
    """Run of a call, with the file for its figures and the display."""

    display: Display
    writer: ResultsWriter
    setting: Setting
    run: Run
    began: float = 0.0
    """Start on the monotonic clock; in a restarted call, the start of the first."""

    def measure(self, asked: Asked) -> int:
        """Measure the cases that are not done. Return the exit status, 130 after an interrupt."""
        before = json.loads(os.environ.pop(STOPPED, '{"seconds": 0, "cases": []}'))
        self.began = time.monotonic() - before["seconds"]
        jobs = self._plan(asked, before["cases"])
        self.writer.start(self.run, dataclasses.asdict(self.setting.roofs))
        times = clock.Clock([job.estimate for job in jobs])
        say(self.display.console, f"{plural(times.cases, 'case')}, about {duration(times.total)}")
        finished = self.writer.results.by_fingerprint[self.run.fingerprint]
        try:
            how = {"delay": 0, "line_every": 0, "stays": True, "refresh_per_second": 1}  # a quiet bar
            with Progress(self.display.console, times.total, **how) as bar:
                for question, _ in asked:
                    for job in [job for job in jobs if job.question is question]:
                        if self.setting.quick and self._spent() + job.estimate * times.factor > clock.QUICK:
                            times.skip(job.estimate)
                            say(self.display.console, f"{job} is left out: the two minutes of --quick are over")
                            continue
                        times.begin(job.estimate)
                        bar.update(times.expected, f"{times.nth}/{times.cases}  {job}", left=times.left())
                        self._run_case(job)
                        times.end(time.monotonic() - times.started)
                    self.display.show(question, finished)
                    self.display.draw(self.writer.results)
        except KeyboardInterrupt:
            self.display.draw(self.writer.results)
            return 130
        failed = sum((name, key) in finished.errors for name, keys in self.run.plan.items() for key in keys)
        if failed:
            said = f"{plural(failed, 'case')} failed; tracebacks are in {self.display.path}"
            say(self.display.console, said, style="bold red")
        figures = [figure for name in self.display.names for figure in finished.figures(name)]
        return 1 if self.display.unequal(figures) or failed else 0

    def _spent(self) -> float:
        return time.monotonic() - self.began

    def _plan(self, asked: Asked, stopped: list[list[str]]) -> list[Job]:
        """Plan the run and return the cases to measure."""
        run, results = self.run, self.writer.results
        finished = None if run.fresh else results.by_fingerprint.get(run.fingerprint)
        done = {(name, key) for name, key in stopped} | set(finished.done if finished else ())
        jobs = [
            Job(q, case, results.seconds(q.name, case.key, run.quick) or case.estimate(self.setting))
            for q, cases in asked
            for case in cases
            if (q.name, case.key) not in done
        ]
        every = sum(len(cases) for _, cases in asked)
        before = every - len(jobs) - len(stopped)
        if before > 0:
            said = f"{before} of {every} cases are already done, in {self.display.path}"
            say(self.display.console, f"{said}; --fresh measures them again")
        out = self._leave_out(jobs) if run.quick else {}
        plan = {q.name: [case.key for case in cases if case.key not in out.get(q.name, ())] for q, cases in asked}
        self.run = dataclasses.replace(run, plan=plan, left_out=out)
        return jobs

    def _leave_out(self, jobs: list[Job]) -> dict[str, dict[str, str]]:
        """Remove the longest cases until the rest fits into --quick. Return the reasons by question and key."""
        out: dict[str, dict[str, str]] = {}
        for job in sorted(jobs, key=lambda job: -job.estimate):
            if sum(job.estimate for job in jobs) <= clock.QUICK:
                break
            jobs.remove(job)
            why = f"it takes about {duration(job.estimate)} here, and --quick has two minutes for all"
            out.setdefault(job.question.name, {})[job.case.key] = why
            say(self.display.console, f"{job} is left out: {why}")
        return out

    def _run_case(self, job: Job) -> None:
        """Measure a case and save its figures, or the reason why it failed."""
        name, key = job.question.name, job.case.key
        start, before = time.monotonic(), steadiness(self.setting.roofs, self.setting.device)
        allowed = clock.allowed(job.estimate, self._spent() if self.setting.quick else None)
        too_long = f"stopped after {duration(allowed)}; its estimate was {human(job.estimate, 's')}"

        def fail(why: str, details: str = "") -> None:
            self.writer.error(self.run, name, key, details or why)
            say(self.display.console, f"{job} failed: {why}", style="bold red")

        def restart() -> None:
            """Restart the command without this case; nothing else ends a call into torch that does not return."""
            fail(too_long)
            self.display.console.show_cursor()  # which the bar has hidden
            failed = list(self.writer.results.by_fingerprint[self.run.fingerprint].errors)
            os.environ[STOPPED] = json.dumps({"seconds": self._spent(), "cases": failed})
            os.execv(sys.executable, [arg for arg in sys.orig_argv if arg != "--fresh"])

        try:
            with clock.deadline(allowed, restart):
                figures = list(job.case.run())
            alien = [figure.question for figure in figures if figure.question != name]
            assert not alien, f"a case of {name} gave a figure of {alien[0]}"
        except clock.TookTooLong:
            return fail(too_long)
        except Exception as error:  # from the measured code; errors of writing are not caught here
            return fail(f"{type(error).__name__}: {error}", traceback.format_exc())
        steady = min(before, steadiness(self.setting.roofs, self.setting.device))
        done = Done(figures=figures, seconds=time.monotonic() - start, steadiness=steady)
        return self.writer.done(self.run, name, key, done)
