"""Read the command line of python -m benchmarks, and list its questions."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.questions import Question

MOST_THREADS = 1024


def parse(args: Sequence[str], known: Mapping[str, Question]) -> argparse.Namespace:
    """Read the arguments.

    Raises: ValueError for a wrong one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed and size of dsmini on this machine, compare them with predictions, and write a "
        "report: DIR/report.html. Figures are saved case by case; after a stop the same command continues.",
        epilog="Start with: python -m benchmarks --quick",
    )
    add = parser.add_argument
    every = f"questions to measure: {', '.join(known)} (default: all that take minutes, not hours)"
    add("names", nargs="*", metavar="NAME", help=every)
    add("--quick", action="store_true", help="small sizes, about two minutes; longer cases are left out")
    out = {"type": Path, "default": Path("results"), "metavar": "DIR"}
    add("--out", **out, help="folder for figures and report (default: results)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    dtypes = ["auto", "float32", "bfloat16"]
    add("--dtype", default="auto", choices=dtypes, help="(default: auto, the faster of the two here)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--text", type=Path, metavar="FILE", help="text for the question shakespeare: tinyshakespeare.txt")
    python = "another Python that has llama-cpp-python or ik-llama-cpp-python, for the question peers; may be repeated"
    add("--peer-python", type=Path, action="append", default=[], metavar="PYTHON", help=python)
    add("--compare", type=Path, metavar="OLD.jsonl", help="show what changed since another results.jsonl")
    add("--list", action="store_true", help="list the questions and end")
    add("--report-only", action="store_true", help="measure nothing; draw the report from saved figures")
    add("--fresh", action="store_true", help="measure everything again, this machine's rates too")
    options = parser.parse_intermixed_args(args)
    options.names = [hyphened if (hyphened := name.replace("_", "-")) in known else name for name in options.names]
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise ValueError(f"unknown question {unknown[0]!r}; there are {', '.join(known)}")
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        raise ValueError(f"--threads {options.threads} is out of range; use 1 to {MOST_THREADS}")
    if options.text and not options.text.is_file():
        raise ValueError(f"--text: there is no file {options.text}")
    if options.compare and not options.compare.is_file():
        raise ValueError(f"--compare: there is no file {options.compare}; name the results.jsonl of another run")
    for python in options.peer_python:
        if not python.is_file():
            raise ValueError(f"--peer-python: there is no file {python}; name a Python, such as venv/bin/python")
    for name in ("fresh", "quick", "threads", "device", "dtype", "text") if options.report_only else ():
        if getattr(options, name) != parser.get_default(name):
            raise ValueError(f"--report-only measures nothing, but --{name} is about measuring; leave one of them out")
    return options


def listed(known: Mapping[str, Question]) -> Iterator[str]:
    """Yield a line for each question."""
    wide = max(map(len, known), default=0)
    for name, question in known.items():
        more = "  (only by name)" if question.on_request else ""
        more = f"  (cannot run here: {question.needs})" if question.needs else more
        yield f"{name:{wide}}  {question.title}{more}"
