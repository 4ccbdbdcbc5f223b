"""The goodput of a run for people: a table, a few sentences, and a picture with a bar for each attempt.

python -m dsmini.distributed.goodput_report RUN [--out FILE.png] [--json]
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsmini.atomic import new_file
from dsmini.console.command import run
from dsmini.console.commandline import Help, parse
from dsmini.console.messages import say
from dsmini.distributed.goodput import KINDS, MICROSECONDS, Goodput, Stretch, goodput
from dsmini.distributed.pictures import check_picture
from dsmini.report import Table
from dsmini.report.terminal import show_table
from dsmini.report.units import duration, human, plural

WORDS = {
    "productive": "steps that count",
    "lost": "steps lost and done again",
    "saving": "saving",
    "restoring": "starting and restoring",
    "validating": "validating and plotting",
    "down": "down",
    "other": "other",
}
COLOURS = {
    **{"productive": "#1f4e8c", "lost": "#c8501e", "saving": "#e0a526", "restoring": "#8c6bb1"},
    **{"validating": "#5aa469", "down": "#3b3b3b", "other": "#c9d3e0"},
}
FINEST = 2000
"""Parts of the whole time that a picture can show."""


def goodput_table(result: Goodput) -> Table:
    """Return a table of the kinds: time, and share in per cent. The printed shares add up to 100.0 too."""
    tenths = _rounded([result.microseconds[kind] for kind in KINDS], 1000)
    rows = [
        (WORDS[kind], _words(result.microseconds[kind] / MICROSECONDS), f"{share / 10:.1f} %")
        for kind, share in zip(KINDS, tenths, strict=True)
    ]
    rows.append(("total", _words(result.total / MICROSECONDS), f"{sum(tenths) / 10:.1f} %"))
    return Table(columns=("kind", "time", "share"), rows=rows, numeric=("time", "share"))


def goodput_notes(result: Goodput) -> list[str]:
    """Return lines about the attempts, and about the figures that decide the goodput."""
    lost = f"{plural(result.lost_steps, 'step')} lost" if result.lost_steps else "none lost"
    lines = [
        f"{plural(result.attempts, 'attempt')}, {plural(result.failures, 'failure')}; "
        f"{plural(result.steps, 'step')} that count, {lost}"
    ]
    named = {
        "mean time between failures": result.mean_seconds_between_failures,
        "a restart takes": result.restart_seconds,
        "a save blocks training for": result.saving_seconds,
        "training between two saves": result.interval_seconds,
    }
    return lines + [f"{name}: {_words(value)}" for name, value in named.items() if value is not None]


def plot_goodput(result: Goodput, path: Path) -> None:
    """Write a picture: one bar over time for each attempt, coloured by kind."""
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw

    figure = Figure(figsize=(9, 1.6 + 0.32 * min(result.attempts, 40)), layout="constrained")
    axes = figure.subplots()
    drawn = bars(result)
    for kind in (kind for kind in KINDS if result.microseconds[kind]):
        of_kind = [bar for bar in drawn if bar.kind == kind]
        for attempt in sorted({bar.attempt for bar in of_kind}):
            places = [_place(bar) for bar in of_kind if bar.attempt == attempt]
            axes.broken_barh(places, (attempt - 0.4, 0.8), facecolors=COLOURS[kind])
        axes.barh(1, 0, color=COLOURS[kind], label=f"{WORDS[kind]}, {result.share(kind):.1%}")
    axes.set_ylim(result.attempts + 0.5, 0.5)
    if result.attempts <= 20:
        axes.set_yticks(range(1, result.attempts + 1))
    share = f"{result.share('productive'):.1%} of the time are steps that count"
    axes.set(xlabel="seconds since the first start", ylabel="attempt", title=share)
    if result.total:
        figure.legend(loc="outside right upper", frameon=False)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def bars(result: Goodput) -> list[Stretch]:
    """Return the parts to draw: those of one kind are joined where no eye can tell them apart."""
    finest = result.total // FINEST
    joined: list[Stretch] = []
    by_kind = sorted(result.spans, key=lambda span: (span.attempt, KINDS.index(span.kind), span.start))
    for _, group in itertools.groupby(by_kind, key=lambda span: (span.attempt, span.kind)):
        last: Stretch | None = None
        for span in group:
            if last is not None and span.start - last.end <= finest:
                last = Stretch(start=last.start, end=span.end, kind=span.kind, attempt=span.attempt)
            else:
                joined += [] if last is None else [last]
                last = span
        joined += [] if last is None else [last]
    return joined


def _place(bar: Stretch) -> tuple[float, float]:
    """Return where a bar begins and how long it is, in seconds."""
    return bar.start / MICROSECONDS, (bar.end - bar.start) / MICROSECONDS


def _words(seconds: float) -> str:
    return human(seconds, "s") if seconds < 90 else duration(seconds)


def _rounded(parts: Sequence[int], whole: int) -> list[int]:
    """Return whole numbers in proportion to the parts that add up to `whole`: the largest remainders are rounded up."""
    total = sum(parts)
    if not total:
        return [0] * len(parts)
    floors = [part * whole // total for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: -(parts[i] * whole % total))
    for i in by_remainder[: whole - sum(floors)]:
        floors[i] += 1
    return floors


@dataclass(frozen=True, kw_only=True)
class GoodputCommand:
    """Show how a run used its time: steps that count, lost steps, saving, restoring, and time when it was down.

    RUN is the folder of a training run with events.jsonl, which is only read. It may still be training.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a training run."""
    out: Path | None = None
    """File.png for a picture: a bar over time for each attempt."""
    json: bool = False
    """Print the shares as a line of JSON instead."""


HELP = Help(usage="RUN [FLAGS]", examples=("runs/toy-001", "runs/toy-001 --out goodput.png"), main=("out", "json"))


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(GoodputCommand, "distributed.goodput_report", args, help=HELP)
    if command.run is None:
        raise ValueError("no run is named; name the folder of one, such as runs/toy-001")
    if command.out is not None:
        check_picture(command.out)
    result = goodput(command.run)
    console = Console(stderr=command.json)
    if command.json:
        print(json.dumps({kind: result.share(kind) for kind in KINDS} | {"seconds": result.total / MICROSECONDS}))
    else:
        show_table(console, goodput_table(result), f"Time of {command.run}")
        for line in goodput_notes(result):
            say(console, line)
    if command.out is not None:
        plot_goodput(result, command.out)
        say(console, f"written  {command.out}")
    return 0


if __name__ == "__main__":
    run(main)
