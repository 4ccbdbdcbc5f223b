"""python -m benchmarks.schedules: pipeline schedules side by side, simulated: bubbles, memory, pictures.

The orders of the actions are those of torch.distributed.pipelining, so that a picture of them is a picture of what
runs. DualPipe, with two copies of the weights, is not in torch; its program is below.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from rich.console import Console

from dsmini.atomic import new_file
from dsmini.config.parallel import CHUNKS as STAGES
from dsmini.console.command import run
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.report import Table
from dsmini.report.terminal import show_table

KINDS: Mapping[str, tuple[str, str, str]] = {
    "F": ("forward", "#3f77b8", "#a9c6e8"),
    "B": ("backward, whole", "#3d8b5f", "#abd6bd"),
    "I": ("backward of the input", "#1f9aa0", "#a3dcde"),
    "W": ("backward of the weights", "#c9942a", "#efd39a"),
}
"""Words and colours of each kind of action: the colour of a rank's first stage, and of its others."""
CHUNKS: Mapping[str, int] = {**STAGES, "dualpipe": 1}
"""Stages of the model for each rank. A rank of DualPipe holds two, each for half of the micro-batches."""
_CLASSES = {
    "interleaved1f1b": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


class Action(NamedTuple):
    """One action of a rank, on one stage and one micro-batch."""

    kind: str
    """F forward, B the whole backward, I the backward of the input, W the backward of the weights."""
    stage: int
    microbatch: int
    overlaps: bool = False
    """The action runs together with the next one: a forward and a backward that hide each other's communication."""

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage}, micro-batch {self.microbatch}"


Programs = Sequence[Sequence[Action]]
"""For each rank its actions, in order."""


def programs(name: str, n_ranks: int, n_microbatches: int) -> Programs:
    """Return the program of every rank.

    Stages are numbered through the model, micro-batches from 0. In DualPipe, the first half of the micro-batches enters
    at rank 0, the second half at the last rank.

    Args:
        name: a key of CHUNKS.

    Raises: ValueError for an unknown name, and for sizes that the schedule does not take.
    """
    if name not in CHUNKS:
        raise ValueError(f"there is no schedule '{name}'; use one of {', '.join(CHUNKS)}")
    least = {"1f1b": n_ranks, "dualpipe": 2 * n_ranks, "dualpipev": 2 * n_ranks}.get(name, 1)
    if n_ranks < 1 or n_microbatches < least:
        raise ValueError(f"{name} on {n_ranks} ranks takes {least} micro-batches or more, got {n_microbatches}")
    if name == "dualpipe" and (n_ranks % 2 or n_microbatches % 2):
        raise ValueError(f"dualpipe takes even numbers of ranks and micro-batches, got {n_ranks} and {n_microbatches}")
    if name == "1f1b":
        # torch's own list has the forwards of the last rank one micro-batch too high; its runtime does what is here
        return [_one_forward_one_backward(rank, n_ranks, n_microbatches) for rank in range(n_ranks)]
    if name == "dualpipe":
        return [_dualpipe(rank, n_ranks, n_microbatches) for rank in range(n_ranks)]
    from torch.distributed.pipelining import schedules

    known: Any = {"group_size": n_ranks, "group_rank": 0, "num_stages": n_ranks * CHUNKS[name], "submod": None}
    stages = [SimpleNamespace(stage_index=i, **known) for i in range(CHUNKS[name])]
    order = getattr(schedules, _CLASSES[name])(stages, n_microbatches).pipeline_order
    return [_actions(order[rank]) for rank in range(n_ranks)]


def _actions(order: Sequence[Any]) -> list[Action]:
    """Return the computations of torch's order of a rank."""
    pairs = [() if action is None else action.sub_actions or (action,) for action in order]
    return [
        Action(one.computation_type.value, one[0], one[2], overlaps=i + 1 < len(pair))
        for pair in pairs
        for i, one in enumerate(pair)
        if one.computation_type.value in KINDS
    ]


def _one_forward_one_backward(rank: int, n_ranks: int, n_microbatches: int) -> list[Action]:
    """Return 1F1B: forwards until the first backward can come, then one of each in turns, then the other backwards."""
    ahead = min(n_microbatches, n_ranks - rank)
    found = [Action("F", rank, i) for i in range(ahead)]
    for i in range(n_microbatches):
        found.append(Action("B", rank, i))
        if ahead + i < n_microbatches:
            found.append(Action("F", rank, ahead + i))
    return found


def _dualpipe(rank: int, n_ranks: int, n_microbatches: int) -> list[Action]:
    """Return DualPipe, where micro-batches enter at both ends. Source: github.com/deepseek-ai/DualPipe, 3da1bbe."""
    half, h = n_ranks // 2, min(rank, n_ranks - 1 - rank)
    far = half - h - 1  # distance from the middle
    there, back = (rank, 0), (n_ranks - 1 - rank, n_microbatches // 2)
    # the stage and the first micro-batch of directions 0 and 1; the ranks of the second half swap them
    directions = (there, back) if rank < half else (back, there)
    counts: Counter[tuple[bool, int]] = Counter()
    pending: list[tuple[int, int]] = []
    actions: list[Action] = []

    def add(kind: str, direction: int, overlaps: bool = False) -> None:
        """Append the next F, B or I of a direction. The W of an I is pending until `weights` is called."""
        stage, first = directions[direction]
        key = (kind == "F", direction)
        actions.append(Action(kind, stage, first + counts[key], overlaps))
        if kind == "I":
            pending.append((stage, first + counts[key]))
        counts[key] += 1

    def weights() -> None:
        """Append the oldest pending W."""
        actions.append(Action("W", *pending.pop(0)))

    def pair(forward: int, backward: int, overlaps: bool = True) -> None:
        """Append an overlapped forward and backward."""
        add("F", forward, overlaps)
        add("B", backward)

    for _ in range(2 * far):
        add("F", 0)
    for _ in range(h + 1):
        add("F", 0)
        add("F", 1)
    for _ in range(far):
        add("I", 1)
        weights()
        add("F", 1)
    for i in range(n_microbatches // 2 - n_ranks + h + 1):
        # the middle ranks do not overlap their first pair: the backward would wait for its forward
        pair(0, 1, overlaps=i > 0 or far > 0)
        pair(1, 0)
    for _ in range(far):
        add("B", 1)
        pair(1, 0)
    for i in range(2 * (h + 1)):  # B1 and B0 in turns, the second half split
        add("B" if i < h + 1 else "I", 1 - i % 2)
    for _ in range(far):
        weights()
        add("I", 0)
    for _ in range(h + 1):
        weights()
    return actions


# --- time lines


class Row(NamedTuple):
    """An action of a rank with its start and its end, in any unit of time."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Actions over time, rank after rank. It begins with the first of any rank and ends with the last."""

    rows: tuple[Row, ...]

    @classmethod
    def measured(cls, rows: Iterable[Sequence[Any]]) -> "Timeline":
        """Return the time line of rows in any order. The first start becomes 0."""
        found = sorted(map(Row._make, rows), key=lambda row: (row.rank, row.start))
        first = min(row.start for row in found)
        return cls(tuple(row._replace(start=row.start - first, end=row.end - first) for row in found))

    @property
    def ranks(self) -> list[list[Row]]:
        """Actions of each rank."""
        n = 1 + max(row.rank for row in self.rows)
        return [[row for row in self.rows if row.rank == rank] for rank in range(n)]

    @property
    def total(self) -> float:
        """Time from the first start to the last end."""
        return max(row.end for row in self.rows) - min(row.start for row in self.rows)

    @property
    def bubbles(self) -> list[float]:
        """Time that each rank computes nothing. Actions that overlap count once."""
        found = []
        for rank in self.ranks:
            busy, reached = 0.0, -math.inf
            for start, end in sorted((row.start, row.end) for row in rank):
                busy += max(0.0, end - max(start, reached))
                reached = max(reached, end)
            found.append(self.total - busy)
        return found

    @property
    def bubble_share(self) -> float:
        """Time that ranks compute nothing, of the time of all ranks."""
        return sum(self.bubbles) / (len(self.bubbles) * self.total)

    @property
    def most_in_flight(self) -> list[int]:
        """Largest number of activations that each rank holds, one for each stage and micro-batch.

        Activations are held from the start of the forward to the end of the backward of the weights.
        """
        events = [
            sorted([(r.start, 1) for r in rank if r.kind == "F"] + [(r.end, -1) for r in rank if r.kind in "BW"])
            for rank in self.ranks
        ]  # at one time ends come first
        return [max(itertools.accumulate((change for _, change in rank), initial=0)) for rank in events]


@contextmanager
def record_timeline(schedule: Any) -> Iterator[list[Row]]:
    """Yield a list that gets a row for each action of this rank's stages, in order, in seconds.

    Times include none of the communication. The processes of one machine have one clock.
    """
    rows: list[Row] = []
    stages: list[Any] = getattr(schedule, "_stages", None) or [schedule._stage]
    kinds = {"forward_one_chunk": "F", "backward_one_chunk": "", "backward_weight_one_chunk": "W"}

    def watched(stage: Any, method: str, kind: str) -> Callable[..., Any]:
        run = getattr(stage, method)

        def timed(part: int, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = run(part, *args, **kwargs)
            what = kind or ("B" if kwargs.get("full_backward", True) else "I")
            rows.append(Row(stage.group_rank, what, stage.stage_index, part, start, time.perf_counter()))
            return result

        return timed

    for stage, (method, kind) in itertools.product(stages, kinds.items()):
        setattr(stage, method, watched(stage, method, kind))
    try:
        yield rows
    finally:
        for stage, method in itertools.product(stages, kinds):
            delattr(stage, method)


# --- the simulation


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

    Raises: ValueError for programs that wait for each other or for what is in none of them.
    """
    times = {"F": forward, "I": backward_input, "W": backward_weight, "B": backward_input + backward_weight}
    last = max((action.stage for program in programs for action in program), default=0)
    ends: dict[tuple[str, int, int], tuple[float, int]] = {}  # when each result is there, and on which rank
    at, free = [0] * len(programs), [0.0] * len(programs)
    ranks: list[list[Row]] = [[] for _ in programs]
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                together = program[at[rank] : at[rank] + 1 + program[at[rank]].overlaps]
                needs = [need for action in together for need in _needs(action, last)]
                if any(need not in ends for need in needs):
                    break
                arrivals = [end + send * (place != rank) for end, place in (ends[need] for need in needs)]
                start = max([free[rank], *arrivals])
                hidden = overlap if len(together) == 2 else None
                for action in together:
                    end = start + (times[action.kind] if hidden is None else hidden)
                    ranks[rank].append(Row(rank, *action[:3], start, end))
                    start = end if hidden is None else start
                free[rank] = ranks[rank][-1].end
                ends |= {_result(action): (free[rank], rank) for action in together}
                at[rank] += len(together)
                moved = True
    stuck = [f"rank {r} at {p[i]}" for r, (p, i) in enumerate(zip(programs, at, strict=True)) if i < len(p)]
    if stuck:
        raise ValueError(f"the programs wait for results that never come, {', '.join(stuck)}; check their order")
    return Timeline(tuple(itertools.chain(*ranks)))


def _needs(action: Action, last_stage: int) -> list[tuple[str, int, int]]:
    """Return the results that an action needs."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if action.kind == "W":
        return [("input", stage, microbatch)]
    after = [("input", stage + 1, microbatch)] if stage < last_stage else []
    return [("F", stage, microbatch), *after]


def _result(action: Action) -> tuple[str, int, int]:
    return "input" if action.kind in "BI" else action.kind, action.stage, action.microbatch


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
    backward = backward_input + backward_weight
    if name in ("1f1b", "interleaved1f1b"):
        return (n_ranks - 1) * (forward + backward)
    if name in ("zero_bubble", "zbv"):
        return (n_ranks - 1) * (forward + backward - 2 * backward_weight)
    together = forward + backward if overlap is None else overlap
    return (n_ranks * CHUNKS[name] / 2 - 1) * (together + backward - 3 * backward_weight)


# --- pictures

WIDTH, HEIGHT = 14.0, 0.34
"""Width of a picture, and height of the row of a rank, in inches."""


def draw(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw time lines below each other, by title: a row for each rank, the number of the micro-batch in each box.

    An overlapped forward and backward are half as high. Each time line has its own scale, so that a simulated one can
    stand above a measured one in seconds.
    """
    from matplotlib.figure import Figure  # half a second to import
    from matplotlib.patches import Patch

    heights = [0.8 + HEIGHT * len(line.ranks) for line in timelines.values()]
    figure = Figure(figsize=(WIDTH, 0.5 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)
    for one, (title, line) in zip(axes[:, 0], timelines.items(), strict=True):
        _draw(one, title, line)
    shown = {row.kind for line in timelines.values() for row in line.rows}
    handles = [Patch(color=colour, label=words) for kind, (words, colour, _) in KINDS.items() if kind in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    figure.text(0.99, 0.995, "paler: later stages of a rank", ha="right", va="top", fontsize=9, color="#656c75")
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw(axes: Any, title: str, line: Timeline) -> None:
    """Draw one time line."""
    total, first = line.total or 1.0, min(row.start for row in line.rows)
    for rank, rows in enumerate(line.ranks):
        lowest = min(row.stage for row in rows)
        for row in rows:
            shares = any(other is not row and _overlap(row, other) > 1e-9 * total for other in rows)
            high = 0.42 if shares else 0.84
            low = rank + (0.0 if shares and row.kind != "F" else -0.42)
            _, colour, pale = KINDS[row.kind]
            face, ink = (colour, "white") if row.stage == lowest else (pale, "#22262b")
            box, words = [(row.start, row.end - row.start)], str(row.microbatch)
            axes.broken_barh(box, (low, high), facecolors=face, edgecolors="white", linewidth=0.5)
            if (row.end - row.start) / total * WIDTH * 0.93 > 0.075 * len(words) + 0.02:
                style: Any = {"ha": "center", "va": "center_baseline", "fontsize": 5.5 if shares else 7, "color": ink}
                axes.text((row.start + row.end) / 2, low + high / 2, words, **style)
    ranks = len(line.ranks)
    axes.set(xlim=(first, first + total), ylim=(ranks - 0.5, -0.5), ylabel="rank", yticks=range(ranks))
    axes.set_title(f"{title}: {line.bubble_share:.1%} bubbles, {line.total:.4g} in total", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _overlap(one: Row, other: Row) -> float:
    """Return the time that two actions share."""
    return min(one.end, other.end) - max(one.start, other.start)


# --- the command


@dataclass(frozen=True, kw_only=True)
class SchedulesCommand:
    """Simulate pipeline schedules: bubbles next to the published formulas, memory, and a picture of each.

    Forward, backward of the input and backward of the weights of a rank's layers take 1 each on a micro-batch.
    """

    ranks: int = 4
    """Number of ranks."""
    microbatches: int = 8
    """Number of micro-batches."""
    overlap: float | None = None
    """Time of a forward and a backward that overlap, in DualPipe and DualPipeV; left out: one after the other."""
    send: float = 0.0
    """Time until a result is on the next rank."""
    out: Path | None = None
    """File for a picture of all."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command, console = parse(SchedulesCommand, "schedules", args), Console()
    lines: dict[str, Timeline] = {}
    rows, left_out = list[list[str]](), list[str]()
    for name, chunks in CHUNKS.items():
        times = 1.0 / chunks, 1.0 / chunks, 1.0 / chunks
        overlap = None if command.overlap is None else command.overlap / chunks
        try:
            program = programs(name, command.ranks, command.microbatches)
        except ValueError as error:
            left_out.append(str(error))
            continue
        line = lines[name] = simulate(program, *times, overlap=overlap, send=command.send)
        formula = bubble_formula(name, command.ranks, *times, overlap)
        figures = [f"{figure:.4g}" for figure in (line.total, max(line.bubbles), formula)]
        weights = "2x" if name == "dualpipe" else "1x"
        rows.append([name, *figures, f"{line.bubble_share:.1%}", f"{max(line.most_in_flight) / chunks:g}", weights])
    if not lines:
        raise ValueError(left_out[0])
    columns = ("schedule", "total", "bubble", "formula", "share", "activations", "weights")
    title = f"{command.ranks} ranks, {command.microbatches} micro-batches"
    show_table(console, Table(columns=columns, rows=rows, numeric=columns[1:]), title)
    for words in left_out:
        say(console, f"left out: {words}", style="yellow")
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        draw(lines, command.out)
        say(console, f"written  {command.out}")
    return 0


if __name__ == "__main__":
    run(main)
