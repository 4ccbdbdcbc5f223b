"""python -m benchmarks: which questions, which cases are left, measure them, show them.

Everything people read goes to the standard error; the last and only line of the standard output is JSON.
"""

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import answers
from benchmarks.question import Question, Setting
from benchmarks.session import Loader, Session, load
from dsmini import ops
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.machine import DTYPES, pick_device, pick_dtype
from dsmini.measure import calibration
from dsmini.measure.rates import Roofs
from dsmini.report import provenance
from dsmini.report.provenance import Run
from dsmini.report.results import ResultsWriter, read

NAMES = ("kv_cache", "moe", "fp8", "decode", "prefill", "train", "fp8_error", "mtp", "roofline", "peers", "quantize")
NAMES += ("shakespeare", "moe_or_dense")
"""The modules of questions/, in the order of the report."""

MOST_THREADS = 1024
Measure = Callable[..., Roofs]


def main(
    args: Sequence[str], known: Mapping[str, Loader] | None = None, measure: Measure = calibration.load_or_measure
) -> int:
    """Run the command. Return its exit status.

    Args:
        known: loads each question, by name; None for those of questions/.
        measure: returns the rates of a device.
    """
    known = questions_here() if known is None else known
    options = _parse(args, known)
    if options.list:
        return _list(known)
    ops.check_forced()
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    with contextlib.redirect_stdout(sys.stderr):  # what a measured library prints must not get between us and JSON
        status, line = _answer(args, options, known, measure, console)
    if line is not None:
        print(json.dumps(line))
    return status


def questions_here() -> dict[str, Loader]:
    """Return the loaders of questions/ by name: the module's, with hyphens. None of them is imported yet."""

    def loader(module: str) -> Loader:
        return lambda: importlib.import_module(module).QUESTION

    return {name.replace("_", "-"): loader(f"benchmarks.questions.{name}") for name in NAMES}


def _parse(args: Sequence[str], known: Mapping[str, Loader]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure how fast and how small dsmini is on this machine, next to what was predicted, and draw a "
        "report of it: DIR/report.html. Figures are kept as they come; the same command goes on where it was stopped.",
        epilog="Start with: python -m benchmarks --quick",
    )
    add = parser.add_argument
    every = f"questions to measure: {', '.join(known)} (default: all that take no more than minutes)"
    add("names", nargs="*", metavar="NAME", help=every)
    add("--quick", action="store_true", help="small sizes, in about two minutes; what takes longer here is left out")
    out = {"type": Path, "default": Path("results"), "metavar": "DIR"}
    add("--out", **out, help="where figures and report go (default: results)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="(default: auto, the faster of the two here)")
    add("--threads", type=int, metavar="N", help="threads of the CPU (default: as many as torch takes)")
    add("--text", type=Path, metavar="FILE", help="the text that shakespeare trains on: tinyshakespeare.txt")
    add("--compare", type=Path, metavar="OLD.jsonl", help="show what changed since another results.jsonl")
    add("--list", action="store_true", help="list the questions and end")
    add("--report-only", action="store_true", help="measure nothing: draw the report from the figures that are kept")
    add("--fresh", action="store_true", help="measure again what was measured before, this machine's rates too")
    options = parser.parse_intermixed_args(args)
    options.names = [hyphened if (hyphened := name.replace("_", "-")) in known else name for name in options.names]
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise ValueError(f"unknown question {unknown[0]!r}; there are {', '.join(known)}")
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        raise ValueError(f"--threads {options.threads} is no number of threads; use 1 to {MOST_THREADS}")
    if options.text and not options.text.is_file():
        raise ValueError(f"--text: there is no file {options.text}")
    if options.compare and not options.compare.is_file():
        raise ValueError(f"--compare: there is no file {options.compare}; name the results.jsonl of another run")
    for name in ("fresh", "quick", "threads", "device", "dtype", "text") if options.report_only else ():
        if getattr(options, name) != parser.get_default(name):
            raise ValueError(f"--report-only measures nothing and --{name} is about measuring; leave one of them out")
    return options


def _list(known: Mapping[str, Loader]) -> int:
    console = Console()
    wide = max((len(name) for name in known), default=0)
    for name in known:
        question, reason = load(known, name)
        reason = f"  (cannot run here: {reason})" if reason else ""
        reason = reason or ("  (only by name)" if question and question.on_request else "")
        say(console, f"{name:{wide}}  {question.title if question else ''}{reason}")
    return 0


def _answer(
    args: Sequence[str], options: argparse.Namespace, known: Mapping[str, Loader], measure: Measure, console: Console
) -> tuple[int, dict[str, Any] | None]:
    """Return the exit status and the last line."""
    path, compared = options.out / "results.jsonl", options.compare
    old = read(compared) if compared else None  # before anything is measured: it may be damaged
    if old and old.is_empty:
        raise ValueError(f"--compare: {compared} has no figures; name the results.jsonl of a run that measured some")
    session = Session(console=console, out=options.out, known=known, names=options.names or list(known))
    if options.report_only:
        results = read(path)
        if results.is_empty:
            raise ValueError(f"{path} has no figures yet; leave out --report-only to measure some")
        status = session.show(results)
    else:
        questions = _chosen(options.names, known, options.text is not None, console)
        session.names = [question.name for question in questions]
        device = pick_device(options.device)
        with ResultsWriter(path) as writer:
            read(path)  # a damaged file is refused before anything is measured
            setting = _setting(options, device, measure, console)
            asked = [(question, question.cases(setting)) for question in questions]
            status = session.measure(writer, _run(args, options, setting), setting, asked)
        results = read(path)
    if status == 130:
        again = provenance.command(["benchmarks", *(arg for arg in args if arg != "--fresh")])
        say(console, f"stopped; what is done is kept in {path}. Go on with: {again}")
        return status, answers.last_line(results, session.names, ())
    if old is not None:
        session.compare(results, old, compared)
    if session.undrawn:
        status = 1
    else:
        say(console, f"\nreport  {options.out / 'report.html'}")
    return status, answers.last_line(results, session.names, session.changes)


def _chosen(names: Sequence[str], known: Mapping[str, Loader], has_text: bool, console: Console) -> list[Question]:
    """Return the questions to measure.

    Raises: ValueError for one that was named and cannot run here.
    """
    chosen = []
    for name in known if not names else [name for name in known if name in names]:
        question, reason = load(known, name)
        if question and question.on_request and not names:
            say(console, f"{name} is left out: it takes long, and is measured only by name", style="dim")
            continue
        if question and question.needs_text and not has_text:
            reason = reason or f"it reads {question.needs_text}; name the file by --text FILE"
        if reason and names:
            raise ValueError(f"{name} cannot run here: {reason}")
        if reason:
            say(console, f"{name} is left out: {reason}", style="dim")
        elif question:
            chosen.append(question)
    if not chosen:
        raise ValueError("no question can run here; python -m benchmarks --list says why")
    return chosen


def _setting(options: argparse.Namespace, device: torch.device, measure: Measure, console: Console) -> Setting:
    """Return what all cases share. Measures the machine's rates if none are kept."""
    if options.threads:
        torch.set_num_threads(options.threads)
    label = "measuring this machine's rates, half a minute; they are kept"
    with Progress(console, 1.0, label, line_every=1, refresh_per_second=1) as bar:
        roofs = measure(device, on_part=bar.update, fresh=options.fresh)
    dtype = _pick_dtype(options.dtype, device, roofs)
    return Setting(quick=options.quick, device=device, dtype=dtype, roofs=roofs, text=options.text)


def _run(args: Sequence[str], options: argparse.Namespace, setting: Setting) -> Run:
    """Return where the figures come from. What is measured is still to be planned."""
    return Run(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=provenance.command(["benchmarks", *args]),
        commit=provenance.commit(),
        code=provenance.code(),
        versions=provenance.versions() | {"kernels": ops.serving("cpu")},
        quick=options.quick,
        device=str(setting.device),
        dtype=str(setting.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        machine=setting.roofs.card,
        plan={},
        fresh=options.fresh,
    )


def _pick_dtype(name: str, device: torch.device, roofs: Roofs) -> torch.dtype:
    """Pick as dsmini.machine.pick_dtype does, but from the kept rates where known: a rerun chooses the same."""
    peak = roofs.peak
    if name == "auto" and {"float32", "bfloat16"} <= set(peak):
        return torch.bfloat16 if peak["bfloat16"] > 1.2 * peak["float32"] else torch.float32
    return pick_dtype(name, device)
