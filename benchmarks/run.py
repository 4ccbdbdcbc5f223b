"""python -m benchmarks: choose questions, measure their cases, and show answers, a page, or JSON."""

import contextlib
import dataclasses
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks import page, results
from benchmarks.question import Case, Question, Setting
from benchmarks.results import Result, Run, Writer
from dsmini import ops
from dsmini.atomic import write_text
from dsmini.console.commandline import Help, parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.machine import faster_dtype, pick_device, pick_dtype
from dsmini.measure.price import Prices
from dsmini.measure.roofs import Roofs, load_or_measure, steadiness
from dsmini.ops.explanation import instruction_set
from dsmini.report import Report
from dsmini.report.units import human

STARTED = time.monotonic()
QUICK = 135.0
"""Seconds after the start in which --quick measures; drawing the page takes the rest of two minutes and a half."""
TIMES, LEAST = 10.0, 30.0
"""A case is stopped after ten times its estimate, but not before half a minute."""
GRACE = 5.0
"""Seconds that a case of --quick may take beyond QUICK."""
MOST_THREADS = 1024
NO_TIME = "--quick has no time for it; name it to measure it"


@dataclass(frozen=True, kw_only=True)
class BenchmarksCommand:
    """Measure speed, size and error of dsmini on this machine, next to predictions, and write a page.

    Results are saved case by case; after a stop the same command continues.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Questions to measure; none: all that take minutes, not hours."""
    cases: str = ""
    """Measure only the cases that have this in their names: peers --cases wide."""
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
    peer_python: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Another Python, which has llama-cpp-python or ik-llama-cpp-python, for peers; may be given again."""
    list: bool = False
    """List the questions and end."""
    fresh: bool = False
    """Measure everything again, this machine's rates too."""
    json: bool = False
    """Print one line of JSON, and the rest to the standard error."""


HELP = Help(
    usage="[NAME ...] [FLAGS]",
    examples=("--quick", "decode moe", "--list", "peers --peer-python other/bin/python"),
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
        for name, question in known.items():
            more = f"  (cannot run here: {question.needs})" if question.needs else ""
            more = more or "  (only by name)" * question.on_request
            say(console, f"{name:{max(map(len, known))}}  {question.title}{more}")
        return 0
    ops.check_forced()
    asked = [name for name in known if not command.names or name in command.names]
    left_out = {name: reason for name in asked if (reason := why_not(known[name], command))}
    if left_out.keys() >= set(asked):
        raise ValueError("no question can run here; python -m benchmarks --list gives the reasons")
    path, device, interrupted = command.out / "results.jsonl", pick_device(command.device), False
    with Writer(path) as writer, contextlib.redirect_stdout(sys.stderr):  # measured libraries may print
        setting = setting_of(command, device, measure or load_or_measure)
        run = run_of(setting, " ".join(args))
        try:
            here = {name: known[name] for name in asked if name not in left_out}
            measure_all(here, setting, run, writer, command.fresh, left_out, command.cases)
        except KeyboardInterrupt:
            interrupted = True
        found = {name: writer.results.of(name, run.setting) for name in known if name not in left_out}

    mine = {name: of for name, of in found.items() if name in asked}
    sections = {name: page.section(known[name], of, run) for name, of in found.items() if of}
    shown = [section for name, section in sections.items() if name in mine]
    if not command.names:  # tables are for those who ask by name
        shown = [dataclasses.replace(section, figures=()) for section in shown]
    for value, what in page.headline([figure for of in mine.values() for figure in of.figures]):
        say(console, f"{value}  {what}", style="bold")
    Report(title="", sections=shown).show(console)
    say(console)
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        say(console, f"left out: {', '.join(names)} ({reason})", style="dim")
    problems = page.problems(mine)
    for problem in problems:
        say(console, problem, style="bold red")
    if command.json:
        print(json.dumps(as_json(run, mine, left_out)))
    if interrupted:
        say(console, f"stopped; finished cases are saved in {path}, and the same command without --fresh continues")
    every = [figure for of in found.values() for figure in of.figures]
    write_text(command.out / "report.html", page.report(list(sections.values()), every, run).html())
    say(console, f"report  {command.out / 'report.html'}")
    return 130 if interrupted else int(bool(problems))


def as_json(run: Run, found: Mapping[str, results.Results], left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return the answer for programs: the run's date, command, commit and setting, and what follows.

    figures: those of this call's questions.
    failed: cases that raised or took too long.
    left_out: reason for each question that was left out.
    steadiness: least share of its stored rates that the machine reached, by question.
    """
    every = [result for of in found.values() for result in of]
    failed = [(result, result.error.strip().splitlines()[-1]) for result in every if result.error]
    return {
        **{"date": run.date, "command": run.command, "commit": run.commit, **run.setting},
        "figures": [figure.as_json() for result in every for figure in result.figures],
        "failed": [{"question": r.question, "case": r.key, "error": words} for r, words in failed],
        "left_out": dict(left_out),
        "steadiness": {name: min(r.steadiness for r in of) for name, of in found.items() if of},
    }


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
    for flag, path in (("--text", command.text), *(("--peer-python", python) for python in command.peer_python)):
        if path is not None and not path.is_file():
            raise ValueError(f"{flag}: there is no file {path}; name another")
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


# --- the measurement


class TookTooLong(BaseException):
    """End of the time of a case; not an Exception, because measured code must not catch it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TookTooLong after some seconds, at the next line of Python: one call into torch is not interrupted."""

    def stop(*_: object) -> None:
        raise TookTooLong

    before, (left, _) = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def setting_of(command: BenchmarksCommand, device: torch.device, measure: Callable[..., Roofs]) -> Setting:
    """Return the settings that all cases share. Measure the machine's rates if none are stored."""
    if command.threads:
        torch.set_num_threads(command.threads)
    label = "measuring this machine's roofs, once: a few seconds"
    with Progress(Console(stderr=True), 1.0, label, line_every=1, refresh_per_second=1) as bar:
        roofs = measure(device, on_part=bar.update, fresh=command.fresh)
    dtype = pick_dtype(command.dtype, device)
    if command.dtype == "auto" and {"float32", "bfloat16"} <= set(roofs.peak):  # a rerun picks the same
        dtype = faster_dtype(roofs.peak["float32"], roofs.peak["bfloat16"])
    prices = Prices.under(roofs, fresh=command.fresh) if device.type == "cpu" else None
    more = {"prices": prices, "text": command.text, "peer_python": command.peer_python, "out": command.out}
    return Setting(quick=command.quick, device=device, dtype=dtype, roofs=roofs, **more)


def run_of(setting: Setting, words: str) -> Run:
    """Return the provenance of the figures of this call."""
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
    roofs, date = setting.roofs, datetime.now().astimezone().isoformat(timespec="seconds")
    rates = {f"matrix product, {dtype}": human(rate, "FLOP/s") for dtype, rate in roofs.peak.items()}
    rates |= {"reading memory": human(roofs.bandwidth, "bytes/s"), "copying memory": human(roofs.copy, "bytes/s")}
    command = f"python -m benchmarks {words}".rstrip()
    return Run(date=date, command=command, commit=results.commit(), setting=depends, rates=rates)


def spent() -> float:
    """Return the seconds since the start."""
    return time.monotonic() - STARTED


def measure_all(
    questions: Mapping[str, Question],
    setting: Setting,
    run: Run,
    writer: Writer,
    fresh: bool,
    left_out: dict[str, str],
    only: str,
) -> None:
    """Measure the cases that are not done, and save each when it is.

    Args:
        fresh: measure the others too.
        left_out: gets the questions for which --quick has no time, as a whole.
        only: part of a case's name; others are left out.
    """
    console, todo, planned = Console(stderr=True), dict[str, list[Case]](), 0
    by_name = {name: question.cases(setting) for name, question in questions.items()}
    if only and not any(only in case.key for cases in by_name.values() for case in cases):
        some = ", ".join(repr(case.key) for cases in by_name.values() for case in cases[:3])
        raise ValueError(f"--cases {only!r} is in no case's name; names are {some} and others")
    left = QUICK - spent() if setting.quick else float("inf")
    for name in questions:
        done = () if fresh else {r.key for r in writer.results.of(name, run.setting) if is_done(r, run)}
        cases = [case for case in by_name[name] if only in case.key]
        new = [case for case in cases if case.key not in done]
        if (seconds := sum(case.seconds for case in new)) > left:
            left_out[name] = NO_TIME
            continue
        todo[name], left, planned = new, left - seconds, planned + len(cases)
    if (there := planned - sum(map(len, todo.values()))) and not setting.quick:
        say(console, f"{there} of {planned} cases are already done; --fresh measures them again")
    total, expected = sum(case.seconds for new in todo.values() for case in new), 0.0
    with Progress(console, total, delay=0, line_every=0, refresh_per_second=1) as bar:  # a quiet bar
        for name, new in todo.items():
            if setting.quick and new and spent() + sum(case.seconds for case in new) > QUICK:
                left_out[name] = NO_TIME
                continue
            for case in new:
                bar.update(expected, f"{name} {case.key}")
                try:
                    measure_case(name, case, setting, run, writer)
                except TookTooLong:
                    left_out[name] = NO_TIME
                    break
                expected += case.seconds


def is_done(result: Result, run: Run) -> bool:
    """Return True for a case that was measured in the setting of this run."""
    return not result.error and result.run.setting == run.setting


def measure_case(name: str, case: Case, setting: Setting, run: Run, writer: Writer) -> None:
    """Measure a case and save its figures, or the reason why it failed.

    Raises: TookTooLong with --quick.
    """
    allowed = max(LEAST, TIMES * case.seconds)
    if setting.quick:
        allowed = min(allowed, max(1.0, QUICK + GRACE - spent()))
    try:
        with limited(allowed):
            steady = steadiness(setting.roofs, setting.device)
            figures = [dataclasses.replace(figure, question=name) for figure in case.run()]
            steady = min(steady, steadiness(setting.roofs, setting.device))
    except (Exception, TookTooLong) as error:  # from the measured code; errors of writing are not caught here
        if setting.quick and isinstance(error, TookTooLong):
            raise
        why, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        if isinstance(error, TookTooLong):
            why = trace = f"stopped after {human(allowed, 's')}; its estimate was {human(case.seconds, 's')}"
        writer.add(Result(question=name, key=case.key, run=run, error=trace))
        say(Console(stderr=True), f"{name} {case.key} failed: {why}", style="bold red")
        return
    writer.add(Result(question=name, key=case.key, run=run, figures=figures, steadiness=round(steady, 3)))
