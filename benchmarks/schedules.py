"""python -m benchmarks.schedules: pipeline schedules side by side, simulated: bubbles, memory, pictures.

The orders of the actions are those of torch.distributed.pipelining, so that a picture of them is a picture of what
runs. DualPipe, with two copies of the weights, is not in torch; its program is below.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from dsmini.atomic import new_file
from dsmini.config.parallel import CHUNKS as STAGES
from dsmini.console.command import run
from dsmini.console.commandline import Help, parse
from dsmini.console.messages import say
from dsmini.report import Table
from dsmini.report.terminal import show_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["F", "B", "I", "W"]
KINDS: Mapping[str, tuple[str, str, str]] = {
    "F": ("forward", "#3f77b8", "#a9c6e8"),
    "B": ("backward, whole", "#3d8b5f", "#abd6bd"),
    "I": ("backward of the input", "#1f9aa0", "#a3dcde"),
    "W": ("backward of the weights", "#c9942a", "#efd39a"),
}
"""Words and colours of each kind of action: the colour of a rank's first stage, and of its others."""
WIDTH, ROW = 14.0, 0.34
"""Width of a picture, and height of the row of a rank, in inches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One action of a rank, on one stage and one micro-batch."""

    kind: Kind
    """F forward, B the whole backward, I the backward of the input, W the backward of the weights."""
    stage: int
    microbatch: int
    overlaps: bool = False
    """The action runs together with the next one: a forward and a backward that hide each other's communication."""


Programs = Sequence[Sequence[Action]]
"""For each rank its actions, in order."""

CHUNKS: Mapping[str, int] = {**STAGES, "dualpipe": 1}
"""Stages of the model for each rank. A rank of DualPipe holds two, each for half of the micro-batches."""
_CLASSES = {
    "interleaved1f1b": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


def programs(name: str, n_ranks: int, n_microbatches: int) -> Programs:
    """Return the program of every rank.

    Stages are numbered through the model, micro-batches from 0. In DualPipe, the first half of the micro-batches enters
    at rank 0, the second half at the last rank.

    Args:
        name: a key of CHUNKS.

    Raises: ValueError for an unknown name, and for sizes that the schedule does not take.
    """
    _check(name, n_ranks, n_microbatches)
    if name == "1f1b":
        # torch's own list has the forwards of the last rank one micro-batch too high; its runtime does what is here
        return [_one_forward_one_backward(rank, n_ranks, n_microbatches) for rank in range(n_ranks)]
    if name == "dualpipe":
        return [_dualpipe(rank, n_ranks, n_microbatches) for rank in range(n_ranks)]
    from torch.distributed.pipelining import schedules

    n_stages = n_ranks * CHUNKS[name]
    stage: Any = {"group_size": n_ranks, "group_rank": 0, "num_stages": n_stages, "submod": None}
    stages = [SimpleNamespace(stage_index=i, **stage) for i in range(CHUNKS[name])]
    made = getattr(schedules, _CLASSES[name])(stages, n_microbatches)
    return [_actions(made.pipeline_order[rank]) for rank in range(n_ranks)]


def _check(name: str, n_ranks: int, n_microbatches: int) -> None:
    """Raise ValueError for a schedule that does not exist for these sizes."""
    if name not in CHUNKS:
        raise ValueError(f"there is no schedule '{name}'; use one of {', '.join(CHUNKS)}")
    if n_ranks < 1 or n_microbatches < 1:
        raise ValueError(f"{n_ranks} ranks with {n_microbatches} micro-batches run nothing; use 1 or more of each")
    if name == "dualpipe" and (n_ranks % 2 or n_microbatches % 2):
        raise ValueError(
            f"dualpipe takes an even number of ranks and of micro-batches, got {n_ranks} and {n_microbatches}; "
            f"use {n_ranks + n_ranks % 2} and {max(n_microbatches + n_microbatches % 2, 2 * n_ranks)}"
        )
    least = {"1f1b": n_ranks, "dualpipe": 2 * n_ranks, "dualpipev": 2 * n_ranks}.get(name, 1)
    if n_microbatches < least:
        raise ValueError(f"{name} on {n_ranks} ranks takes {least} micro-batches or more, got {n_microbatches}")
    rounds = max(1, n_microbatches // n_ranks)
    if name in ("interleaved1f1b", "zero_bubble") and n_microbatches % rounds:
        raise ValueError(
            f"{name} runs {n_microbatches} micro-batches on {n_ranks} ranks in {rounds} rounds, which are unequal; "
            f"use {rounds * n_ranks} or {(rounds + 1) * n_ranks}"
        )


def _actions(order: Sequence[Any]) -> list[Action]:
    """Return the computations of torch's order of a rank."""
    found: list[Action] = []
    for action in order:
        pair = [] if action is None else action.sub_actions or (action,)
        for i, one in enumerate(pair):
            if (kind := one.computation_type.value) in KINDS:
                overlaps = i + 1 < len(pair)
                found.append(Action(kind=kind, stage=one[0], microbatch=one[2], overlaps=overlaps))
    return found


def _one_forward_one_backward(rank: int, n_ranks: int, n_microbatches: int) -> list[Action]:
    """Return 1F1B: forwards until the first backward can come, then one of each in turns, then the other backwards."""
    ahead = min(n_microbatches, n_ranks - rank)
    found = [Action(kind="F", stage=rank, microbatch=i) for i in range(ahead)]
    for i in range(n_microbatches):
        found.append(Action(kind="B", stage=rank, microbatch=i))
        if ahead + i < n_microbatches:
            found.append(Action(kind="F", stage=rank, microbatch=ahead + i))
    return found


class _Writer:
    """The program of a rank of DualPipe while it is written: it counts micro-batches and pending weight backwards."""

    def __init__(self, rank: int, n_ranks: int, n_microbatches: int) -> None:
        there, back = (rank, 0), (n_ranks - 1 - rank, n_microbatches // 2)
        # the stage and the first micro-batch of directions 0 and 1; the ranks of the second half swap them
        self.directions = (there, back) if rank < n_ranks // 2 else (back, there)
        self.counts = {(kind, d): 0 for kind in "FB" for d in (0, 1)}
        self.pending: list[tuple[int, int]] = []
        self.actions: list[Action] = []

    def add(self, kind: Kind, direction: int, overlaps: bool = False) -> None:
        """Append the next F, B or I of a direction. The W of an I is pending until `weights` is called."""
        stage, first = self.directions[direction]
        key = ("F" if kind == "F" else "B", direction)
        microbatch = first + self.counts[key]
        self.counts[key] += 1
        self.actions.append(Action(kind=kind, stage=stage, microbatch=microbatch, overlaps=overlaps))
        if kind == "I":
            self.pending.append((stage, microbatch))

    def weights(self) -> None:
        """Append the oldest pending W."""
        stage, microbatch = self.pending.pop(0)
        self.actions.append(Action(kind="W", stage=stage, microbatch=microbatch))

    def pair(self, forward: int, backward: int, overlaps: bool = True) -> None:
        """Append an overlapped forward and backward."""
        self.add("F", forward, overlaps)
        self.add("B", backward)


def _dualpipe(rank: int, n_ranks: int, n_microbatches: int) -> list[Action]:
    """Return DualPipe, where micro-batches enter at both ends. Source: github.com/deepseek-ai/DualPipe, 3da1bbe."""
    half, h = n_ranks // 2, min(rank, n_ranks - 1 - rank)
    far = half - h - 1  # distance from the middle
    write = _Writer(rank, n_ranks, n_microbatches)
    for _ in range(2 * far):
        write.add("F", 0)
    for _ in range(h + 1):
        write.add("F", 0)
        write.add("F", 1)
    for _ in range(far):
        write.add("I", 1)
        write.weights()
        write.add("F", 1)
    for i in range(n_microbatches // 2 - n_ranks + h + 1):
        # the middle ranks do not overlap their first pair: the backward would wait for its forward
        write.pair(0, 1, overlaps=i > 0 or far > 0)
        write.pair(1, 0)
    for _ in range(far):
        write.add("B", 1)
        write.pair(1, 0)
    for i in range(2 * (h + 1)):  # B1 and B0 in turns, the second half split
        write.add("B" if i < h + 1 else "I", 1 - i % 2)
    for _ in range(far):
        write.weights()
        write.add("I", 0)
    for _ in range(h + 1):
        write.weights()
    return write.actions


# --- time lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One action of a rank with its start and its end."""

    kind: Kind
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Actions of every rank over time. It begins with the first action of any rank and ends with the last."""

    ranks: tuple[tuple[Span, ...], ...]

    @classmethod
    def measured(cls, rows: Iterable[tuple[int, str, int, int, float, float]]) -> "Timeline":
        """Return the time line of rows (rank, kind, stage, microbatch, start, end). The first start becomes 0."""
        found = sorted(rows, key=lambda row: (row[0], row[4]))
        first = min(row[4] for row in found)
        spans: list[list[Span]] = [[] for _ in range(found[-1][0] + 1)]
        for rank, kind, stage, microbatch, start, end in found:
            known: Any = kind
            span = Span(kind=known, stage=stage, microbatch=microbatch, start=start - first, end=end - first)
            spans[rank].append(span)
        return cls(ranks=tuple(map(tuple, spans)))

    @property
    def total(self) -> float:
        """Time from the first start to the last end."""
        spans = [span for rank in self.ranks for span in rank]
        return max(span.end for span in spans) - min(span.start for span in spans)

    @property
    def bubbles(self) -> list[float]:
        """Time that each rank computes nothing."""
        return [self.total - sum(end - start for start, end in _busy(rank)) for rank in self.ranks]

    @property
    def bubble_share(self) -> float:
        """Time that ranks compute nothing, of the time of all ranks."""
        return sum(self.bubbles) / (len(self.ranks) * self.total)

    @property
    def most_in_flight(self) -> list[int]:
        """Largest number of activations that each rank holds, one for each stage and micro-batch.

        Activations are held from the start of the forward to the end of the backward of the weights.
        """
        return [max(itertools.accumulate(_held(rank)), default=0) for rank in self.ranks]


def _busy(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Return the times in which a rank computes, without overlaps."""
    busy: list[tuple[float, float]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if busy and start <= busy[-1][1]:
            busy[-1] = (busy[-1][0], max(end, busy[-1][1]))
        else:
            busy.append((start, end))
    return busy


def _held(spans: Sequence[Span]) -> Iterator[int]:
    """Yield the change of the number of activations at each start and end. At one time ends come first."""
    events = [(span.start, 1) for span in spans if span.kind == "F"]
    events += [(span.end, -1) for span in spans if span.kind in ("B", "W")]
    yield from (change for _, change in sorted(events))


Row = tuple[int, str, int, int, float, float]
"""Rank, kind (F, B, I or W), stage, micro-batch, and the seconds of start and end."""


@contextmanager
def record_timeline(schedule: Any) -> Iterator[list[Row]]:
    """Yield a list that gets a row for each action of this rank's stages, in order.

    F is a forward, B a whole backward, I the backward of the input, W that of the weights. Times include none of the
    communication. The processes of one machine have one clock.
    """
    rows: list[Row] = []
    stages: list[Any] = getattr(schedule, "_stages", None) or [schedule._stage]

    def watch(stage: Any, method: str) -> None:
        run = getattr(stage, method)

        def timed(part: int, *args: Any, **kwargs: Any) -> Any:
            kind = {"forward_one_chunk": "F", "backward_weight_one_chunk": "W"}.get(method)
            kind = kind or ("B" if kwargs.get("full_backward", True) else "I")
            start = time.perf_counter()
            result = run(part, *args, **kwargs)
            rows.append((stage.group_rank, kind, stage.stage_index, part, start, time.perf_counter()))
            return result

        setattr(stage, method, timed)

    methods = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
    for stage in stages:
        for method in methods:
            watch(stage, method)
    try:
        yield rows
    finally:
        for stage in stages:
            for method in methods:
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
    for action, seconds in zip(together, times, strict=True):
        if len(together) == 2 and overlap is not None:
            begin, end = start, start + overlap
        else:
            begin = spans[-1].end if spans else start
            end = begin + seconds
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
    backward = backward_input + backward_weight
    if name in ("1f1b", "interleaved1f1b"):
        return (n_ranks - 1) * (forward + backward)
    if name in ("zero_bubble", "zbv"):
        return (n_ranks - 1) * (forward + backward - 2 * backward_weight)
    together = forward + backward if overlap is None else overlap
    stages = n_ranks * CHUNKS[name]
    return (stages / 2 - 1) * (together + backward - 3 * backward_weight)


# --- pictures


def draw(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw time lines below each other, by title: a row for each rank, the number of the micro-batch in each box.

    Boxes that share a time, such as an overlapped forward and backward, are half as high. Each time line has its own
    scale, so that a simulated one can stand above a measured one in seconds.
    """
    from matplotlib.figure import Figure  # half a second to import
    from matplotlib.patches import Patch

    rows = [len(timeline.ranks) for timeline in timelines.values()]
    figure = Figure(figsize=(WIDTH, 0.5 + sum(0.8 + ROW * n for n in rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, height_ratios=[0.8 + ROW * n for n in rows], squeeze=False)
    for one, (title, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        _draw(one, title, timeline)
    shown = {span.kind for timeline in timelines.values() for rank in timeline.ranks for span in rank}
    handles = [Patch(color=colour, label=words) for kind, (words, colour, _) in KINDS.items() if kind in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    figure.text(0.99, 0.995, "paler: later stages of a rank", ha="right", va="top", fontsize=9, color="#656c75")
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw(axes: "Axes", title: str, timeline: Timeline) -> None:
    """Draw one time line."""
    total, first = timeline.total, min(span.start for rank in timeline.ranks for span in rank)
    for rank, spans in enumerate(timeline.ranks):
        lowest = min((span.stage for span in spans), default=0)
        for span, lane, lanes in _lanes(spans):
            _, colour, pale = KINDS[span.kind]
            high = 0.84 / lanes
            low = rank - 0.42 + lane * high
            box = [(span.start, span.end - span.start)]
            face = colour if span.stage == lowest else pale
            axes.broken_barh(box, (low, high), facecolors=face, edgecolors="white", linewidth=0.5)
            words = str(span.microbatch)
            wide = (span.end - span.start) / (total or 1) * WIDTH * 0.93
            if wide > 0.075 * len(words) + 0.02:
                ink = "white" if span.stage == lowest else "#22262b"
                size = 7 if lanes == 1 else 5.5
                middle = (span.start + span.end) / 2
                axes.text(middle, low + high / 2, words, ha="center", va="center_baseline", fontsize=size, color=ink)
    axes.set(xlim=(first, first + (total or 1)), ylim=(len(timeline.ranks) - 0.5, -0.5), ylabel="rank")
    axes.set_yticks(range(len(timeline.ranks)))
    axes.set_title(f"{title}: {timeline.bubble_share:.1%} bubbles, {total:.4g} in total", loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _lanes(spans: Sequence[Span]) -> Iterator[tuple[Span, int, int]]:
    """Yield each span with its lane and the number of lanes. Spans that share no time have one lane."""
    clusters: list[list[Span]] = []
    end = float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        if not clusters or span.start >= end - 1e-9 * abs(end):
            clusters.append([])
        clusters[-1].append(span)
        end = max(end, span.end)
    for cluster in clusters:
        free: list[float] = []
        placed: list[tuple[Span, int]] = []
        for span in cluster:
            lane = next((i for i, until in enumerate(free) if until <= span.start), len(free))
            free[lane : lane + 1] = [span.end]
            placed.append((span, lane))
        yield from ((span, lane, len(free)) for span, lane in placed)


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


HELP = Help(
    usage="[FLAGS]",
    examples=("", "--ranks 8 --microbatches 20 --overlap 2.4 --out schedules.png"),
    main=("ranks", "microbatches", "overlap", "send", "out"),
)


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(SchedulesCommand, "schedules", args, help=HELP)
    console, rows, lines, left_out = Console(), [], {}, []
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
