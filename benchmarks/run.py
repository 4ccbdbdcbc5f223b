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
from benchmarks.results import Run, Writer
from dsmini import ops
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
        for name, question in known.items():
            more = f"  (cannot run here: {question.needs})" if question.needs else ""
            more = more or "  (only by name)" * question.on_request
            say(console, f"{name:{max(map(len, known))}}  {question.title}{more}")
        return 0
    ops.check_forced()
    old = results.read(command.compare) if command.compare else None  # before measuring, because it may be damaged
    if old and not old.cases:
        raise ValueError(f"--compare: {command.compare} has no results; name the results.jsonl of another run")
    asked = [name for name in known if not command.names or name in command.names]
    path, interrupted, left_out = command.out / "results.jsonl", False, dict[str, str]()
    if command.report_only:
        found = results.read(path)
        if not found.cases:
            raise ValueError(f"{path} has no results yet; leave out --report-only to measure some")
    else:
        left_out |= {name: reason for name in asked if (reason := why_not(known[name], command))}
        asked = [name for name in asked if name not in left_out]
        if not asked:
            raise ValueError("no question can run here; python -m benchmarks --list gives the reasons")
        questions, device = {name: known[name] for name in asked}, pick_device(command.device)
        with Writer(path) as writer, contextlib.redirect_stdout(sys.stderr):  # measured libraries may print
            setting = setting_of(command, device, measure or calibration.load_or_measure)
            interrupted = measure_cases(command, questions, setting, writer, " ".join(args), left_out)
            found = writer.results
    asked = [name for name in asked if name not in left_out]
    answer = page.Answer(found, known, asked, left_out, old)
    answer.show(console, tables=bool(command.names))
    status = answer.draw(console, command.out) or answer.problems(console)
    if interrupted:
        status = 130
        say(console, f"stopped; finished cases are saved in {path}, and the same command without --fresh continues")
    if command.json:
        print(json.dumps(answer.as_json()))
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
    label = "measuring this machine's rates, once: half a minute"
    with Progress(Console(stderr=True), 1.0, label, line_every=1, refresh_per_second=1) as bar:
        seconds = QUICK_RATES if command.quick else calibration.BUDGET
        roofs = measure(device, on_part=bar.update, fresh=command.fresh, seconds=seconds)
    dtype = pick_dtype(command.dtype, device)
    if command.dtype == "auto" and {"float32", "bfloat16"} <= set(roofs.peak):  # a rerun picks the same
        dtype = faster_dtype(roofs.peak["float32"], roofs.peak["bfloat16"])
    more = {"text": command.text, "peer_pythons": command.peer_python, "out": command.out}
    return Setting(quick=command.quick, device=device, dtype=dtype, roofs=roofs, **more)


def run_of(setting: Setting, words: str, fresh: bool) -> Run:
    """Return the provenance of the figures of this call, with an empty plan."""
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
    date, rates = datetime.now().astimezone().isoformat(timespec="seconds"), dataclasses.asdict(setting.roofs)
    command = f"python -m benchmarks {words}".rstrip()
    return Run(date=date, command=command, commit=results.commit(), setting=depends, rates=rates, fresh=fresh)


def spent() -> float:
    """Return the seconds since the start."""
    return time.monotonic() - STARTED


def measure_cases(
    command: BenchmarksCommand,
    questions: Mapping[str, Question],
    setting: Setting,
    writer: Writer,
    words: str,
    left_out: dict[str, str],
) -> bool:
    """Measure the cases that are not done, and save each when it is. Return True if Ctrl-C ended it.

    Args:
        words: the command line.
        left_out: gets the questions for which --quick has no time, as a whole.
    """
    run, quick = run_of(setting, words, command.fresh), command.quick
    cases = {name: question.cases(setting) for name, question in questions.items()}
    done = () if command.fresh else writer.results.cases
    todo = {name: [c for c in of if (run.id, name, c.key) not in done] for name, of in cases.items()}
    estimates = {name: sum(case.estimate(setting) for case in of) for name, of in todo.items()}
    left = QUICK - spent() if quick else float("inf")
    for name, seconds in estimates.items():
        if seconds > left:
            left_out[name] = NO_TIME
            del todo[name]
        else:
            left -= seconds
    run = dataclasses.replace(run, plan={name: [case.key for case in cases[name]] for name in todo})
    writer.add("run", **dataclasses.asdict(run))
    console, planned, new = Console(stderr=True), sum(map(len, cases.values())), sum(map(len, todo.values()))
    if planned > new and not quick:
        say(console, f"{planned - new} of {planned} cases are already done; --fresh measures them again")
    expected, begun = 0.0, time.monotonic()
    how: dict[str, Any] = {"delay": 0, "line_every": 0, "refresh_per_second": 1}  # a quiet bar
    try:
        with Progress(console, sum(estimates[name] for name in todo), **how) as bar:
            for name, of in todo.items():
                slower = max(1.0, (time.monotonic() - begun) / expected) if expected > 10 else 1.0
                if quick and of and spent() + slower * estimates[name] > QUICK:
                    left_out[name] = NO_TIME
                for case in of if name not in left_out else ():
                    bar.update(expected, f"{name} {case.key}", left=slower * (bar.total - expected))
                    try:
                        measure_case(name, case, setting, run, writer)
                    except TookTooLong:
                        left_out[name] = NO_TIME
                        break
                    expected += case.estimate(setting)
    except KeyboardInterrupt:
        return True
    return False


def measure_case(name: str, case: Case, setting: Setting, run: Run, writer: Writer) -> None:
    """Measure a case and save its figures, or the reason why it failed.

    Raises: TookTooLong with --quick.
    """
    estimate, start = case.estimate(setting), time.monotonic()
    allowed = max(LEAST, TIMES * estimate)
    if setting.quick:
        allowed = min(allowed, max(1.0, QUICK + GRACE - spent()))
    place = {"setting": run.id, "question": name, "key": case.key}
    try:
        with limited(allowed):
            steady = steadiness(setting.roofs, setting.device)
            figures = [dataclasses.replace(figure, question=name).as_json() for figure in case.run()]
            steady = min(steady, steadiness(setting.roofs, setting.device))
    except (Exception, TookTooLong) as error:  # from the measured code; errors of writing are not caught here
        if setting.quick and isinstance(error, TookTooLong):
            raise
        why, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        if isinstance(error, TookTooLong):
            why = trace = f"stopped after {duration(allowed)}; its estimate was {duration(estimate)}"
        writer.add("error", **place, error=trace)
        say(Console(stderr=True), f"{name} {case.key} failed: {why}", style="bold red")
        return
    seconds = round(time.monotonic() - start, 3)
    writer.add("case", **place, seconds=seconds, figures=figures, steadiness=round(steady, 3))
