"""Time lines of a pipeline, simulated or measured: what each rank computed when, its bubbles, and a picture."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsmini.distributed.pictures import save

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
        """Return the time line of rows (rank, kind, stage, microbatch, start, end). The first start becomes 0.

        Raises: ValueError for no rows, an unknown kind, a negative rank, and an end before its start.
        """
        found = sorted(rows, key=lambda row: (row[0], row[4]))
        if not found:
            raise ValueError("a time line has no rows; give (rank, kind, stage, microbatch, start, end) of each action")
        first = min(row[4] for row in found)
        spans: list[list[Span]] = [[] for _ in range(found[-1][0] + 1)]
        for rank, kind, stage, microbatch, start, end in found:
            if kind not in KINDS or rank < 0 or not end >= start:
                row = (rank, kind, stage, microbatch, start, end)
                raise ValueError(
                    f"{row} is not an action; want a rank from 0, F, B, I or W, and an end after its start"
                )
            known: Kind = kind  # type: ignore[assignment]
            spans[rank].append(
                Span(kind=known, stage=stage, microbatch=microbatch, start=start - first, end=end - first)
            )
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


def draw(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw time lines below each other, by title: a row for each rank, the number of the micro-batch in each box.

    Boxes that share a time, such as an overlapped forward and backward, are half as high. Each time line has its own
    scale, so that a simulated one can stand above a measured one in seconds.
    """
    from matplotlib.figure import Figure  # half a second to import
    from matplotlib.patches import Patch

    if not timelines:
        raise ValueError("there is no time line to draw; give one or more by title")
    rows = [len(timeline.ranks) for timeline in timelines.values()]
    figure = Figure(figsize=(WIDTH, 0.5 + sum(0.8 + ROW * n for n in rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, height_ratios=[0.8 + ROW * n for n in rows], squeeze=False)
    for one, (title, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        _draw(one, title, timeline)
    shown = {span.kind for timeline in timelines.values() for rank in timeline.ranks for span in rank}
    handles = [Patch(color=colour, label=words) for kind, (words, colour, _) in KINDS.items() if kind in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    figure.text(0.99, 0.995, "paler: later stages of a rank", ha="right", va="top", fontsize=9, color="#656c75")
    save(figure, path)


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
