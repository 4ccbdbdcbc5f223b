"""python -m benchmarks: choose questions, measure their cases, and show answers, a page, or JSON.

Usage, then examples:

    python -m benchmarks [NAME ...] [FLAGS]

    python -m benchmarks --quick
    python -m benchmarks decode moe
    python -m benchmarks --list
    python -m benchmarks peers --peer-python other/bin/python
"""

import contextlib
import dataclasses
import hashlib
import json
import shlex
import sys
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
from benchmarks.results import Result, Run, figures_of, of_question
from dsmini import ops
from dsmini.atomic import write_text
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.machine import faster_dtype, pick_device, pick_dtype
from dsmini.measure.price import Prices
from dsmini.measure.roofs import Roofs, load_or_measure, steadiness
from dsmini.measure.turns import TimeOverError
from dsmini.ops.explanation import instruction_set
from dsmini.report import Figure, Report
from dsmini.report.units import human

STARTED = time.monotonic()
QUICK = 135.0
"""Seconds after the start in which --quick measures; drawing the page takes the rest of two minutes and a half."""
TIMES, LEAST = 10.0, 30.0
"""A case begins no turn after ten times its estimate, but has half a minute in any case."""
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
    """Small sizes and two minutes; questions that do not fit are skipped and listed."""
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
    compare: Path | None = None
    """Older results.jsonl: print what changed since, and what did not."""
    json: bool = False
    """Print one line of JSON, and the rest to the standard error."""


def main(args: Sequence[str], known: Mapping[str, Question], measure: Callable[..., Roofs] | None = None) -> int:
    """Run the command. Return its exit status.

    Args:
        known: the questions by name.
        measure: returns the rates of a device.
    """
    command = checked(parse(BenchmarksCommand, "benchmarks", args), known)
    console = Console(stderr=command.json)
    if not console.is_terminal:
        console.width = 120
    if command.list and command.json:
        told = [
            {"name": q.name, "title": q.title, "needs": q.needs, "on_request": q.on_request} for q in known.values()
        ]
        print(json.dumps(told))
        return 0
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
    before = results.read(command.compare) if command.compare else []
    path, device, interrupted = command.out / "results.jsonl", pick_device(command.device), False
    done = results.start(path)
    with contextlib.redirect_stdout(sys.stderr):  # measured libraries may print
        setting = setting_of(command, device, measure or load_or_measure)
        run = run_of(setting, shlex.join(args))
        try:
            here = {name: known[name] for name in asked if name not in left_out}
            left_out |= measure_all(here, setting, run, path, [] if command.fresh else done, command.cases)
        except KeyboardInterrupt:
            interrupted = True
    every = results.read(path)
    found = {name: of for name in known if (of := of_question(every, name, run.setting))}
    mine = {name: of for name, of in found.items() if name in asked}
    sections = {name: page.section(known[name], of, run) for name, of in found.items()}
    shown = [section for name, section in sections.items() if name in mine]
    if not command.names:  # tables are for those who ask by name
        shown = [dataclasses.replace(section, figures=()) for section in shown]
    changes = page.changes(str(command.compare), before, mine, run) if command.compare else None
    Report(title="", sections=[*shown, *filter(None, [changes])]).show(console)
    say(console)
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        say(console, f"left out: {', '.join(names)} ({reason})", style="dim")
    problems = page.problems(mine)
    for warning in page.disturbed(mine):
        say(console, warning, style="yellow")
    for problem in problems:
        say(console, problem, style="bold red")
    if command.json:
        print(json.dumps(as_json(run, mine, left_out, changes.figures if changes else None)))
    if interrupted:
        say(console, f"stopped; finished cases are saved in {path}, and the same command without --fresh continues")
    everything = [*sections.values(), *filter(None, [changes])]
    write_text(command.out / "report.html", page.report(everything, run, page.disturbed(found)).html())
    say(console, f"report  {command.out / 'report.html'}")
    return 130 if interrupted else int(bool(problems))


def as_json(
    run: Run, found: Mapping[str, list[Result]], left_out: Mapping[str, str], changed: Sequence[Figure] | None
) -> dict[str, Any]:
    """Return the answer for programs: the run's date, command, commit and setting, and what follows.

    figures: those of this call's questions.
    failed: cases that raised or took too long.
    left_out: reason for each question that was left out, as a whole or in part.
    steadiness: least share of its stored rates that the machine reached, by question.
    changed: with --compare, what became larger or smaller, as factors.
    """
    every = [result for of in found.values() for result in of]
    failed = [(result, result.error.strip().splitlines()[-1]) for result in every if result.error]
    answer = {
        **{"date": run.date, "command": run.command, "commit": run.commit, **run.setting},
        "figures": [figure.as_json() for figure in figures_of(every)],
        "failed": [{"question": r.question, "case": r.key, "error": words} for r, words in failed],
        "left_out": dict(left_out),
        "steadiness": {name: min(r.steadiness for r in of) for name, of in found.items()},
    }
    return answer if changed is None else answer | {"changed": [figure.as_json() for figure in changed]}


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
    files = ("--text", command.text), ("--compare", command.compare)
    for flag, path in (*files, *(("--peer-python", python) for python in command.peer_python)):
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
    if setting.text is not None:
        depends["text"] = hashlib.sha256(setting.text.read_bytes()).hexdigest()[:12]
    roofs, date = setting.roofs, datetime.now().astimezone().isoformat(timespec="seconds")
    rates = {f"matrix product, {dtype}": human(rate, "FLOP/s") for dtype, rate in roofs.peak.items()}
    rates |= {"reading memory": human(roofs.bandwidth, "bytes/s"), "copying memory": human(roofs.copy, "bytes/s")}
    command = f"python -m benchmarks {words}".rstrip()
    more = {"rates": rates, "text": str(setting.text or "")}
    return Run(date=date, command=command, commit=results.commit(), setting=depends, **more)


def spent() -> float:
    """Return the seconds since the start."""
    return time.monotonic() - STARTED


def measure_all(
    questions: Mapping[str, Question], setting: Setting, run: Run, path: Path, done: Sequence[Result], only: str
) -> dict[str, str]:
    """Measure the cases that are not done, and save each when it is. Return why questions have cases without figures.

    With --quick a question begins only if there is time for all its cases. If earlier cases took longer than
    estimated, the others are expected to do so too.

    Args:
        path: file of results.
        done: results that may have cases of this run already.
        only: part of a case's name; others are left out.
    """
    console, left_out = Console(stderr=True), dict[str, str]()
    by_name = {name: question.cases(setting) for name, question in questions.items()}
    if only and not any(only in case.key for cases in by_name.values() for case in cases):
        some = ", ".join(repr(case.key) for cases in by_name.values() for case in cases[:3])
        raise ValueError(f"--cases {only!r} is in no case's name; names are {some} and others")
    whole = [r for r in done if not r.error and not r.run.disturbed]
    there = {(r.question, r.key) for r in whole if r.run.setting == run.setting}
    planned = {name: [case for case in cases if only in case.key] for name, cases in by_name.items()}
    todo = {name: [case for case in of if (name, case.key) not in there] for name, of in planned.items()}
    number, all_of_them = (sum(map(len, of.values())) for of in (todo, planned))
    if number < all_of_them and not setting.quick:
        say(console, f"{all_of_them - number} of {all_of_them} cases are already done; --fresh measures them again")
    begun, expected = spent(), 0.0
    with Progress(console, seconds_of(*todo.values()), delay=0, line_every=0, refresh_per_second=1) as bar:  # quiet
        for name, new in todo.items():
            for i, case in enumerate(new):
                slower = max(1.0, (spent() - begun) / expected) if expected else 1.0
                rest = seconds_of(new) if i == 0 else case.seconds
                if setting.quick and spent() + slower * rest > QUICK + GRACE * bool(i):
                    left_out[name] = NO_TIME if i == 0 else f"{i} of {len(new)} cases done; {NO_TIME}"
                    break
                bar.update(expected, f"{name} {case.key}")
                try:
                    measure_case(name, case, setting, run, path)
                except TimeOverError:
                    left_out[name] = f"{i} of {len(new)} cases done; {NO_TIME}"
                    break
                expected += case.seconds
    return left_out


def seconds_of(*questions: Sequence[Case]) -> float:
    """Return the estimated seconds of all cases."""
    return sum(case.seconds for cases in questions for case in cases)


def measure_case(name: str, case: Case, setting: Setting, run: Run, path: Path) -> None:
    """Measure a case and save its figures, or the reason why it failed.

    Raises: TimeOverError with --quick, where a lack of time is not a failure.
    """
    allowed = max(LEAST, TIMES * case.seconds)
    if setting.quick:
        allowed = min(allowed, max(1.0, QUICK + GRACE - spent()))
    setting.deadline.at = time.monotonic() + allowed
    try:
        steady = steadiness(setting.roofs, setting.device)
        figures = [dataclasses.replace(figure, question=name) for figure in case.run()]
        steady = min(steady, steadiness(setting.roofs, setting.device))
        disturbed = setting.roofs.disturbed or (setting.prices.disturbed if setting.prices else "")
        run = dataclasses.replace(run, disturbed=disturbed)
    except Exception as error:  # from the measured code; errors of writing are not caught here
        if setting.quick and isinstance(error, TimeOverError):
            raise
        why, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        if isinstance(error, TimeOverError):
            why = trace = f"stopped after {human(allowed, 's')}; its estimate was {human(case.seconds, 's')}"
        results.append(path, Result(question=name, key=case.key, run=run, error=trace))
        say(Console(stderr=True), f"{name} {case.key} failed: {why}", style="bold red")
        return
    results.append(path, Result(question=name, key=case.key, run=run, figures=figures, steadiness=round(steady, 3)))
