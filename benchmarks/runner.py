"""Run python -m benchmarks: choose questions and setting, measure, and show the results.

Text for people goes to the standard error; the only line of the standard output is JSON.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import torch
from rich.console import Console

from benchmarks import answers
from benchmarks.case import Setting
from benchmarks.command_line import listed, parse
from benchmarks.display import Display
from benchmarks.questions import Question
from benchmarks.session import Session
from dsmini import ops
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.machine import faster_dtype, pick_device, pick_dtype
from dsmini.measure import calibration
from dsmini.measure.rates import Roofs
from dsmini.ops.explanation import instruction_set
from dsmini.report import provenance
from dsmini.report.provenance import Run
from dsmini.report.results import Results, ResultsWriter, read

Measure = Callable[..., Roofs]


def main(args: Sequence[str], known: Mapping[str, Question], measure: Measure = calibration.load_or_measure) -> int:
    """Run the command. Return its exit status.

    Args:
        known: the questions by name.
        measure: returns the rates of a device.
    """
    options = parse(args, known)
    if options.list:
        print("\n".join(listed(known)))
        return 0
    ops.check_forced()
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    with contextlib.redirect_stdout(sys.stderr):  # measured libraries may print, but stdout holds JSON alone
        status, line = _answer(args, options, known, measure, console)
    print(json.dumps(line))
    return status


def _answer(
    args: Sequence[str], options: argparse.Namespace, known: Mapping[str, Question], measure: Measure, console: Console
) -> tuple[int, dict[str, Any]]:
    """Measure or only show; return the exit status and the last line."""
    compared = options.compare
    old = read(compared) if compared else None  # before measuring, because it may be damaged
    if old and old.is_empty:
        raise ValueError(f"--compare: {compared} has no figures; name the results.jsonl of a run that measured some")
    names = [name for name in known if not options.names or name in options.names]
    display = Display(console=console, out=options.out, known=known, names=names)
    if options.report_only:
        results = read(display.path)
        if results.is_empty:
            raise ValueError(f"{display.path} has no figures yet; leave out --report-only to measure some")
        status = display.show_all(results)
    else:
        status, results = _measure(args, options, display, measure)
    if status == 130:
        again = provenance.command(["benchmarks", *(arg for arg in args if arg != "--fresh")])
        say(console, f"stopped; finished cases are saved in {display.path}. Continue with: {again}")
        return status, answers.last_line(results, display.names, ())
    if old is not None:
        display.compare(results, old, compared)
    for warning in answers.busy_warnings(results, display.names):
        say(console, f"\n{warning}", style="yellow")
    if display.undrawn:
        status = 1
    else:
        say(console, f"\nreport  {options.out / 'report.html'}")
    return status, answers.last_line(results, display.names, display.changes)


def _measure(
    args: Sequence[str], options: argparse.Namespace, display: Display, measure: Measure
) -> tuple[int, Results]:
    """Measure the questions that can run here. Return the exit status and all results."""
    questions = _chosen(options, display)
    display.names = [question.name for question in questions]
    device = pick_device(options.device)
    with ResultsWriter(display.path) as writer:
        setting = _setting(options, device, measure, display.console)
        asked = [(question, question.cases(setting)) for question in questions]
        session = Session(display=display, writer=writer, setting=setting, run=_run(args, options, setting))
        return session.measure(asked), writer.results


def _chosen(options: argparse.Namespace, display: Display) -> list[Question]:
    """Return the questions to measure.

    Raises: ValueError for a question that was named and cannot run here.
    """
    chosen = []
    for question in (display.known[name] for name in display.names):
        name, reason = question.name, question.needs
        if question.on_request and not options.names:
            say(display.console, f"{name} is left out: it takes long; name it to measure it", style="dim")
            continue
        if question.needs_text and not options.text:
            reason = reason or f"it reads {question.needs_text}; name the file by --text FILE"
        if reason and options.names:
            raise ValueError(f"{name} cannot run here: {reason}")
        if reason:
            say(display.console, f"{name} is left out: {reason}", style="dim")
        else:
            chosen.append(question)
    if not chosen:
        raise ValueError("no question can run here; python -m benchmarks --list gives the reasons")
    return chosen


def _setting(options: argparse.Namespace, device: torch.device, measure: Measure, console: Console) -> Setting:
    """Return the settings that all cases share. Measure the machine's rates if none are stored."""
    if options.threads:
        torch.set_num_threads(options.threads)
    label = "measuring this machine's rates, once: half a minute"
    with Progress(console, 1.0, label, line_every=1, refresh_per_second=1) as bar:
        roofs = measure(device, on_part=bar.update, fresh=options.fresh)
    dtype = _pick_dtype(options.dtype, device, roofs)
    more = {"text": options.text, "peer_pythons": tuple(options.peer_python), "out": options.out}
    return Setting(quick=options.quick, device=device, dtype=dtype, roofs=roofs, **more)


def _run(args: Sequence[str], options: argparse.Namespace, setting: Setting) -> Run:
    """Return the provenance of the figures, with an empty plan."""
    return Run(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=provenance.command(["benchmarks", *args]),
        commit=provenance.commit(),
        code=provenance.code(),
        versions=provenance.versions()
        | {"kernels": f"cpu {instruction_set()}" if ops.serving("cpu") == "cpu" else ops.serving("cpu")},
        quick=options.quick,
        device=str(setting.device),
        dtype=str(setting.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        machine=setting.roofs.card,
        plan={},
        fresh=options.fresh,
    )


def _pick_dtype(name: str, device: torch.device, roofs: Roofs) -> torch.dtype:
    """Pick as dsmini.machine.pick_dtype does, but from stored rates if possible, so that a rerun picks the same."""
    if name == "auto" and {"float32", "bfloat16"} <= set(roofs.peak):
        return faster_dtype(roofs.peak["float32"], roofs.peak["bfloat16"])
    return pick_dtype(name, device)
