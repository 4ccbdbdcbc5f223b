"""python -m benchmarks: choose questions, measure their cases, and show answers, a page, or JSON."""

import contextlib
import ctypes
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks import page, results
from benchmarks.question import Case, Question, Setting
from benchmarks.results import Results, Run, Writer
from dsmini import ops
from dsmini.console.command import T
from dsmini.console.commandline import Help, parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.machine import faster_dtype, pick_device, pick_dtype
from dsmini.measure import calibration
from dsmini.measure.calibration import steadiness
from dsmini.measure.rates import Roofs
from dsmini.ops.explanation import instruction_set
from dsmini.report.units import duration

STARTED = time.monotonic()
QUICK = 135.0
"""Seconds after the start in which --quick measures; drawing the page takes the rest of two minutes and a half."""
QUICK_RATES = 30.0
"""Seconds that --quick takes for the rates of a machine where none are stored."""
TIMES, LEAST = 10.0, 30.0
"""A case is stopped after ten times its estimate, but not before half a minute."""
GRACE = 10.0
"""Seconds that one call into torch may continue after that."""
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class BenchmarksCommand:
    """Measure speed, size and error of dsmini on this machine, next to predictions, and write a page.

    Results are saved case by case; after a stop the same command continues.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Questions to measure; none: all that take minutes, not hours."""
    quick: bool = False
    """Small sizes and two minutes; questions that have no time are left out."""
    out: Path = Path("results")
    """Folder for report.html, a page to read offline, and results.jsonl."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of models; auto takes the faster one here."""
    threads: int | None = None
    """CPU threads; left out: torch's own choice."""
    text: Path | None = None
    """Text for shakespeare and sparse-training: tinyshakespeare.txt."""
    peer_python: tuple[Path, ...] = ()
    """Other Pythons that have llama-cpp-python or ik-llama-cpp-python, for peers."""
    compare: Path | None = None
    """Another results.jsonl; shows what changed since."""
    list: bool = False
    """List the questions and end."""
    report_only: bool = False
    """Measure nothing; show saved results."""
    fresh: bool = False
    """Measure everything again, this machine's rates too."""
    json: bool = False
    """Print one line of JSON, and the rest to the standard error."""


HELP = Help(
    usage="[NAME ...] [FLAGS]",
    examples=("--quick", "decode moe", "--list", "peers --peer-python other/bin/python", "--compare old.jsonl"),
    main=tuple(field.name for field in dataclasses.fields(BenchmarksCommand)),
)


def main(args: Sequence[str], known: Mapping[str, Question], measure: Callable[..., Roofs] | None = None) -> int:
    """Run the command. Return its exit status.

    Args:
        known: the questions by name.
        measure: returns the rates of a device.
    """
    command = checked(parse(BenchmarksCommand, "benchmarks", args, help=HELP), known)
    console = Console(stderr=command.json, width=None if sys.stdout.isatty() else 120)
    if command.list:
        wide = max(map(len, known))
        for name, question in known.items():
            more = f"  (cannot run here: {question.needs})" if question.needs else ""
            say(console, f"{name:{wide}}  {question.title}{more or '  (only by name)' * question.on_request}")
        return 0
    ops.check_forced()
    old = results.read(command.compare) if command.compare else None  # before measuring, because it may be damaged
    if old and not old.cases:
        raise ValueError(f"--compare: {command.compare} has no results; name the results.jsonl of another run")
    asked = [name for name in known if not command.names or name in command.names]
    path = command.out / "results.jsonl"
    if command.report_only:
        found = Session(command, known, {name: "" for name in asked}, results.read(path))
        if not found.results.cases:
            raise ValueError(f"{path} has no results yet; leave out --report-only to measure some")
    else:
        found = Session(command, known, {name: why_not(known[name], command) for name in asked})
        found.measure(path, args, measure or calibration.load_or_measure)
    answer = page.Answer(found.results, known, found.asked, found.left_out, old)
    answer.show(console, tables=bool(command.names))
    status = answer.draw(console, command.out)
    status = 130 if found.interrupted else status or answer.problems(console)
    if found.interrupted:
        say(console, f"stopped; finished cases are saved in {path}, and the same command without --fresh continues")
    if command.json:
        print(json.dumps(answer.as_json()))
    if found.stuck:  # a thread that never returns would keep Python from ending
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def checked(command: BenchmarksCommand, known: Mapping[str, Question]) -> BenchmarksCommand:
    """Return the command with names as the questions have them.

    Raises: ValueError for what the flags cannot mean.
    """
    names = tuple(hyphens if (hyphens := name.replace("_", "-")) in known else name for name in command.names)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown question {name!r}; there are {', '.join(known)}")
    if command.threads is not None and not 1 <= command.threads <= MOST_THREADS:
        raise ValueError(f"--threads {command.threads} is out of range; use 1 to {MOST_THREADS}")
    files = {"--text": command.text, "--compare": command.compare}
    for flag, path in [*files.items(), *(("--peer-python", python) for python in command.peer_python)]:
        if path is not None and not path.is_file():
            raise ValueError(f"{flag}: there is no file {path}; name another")
    for name in ("fresh", "quick", "threads", "device", "dtype", "text") if command.report_only else ():
        if getattr(command, name) != getattr(BenchmarksCommand(), name):
            raise ValueError(f"--report-only measures nothing, but --{name} is about measuring; leave one of them out")
    return dataclasses.replace(command, names=names)


def why_not(question: Question, command: BenchmarksCommand) -> str:
    """Return why a question is left out; "" if it is measured.

    Raises: ValueError for a question that was named and cannot run here.
    """
    if question.on_request and not command.names:
        return "it takes long; name it to measure it"
    reason = question.needs
    if question.needs_text and not command.text:
        reason = reason or "it reads Karpathy's tinyshakespeare, 1,115,394 characters; name the file by --text FILE"
    if reason and command.names:
        raise ValueError(f"{question.name} cannot run here: {reason}")
    return reason


class TookTooLong(BaseException):
    """End of the time of a case; not an Exception, because measured code must not catch it."""

    def __init__(self, stuck: bool = False) -> None:
        self.stuck = stuck
        """True if the case still runs, in a call that hears nothing."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return the result of work in a thread of its own, so that Ctrl-C and the clock end it wherever it is.

    Raises: TookTooLong after the seconds. The thread gets the same exception at its next line of Python; one call into
        torch that does not return within GRACE is left alone, and then nothing else can be measured.
    """
    found: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    def stop() -> None:
        ident = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(TookTooLong))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    try:
        while thread.is_alive() and time.monotonic() < end:
            thread.join(0.1)
    except KeyboardInterrupt:
        stop()
        thread.join(GRACE)
        raise
    if thread.is_alive():
        stop()
        thread.join(GRACE)
        raise TookTooLong(stuck=thread.is_alive())
    if errors:
        raise errors[0]
    return found[0]


class Session:
    """Measurement of the questions of a call.

    Args:
        asked: why each question is left out; "" for those that are measured.
    """

    def __init__(
        self,
        command: BenchmarksCommand,
        known: Mapping[str, Question],
        asked: Mapping[str, str],
        results: Results | None = None,
    ) -> None:
        self.command, self.known = command, known
        self.left_out = {name: reason for name, reason in asked.items() if reason}
        """Reason for each question that is left out."""
        self.asked = [name for name in asked if not asked[name]]
        self.results = results or Results()
        self.console = Console(stderr=True)
        self.interrupted = self.stuck = False

    def measure(self, path: Path, args: Sequence[str], measure: Callable[..., Roofs]) -> None:
        """Measure the cases that are not done."""
        if not self.asked:
            raise ValueError("no question can run here; python -m benchmarks --list gives the reasons")
        device = pick_device(self.command.device)
        with Writer(path) as writer, contextlib.redirect_stdout(sys.stderr):  # measured libraries may print
            setting = self._setting(device, measure)
            cases = {name: self.known[name].cases(setting) for name in self.asked}
            self.results = writer.results
            run = self._run(setting, args)
            todo = {
                name: [case for case in of if self.command.fresh or (run.id, name, case.key) not in self.results.cases]
                for name, of in cases.items()
            }
            todo = self._in_time(todo, setting) if self.command.quick else todo
            run = dataclasses.replace(run, plan={name: [case.key for case in cases[name]] for name in todo})
            writer.add("run", **dataclasses.asdict(run))
            self._tell_done(sum(map(len, cases.values())), sum(map(len, todo.values())))
            try:
                self._measure(todo, setting, run, writer)
            except KeyboardInterrupt:
                self.interrupted = True

    def _setting(self, device: torch.device, measure: Callable[..., Roofs]) -> Setting:
        """Return the settings that all cases share. Measure the machine's rates if none are stored."""
        command = self.command
        if command.threads:
            torch.set_num_threads(command.threads)
        label = "measuring this machine's rates, once: half a minute"
        with Progress(self.console, 1.0, label, line_every=1, refresh_per_second=1) as bar:
            seconds = QUICK_RATES if command.quick else calibration.BUDGET
            roofs = measure(device, on_part=bar.update, fresh=command.fresh, seconds=seconds)
        dtype = pick_dtype(command.dtype, device)
        if command.dtype == "auto" and {"float32", "bfloat16"} <= set(roofs.peak):  # a rerun picks the same
            dtype = faster_dtype(roofs.peak["float32"], roofs.peak["bfloat16"])
        more = {"text": command.text, "peer_pythons": command.peer_python, "out": command.out}
        return Setting(quick=command.quick, device=device, dtype=dtype, roofs=roofs, **more)

    def _run(self, setting: Setting, args: Sequence[str]) -> Run:
        """Return the provenance of the figures, with an empty plan."""
        kernels = f"cpu {instruction_set()}" if ops.serving("cpu") == "cpu" else ops.serving("cpu")
        depends = {
            "code": results.code(),
            "versions": results.versions() | {"kernels": kernels},
            "quick": setting.quick,
            "device": str(setting.device),
            "dtype": setting.dtype_name,
            "threads": torch.get_num_threads(),
            "machine": dict(setting.roofs.card),
        }
        date, words = datetime.now().astimezone().isoformat(timespec="seconds"), " ".join(args)
        rates, fresh = dataclasses.asdict(setting.roofs), self.command.fresh
        command = f"python -m benchmarks {words}".rstrip()
        return Run(date=date, command=command, commit=results.commit(), setting=depends, rates=rates, fresh=fresh)

    def _in_time(self, todo: Mapping[str, list[Case]], setting: Setting) -> dict[str, list[Case]]:
        """Return the questions for which --quick has time, in their order; leave out the others as a whole."""
        found: dict[str, list[Case]] = {}
        left = QUICK - self._spent()
        for name, cases in todo.items():
            seconds = sum(case.estimate(setting) for case in cases)
            if seconds > left:
                self._leave_out(name)
            else:
                left -= seconds
                found[name] = cases
        return found

    def _leave_out(self, name: str) -> None:
        stuck = "a case before it does not return; the same command measures it"
        self.left_out[name] = stuck if self.stuck else "--quick has no time for it; name it to measure it"
        self.asked.remove(name)

    def _tell_done(self, planned: int, left: int) -> None:
        if planned > left and not self.command.quick:
            say(self.console, f"{planned - left} of {planned} cases are already done; --fresh measures them again")

    def _spent(self) -> float:
        return time.monotonic() - STARTED

    def _measure(self, todo: Mapping[str, list[Case]], setting: Setting, run: Run, writer: Writer) -> None:
        """Measure the cases of each question, and save each when it is done."""
        estimates = {name: sum(case.estimate(setting) for case in cases) for name, cases in todo.items()}
        expected, begun = 0.0, time.monotonic()
        how: dict[str, Any] = {"delay": 0, "line_every": 0, "refresh_per_second": 1}  # a quiet bar
        with Progress(self.console, sum(estimates.values()), **how) as bar:
            for name, cases in todo.items():
                slower = max(1.0, (time.monotonic() - begun) / expected) if expected > 10 else 1.0
                if self.stuck or (self.command.quick and cases and self._spent() + slower * estimates[name] > QUICK):
                    self._leave_out(name)
                    continue
                for case in cases:
                    bar.update(expected, f"{name} {case.key}", left=slower * (bar.total - expected))
                    if not self._measured(name, case, setting, run, writer):
                        break
                    expected += case.estimate(setting)

    def _measured(self, name: str, case: Case, setting: Setting, run: Run, writer: Writer) -> bool:
        """Measure a case and save its figures, or the reason why it failed. Return False to leave out the rest."""
        estimate, start = case.estimate(setting), time.monotonic()
        allowed = max(LEAST, TIMES * estimate)
        if self.command.quick:
            allowed = min(allowed, max(1.0, QUICK + GRACE / 2 - self._spent()))
        place = {"setting": run.id, "question": name, "key": case.key}

        def work() -> dict[str, Any]:
            before = steadiness(setting.roofs, setting.device)
            found = [dataclasses.replace(figure, question=name).as_json() for figure in case.run()]
            steady = min(before, steadiness(setting.roofs, setting.device))
            return {"figures": found, "steadiness": round(steady, 3)}

        try:
            line = within(allowed, work)
        except TookTooLong as stopped:
            self.stuck = self.stuck or stopped.stuck
            if self.command.quick:
                self._leave_out(name)
                return False
            why = f"stopped after {duration(allowed)}; its estimate was {duration(estimate)}"
            writer.add("error", **place, error=why)
            say(self.console, f"{name} {case.key} failed: {why}", style="bold red")
            return not self.stuck
        except Exception as error:  # from the measured code; errors of writing are not caught here
            writer.add("error", **place, error=traceback.format_exc())
            say(self.console, f"{name} {case.key} failed: {type(error).__name__}: {error}", style="bold red")
            return True
        writer.add("case", **place, seconds=round(time.monotonic() - start, 3), **line)
        return True
