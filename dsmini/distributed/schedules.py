"""python -m dsmini.distributed.schedules: pipeline schedules side by side, simulated: bubbles, memory, pictures.

programs.py has the order of the actions of each schedule, timelines.py the pictures.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.console.command import run
from dsmini.console.commandline import Help, parse
from dsmini.console.messages import say
from dsmini.distributed.pictures import make_folder
from dsmini.distributed.programs import CHUNKS, Action, Programs, programs
from dsmini.distributed.timelines import Span, Timeline, draw

__all__ = ["CHUNKS", "Action", "Programs", "Timeline", "bubble_formula", "programs", "simulate"]


def simulate(
    programs: Programs,
    forward: float,
    backward_input: float,
    backward_weight: float,
    *,
    overlap: float | None = None,
    send: float = 0.0,
) -> Timeline:
    """Run programs without processes: each action starts when its rank is free and its input has come.

    A forward needs the forward of the stage before. A backward (B or I) needs its own forward, and the backward of the
    stage after. W needs its I. All times have the same unit, any.

    Args:
        forward: time of a forward of one stage and micro-batch; backward_input and backward_weight likewise.
        overlap: time of an overlapped forward and backward together. None: the sum of both, one after the other. The
            pair starts when all its inputs are there, and sends when both are done, as torch's runtime does.
        send: time from the end of an action until its result is on another rank. A rank sends while it computes.

    Raises: ValueError for negative times, and for programs that wait for each other or for what is in none of them.
    """
    times = {"F": forward, "I": backward_input, "W": backward_weight, "B": backward_input + backward_weight}
    if min(*times.values(), send, overlap or 0.0) < 0 or max(times.values()) <= 0:
        raise ValueError(f"times {times}, overlap={overlap}, send={send} are not times; use numbers from 0, not all 0")
    last_stage = max((action.stage for program in programs for action in program), default=0)
    ends: dict[tuple[str, int, int], tuple[float, int]] = {}  # when each result is there, and on which rank
    at, free = [0] * len(programs), [0.0] * len(programs)
    spans: list[list[Span]] = [[] for _ in programs]
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                together = program[at[rank] : at[rank] + 1 + program[at[rank]].overlaps]
                arrivals = [_arrival(action, rank, last_stage, ends, send) for action in together]
                if None in arrivals:
                    break
                start = max(free[rank], *(arrival for arrival in arrivals if arrival is not None))
                spans[rank] += _spans(together, start, [times[action.kind] for action in together], overlap)
                free[rank] = spans[rank][-1].end
                ends |= {_result(action): (free[rank], rank) for action in together}
                at[rank] += len(together)
                moved = True
    stuck = [f"rank {r} at {_words(p[i])}" for r, (p, i) in enumerate(zip(programs, at, strict=True)) if i < len(p)]
    if stuck:
        raise ValueError(f"the programs wait for results that never come, {', '.join(stuck)}; check their order")
    return Timeline(ranks=tuple(map(tuple, spans)))


def _arrival(
    action: Action, rank: int, last_stage: int, ends: dict[tuple[str, int, int], tuple[float, int]], send: float
) -> float | None:
    """Return when all that an action needs is on its rank; None if some of it is not computed yet."""
    stage, microbatch = action.stage, action.microbatch
    needs = {
        "F": [("F", stage - 1, microbatch)] if stage else [],
        "W": [("input", stage, microbatch)],
    }.get(action.kind, [("F", stage, microbatch)])
    if action.kind in "BI" and stage < last_stage:
        needs = [*needs, ("input", stage + 1, microbatch)]
    if any(need not in ends for need in needs):
        return None
    return max((end + (send if place != rank else 0.0) for end, place in (ends[n] for n in needs)), default=0.0)


def _result(action: Action) -> tuple[str, int, int]:
    return "input" if action.kind in "BI" else action.kind, action.stage, action.microbatch


def _spans(together: Sequence[Action], start: float, times: Sequence[float], overlap: float | None) -> list[Span]:
    """Return one action, or two: at the same time if they overlap, else one after the other."""
    spans: list[Span] = []
    for action, time in zip(together, times, strict=True):
        if len(together) == 2 and overlap is not None:
            begin, end = start, start + overlap
        else:
            begin = spans[-1].end if spans else start
            end = begin + time
        spans.append(Span(kind=action.kind, stage=action.stage, microbatch=action.microbatch, start=begin, end=end))
    return spans


def _words(action: Action) -> str:
    return f"{action.kind} of stage {action.stage}, micro-batch {action.microbatch}"


def bubble_formula(
    name: str,
    n_ranks: int,
    forward: float,
    backward_input: float,
    backward_weight: float,
    overlap: float | None = None,
) -> float:
    """Return the published bubble of a rank, in the unit of the times.

    Times are of one stage, as for `simulate`. For ZBV this is the formula of ZB1P, and for DualPipeV that of DualPipe
    on twice as many ranks. Both hold where F, I and W are equal; otherwise the simulated bubble may be shorter.

    Source: DeepSeek-V3 report, table 2: (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W), with PP stages.
    """
    if name not in CHUNKS:
        raise ValueError(f"there is no schedule '{name}'; use one of {', '.join(CHUNKS)}")
    backward = backward_input + backward_weight
    if name in ("1f1b", "interleaved1f1b"):
        return (n_ranks - 1) * (forward + backward)
    if name in ("zero_bubble", "zbv"):
        return (n_ranks - 1) * (forward + backward - 2 * backward_weight)
    together = forward + backward if overlap is None else overlap
    stages = n_ranks * CHUNKS[name]
    return (stages / 2 - 1) * (together + backward - 3 * backward_weight)


@dataclass(frozen=True, kw_only=True)
class SchedulesCommand:
    """Simulate pipeline schedules: bubbles next to the published formulas, memory, and a picture of each.

    Times are of all layers of a rank on one micro-batch, in any unit. Where a rank has two stages of the model, each
    takes half. Bubbles are those of the rank that has most.
    """

    ranks: int = 4
    """Number of ranks of the pipeline."""
    microbatches: int = 8
    """Number of micro-batches of a step."""
    forward: float = 1.0
    """Time of a forward."""
    backward_input: float = 1.0
    """Time of the backward of the input."""
    backward_weight: float = 1.0
    """Time of the backward of the weights."""
    overlap: float | None = None
    """Time of a forward and a backward that overlap, in DualPipe and DualPipeV; left out: one after the other."""
    send: float = 0.0
    """Time until a result is on the next rank."""
    out: Path | None = None
    """Folder for a picture of each schedule, NAME.png, and schedules.png with all."""
    json: bool = False
    """Print a line of JSON instead."""

    def __post_init__(self) -> None:
        for flag, value, most in (("ranks", self.ranks, 64), ("microbatches", self.microbatches, 1024)):
            if not 1 <= value <= most:
                raise ValueError(f"--{flag} {value} is not from 1 to {most}; use for example 8")


HELP = Help(
    usage="[FLAGS]",
    examples=("", "--ranks 8 --microbatches 20 --out schedules", "--overlap 2.4 --backward-weight 0.8"),
    main=(
        *("ranks", "microbatches", "forward", "backward_input", "backward_weight", "overlap", "send", "out", "json"),
    ),
)


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(SchedulesCommand, "distributed.schedules", args, help=HELP)
    if command.out is not None:
        make_folder(command.out)
    answers, lines = _answers(command)
    console = Console(stderr=command.json)
    if command.json:
        print(json.dumps(answers))
    else:
        _show(answers, command, console)
    if command.out is not None:
        for name, timeline in lines.items():
            draw({name: timeline}, command.out / f"{name}.png")
        draw(lines, command.out / "schedules.png")
        say(console, f"written  {len(lines) + 1} pictures in {command.out}")
    return 0


def _answers(command: SchedulesCommand) -> tuple[dict[str, Any], dict[str, Timeline]]:
    """Return what each schedule costs, or why it does not exist for these sizes, and the time lines."""
    found: dict[str, Any] = {}
    lines: dict[str, Timeline] = {}
    for name, chunks in CHUNKS.items():
        times = command.forward / chunks, command.backward_input / chunks, command.backward_weight / chunks
        overlap = None if command.overlap is None else command.overlap / chunks
        try:
            program = programs(name, command.ranks, command.microbatches)
        except ValueError as error:
            found[name] = {"left_out": str(error)}
            continue
        line = simulate(program, *times, overlap=overlap, send=command.send)
        lines[name] = line
        found[name] = {
            "total": line.total,
            "bubble": max(line.bubbles),
            "formula": bubble_formula(name, command.ranks, *times, overlap),
            "bubble_share": line.bubble_share,
            "activations": max(line.most_in_flight) / chunks,
            "weights": 2 if name == "dualpipe" else 1,
        }
    if not lines:
        raise ValueError(found["1f1b"]["left_out"])
    return found, lines


def _show(answers: dict[str, Any], command: SchedulesCommand, console: Console) -> None:
    """Print the table of schedules. Activations are in units of one rank's layers on one micro-batch."""
    from dsmini.report import Table
    from dsmini.report.terminal import show_table

    columns = ("schedule", "total", "bubble", "formula", "share", "activations", "weights")
    rows = [
        [
            name,
            *(f"{answer[key]:.4g}" for key in ("total", "bubble", "formula")),
            f"{answer['bubble_share']:.1%}",
            f"{answer['activations']:g}",
            f"{answer['weights']}x",
        ]
        for name, answer in answers.items()
        if "left_out" not in answer
    ]
    title = f"{command.ranks} ranks, {command.microbatches} micro-batches"
    show_table(console, Table(columns=columns, rows=rows, numeric=columns[1:]), title)
    for answer in answers.values():
        if "left_out" in answer:
            say(console, f"left out: {answer['left_out']}", style="yellow")


if __name__ == "__main__":
    run(main)
