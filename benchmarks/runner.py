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

from benchmarks.question import Question, Setting
from benchmarks.session import Asked, Loader, Session, load
from dsmini.measure import calibration
from dsmini.measure.machine import DTYPES, pick_device, pick_dtype
from dsmini.measure.rates import Roofs
from dsmini.report import provenance
from dsmini.report.results import Run, Writer, read
from dsmini.report.terminal import measuring_roofs, say

NAMES = ("kv_cache", "moe", "fp8", "decode", "prefill", "train", "fp8_error", "mtp", "roofline", "peers")
"""The modules of questions/, in the order of the report."""

MOST_THREADS = 1024
OnPart = Callable[[float, str], None]
Measure = Callable[[torch.device, OnPart, bool], Roofs]


def main(args: Sequence[str], known: Mapping[str, Loader] | None = None, measure: Measure | None = None) -> int:
    """Run the command; returns its exit status.

    Args:
        known: how to get each question, by name; left out: those of questions/.
        measure: how to get the machine's roofs: kept ones, or measured, telling how far it is, or measured in any
            case; left out: dsmini/measure/calibration.py.
    """
    known = questions_here() if known is None else known
    options = _parse(args, known)
    if options.list:
        return _list(known)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    with contextlib.redirect_stdout(sys.stderr):  # what a measured library prints must not get between us and JSON
        status, line = _answer(args, options, known, measure or measure_roofs, console)
    if line is not None:
        print(json.dumps(line))
    return status


def questions_here() -> dict[str, Loader]:
    """Those of questions/ by name, which is the module's with hyphens; none of them is imported yet."""

    def loader(module: str) -> Loader:
        return lambda: importlib.import_module(module).QUESTION

    return {name.replace("_", "-"): loader(f"benchmarks.questions.{name}") for name in NAMES}


def measure_roofs(device: torch.device, on_part: OnPart, fresh: bool) -> Roofs:
    return calibration.load_or_measure(device, on_part=on_part, fresh=fresh)


def _parse(args: Sequence[str], known: Mapping[str, Loader]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure how fast and how small dsmini is on this machine, beside what was predicted, and draw a "
        "report of it: DIR/report.html. Figures are kept as they come; the same command goes on where it was stopped.",
        epilog="Start with: python -m benchmarks --quick",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"questions to measure: {', '.join(known)} (default: all)")
    add("--quick", action="store_true", help="small sizes: all in about two minutes on two cores")
    add(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where figures and report go (default: results)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="(default: auto, the faster of the two here)")
    add("--threads", type=int, metavar="N", help="threads of the CPU (default: as many as torch takes)")
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
    if options.compare and not options.compare.is_file():
        raise ValueError(f"--compare: there is no file {options.compare}; name the results.jsonl of another run")
    if options.report_only:
        asked = {
            "--fresh": options.fresh,
            "--quick": options.quick,
            "--threads": options.threads,
            "--device": options.device != "auto",
            "--dtype": options.dtype != "auto",
        }
        for flag, given in asked.items():
            if given:
                raise ValueError(f"--report-only measures nothing and {flag} is about measuring; leave one of them out")
    return options


def _list(known: Mapping[str, Loader]) -> int:
    console = Console()
    wide = max((len(name) for name in known), default=0)
    for name in known:
        question, reason = load(known, name)
        reason = f"  (cannot run here: {reason})" if reason else ""
        say(console, f"{name:{wide}}  {question.title if question else ''}{reason}")
    return 0


def _answer(
    args: Sequence[str], options: argparse.Namespace, known: Mapping[str, Loader], measure: Measure, console: Console
) -> tuple[int, dict[str, Any] | None]:
    """Exit status, and the last line."""
    path = options.out / "results.jsonl"
    compared: Path | None = options.compare
    old = read(compared) if compared else None  # before anything is measured: it may be damaged
    if old is not None and not any(finished.done for finished in old.by_fingerprint.values()):
        raise ValueError(f"--compare: {compared} has no figures; name the results.jsonl of a run that measured some")
    if options.report_only:
        results = read(path)
        if results.latest is None or not any(finished.done for finished in results.by_fingerprint.values()):
            raise ValueError(f"{path} has no figures yet; leave out --report-only to measure some")
        session = Session(console=console, out=options.out, known=known, names=options.names or list(known))
        session.show(results)
        having = [finished for name in session.names if (finished := results.of_question(name))]
        status = 1 if any([session.unequal(finished) for finished in having]) else 0
    else:
        questions = _chosen(options.names, known, console)
        device = pick_device(options.device)
        with Writer(path) as writer:
            read(path)  # a damaged file is refused before anything is measured
            run, roofs, asked = _plan(args, options, questions, device, measure, console)
            session = Session(console=console, out=options.out, known=known, names=[q.name for q in questions])
            status = session.measure(writer, run, roofs, asked)
            if status == 130:
                say(console, f"stopped; what is done is kept in {path}. Go on with: {_again(args)}")
                return status, session.last_line(read(path))
        results = read(path)
    if old is not None and compared is not None:
        session.compare(results, old, compared)
    if session.undrawn:
        return 1, session.last_line(results)
    say(console, f"\nreport  {options.out / 'report.html'}")
    return status, session.last_line(results)


def _again(args: Sequence[str]) -> str:
    return provenance.command([arg for arg in args if arg != "--fresh"])


def _chosen(names: Sequence[str], known: Mapping[str, Loader], console: Console) -> list[Question]:
    """The questions to measure.

    Raises: ValueError for one that was named and cannot run here.
    """
    chosen = []
    for name in known if not names else [name for name in known if name in names]:
        question, reason = load(known, name)
        if reason and names:
            raise ValueError(f"{name} cannot run here: {reason}")
        if reason:
            say(console, f"{name} is left out: {reason}", style="dim")
        elif question:
            chosen.append(question)
    if not chosen:
        raise ValueError("no question can run here; python -m benchmarks --list says why")
    return chosen


def _plan(
    args: Sequence[str],
    options: argparse.Namespace,
    questions: Sequence[Question],
    device: torch.device,
    measure: Measure,
    console: Console,
) -> tuple[Run, Roofs, list[Asked]]:
    """What the run is, and what is asked with which cases."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with measuring_roofs(console) as on_part:
        roofs = measure(device, on_part, options.fresh)
    dtype = _pick_dtype(options.dtype, device, roofs)
    setting = Setting(quick=options.quick, device=device, dtype=dtype, roofs=roofs)
    asked = [(question, question.cases(setting)) for question in questions]
    run = Run(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=provenance.command(args),
        commit=provenance.commit(),
        code=provenance.code(),
        versions=provenance.versions(),
        quick=options.quick,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        machine=roofs.card,
        plan={question.name: [case.key for case in cases] for question, cases in asked},
        fresh=options.fresh,
    )
    return run, roofs, asked


def _pick_dtype(name: str, device: torch.device, roofs: Roofs) -> torch.dtype:
    """Pick as dsmini.measure.machine.pick_dtype does, but from the kept rates where known: a rerun chooses the same."""
    peak = roofs.peak
    if name == "auto" and {"float32", "bfloat16"} <= set(peak):
        return torch.bfloat16 if peak["bfloat16"] > 1.2 * peak["float32"] else torch.float32
    return pick_dtype(name, device)
