"""The use of the time of a run, from its event log: the goodput is the share of the steps that count in the end.

Every moment from the first event to the last belongs to one kind:

    productive     steps that count in the end, each once
    lost           steps that were done, and done again after a restart or a rewind
    saving         training blocked by a save; writing in the background costs nothing here
    restoring      from the start of an attempt to its first step, and the way back of a rewind
    validating     validation and plots
    down           from the last event of an attempt to the start of the next, and standing still before a failure
    other          the rest, such as waiting between steps

Times are whole microseconds, so that the kinds add up to the total exactly. An attempt that was killed has no last
event: what it did since its last one is part of `down`. Steps after the last checkpoint count until they are done
again. Where a clock steps back, an event takes the seconds that it names.

The planner predicts the share of productive steps from four figures of a run: the mean time between failures, the
time of a restart, the time that a save blocks, and the training time between two saves. A Goodput has all four as
measured. The prediction knows no validation and no first start, and `training_share` leaves them out too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmini.distributed.events import Event, read_events

KINDS: tuple[str, ...] = ("productive", "lost", "saving", "restoring", "validating", "down", "other")
CLAIMED = {
    **{"step": "productive", "saved": "saving", "validated": "validating", "plotted": "validating"},
    **{"restored": "restoring", "rewound": "restoring"},
}
"""The kind of the seconds that an event names."""
MICROSECONDS = 1_000_000
MOST_FREE = 400
"""Parts of the time that are held for a later event, such as the end of a save in the background."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A part of the time of a run, in microseconds since its first event."""

    start: int
    end: int
    kind: str
    attempt: int
    """Number of the attempt, counted from 1 in the order of the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """The time of a run by kind, and what the planner's prediction of it needs."""

    microseconds: Mapping[str, int]
    """Time of each of KINDS; their sum is the time from the first event to the last."""
    spans: Sequence[Stretch]
    """All parts of the time, in their order."""
    attempts: int
    failures: int
    """Attempts that ended neither stopped nor finished, the last one only if it says that it failed."""
    steps: int
    """Steps that count in the end."""
    lost_steps: int
    """Steps that were done and do not count."""
    saves: int
    restart_microseconds: int
    """Time of all restarts after a failure: down, then restoring."""

    @property
    def total(self) -> int:
        """Microseconds from the first event to the last."""
        return sum(self.microseconds.values())

    def share(self, kind: str) -> float:
        """Return the share of a kind; 0 of a run that took no time."""
        return self.microseconds[kind] / self.total if self.total else 0.0

    @property
    def training_microseconds(self) -> int:
        """Time of steps, saves and restarts after a failure: what the planner's prediction is about."""
        return sum(self.microseconds[kind] for kind in ("productive", "lost", "saving")) + self.restart_microseconds

    @property
    def training_share(self) -> float | None:
        """Share of the productive steps in that time; None without a step."""
        time = self.training_microseconds
        return self.microseconds["productive"] / time if time else None

    @property
    def mean_seconds_between_failures(self) -> float | None:
        """Time of steps, saves and restarts for each failure; None without one."""
        return _mean(self.training_microseconds, self.failures)

    @property
    def restart_seconds(self) -> float | None:
        """Mean time from a failure to the next step; None without a failure."""
        return _mean(self.restart_microseconds, self.failures)

    @property
    def saving_seconds(self) -> float | None:
        """Mean time that a save blocks training; None without a save."""
        return _mean(self.microseconds["saving"], self.saves)

    @property
    def interval_seconds(self) -> float | None:
        """Mean time of steps between two saves; None without a save."""
        return _mean(self.microseconds["productive"] + self.microseconds["lost"], self.saves)


def goodput(run: Path) -> Goodput:
    """Return where the time of a run went. Raises: ValueError for a folder without events."""
    events = read_events(run)
    if not events:
        raise ValueError(f"{run} has no events.jsonl with events; name a run of dsmini.train that logs them")
    return goodput_of(events)


def goodput_of(events: Iterable[Event]) -> Goodput:
    """Return where the time went between these events, which are in the order of the log."""
    ledger = _Ledger()
    for event in events:
        ledger.take(event)
    return ledger.result()


def _mean(microseconds: int, count: int) -> float | None:
    return microseconds / MICROSECONDS / count if count else None


class _Ledger:
    """The account of time: events claim the seconds that they name, and what nobody claims gets a kind at the end."""

    def __init__(self) -> None:
        self.now = 0  # microseconds since the first event, on a clock that never steps back
        self.clock: float | None = None  # wall time of the last event
        self.attempt: int | None = None
        self.attempts = self.failures = self.saves = self.lost_steps = self.restart = 0
        self.stepped = False  # this attempt has done a step
        self.ended = ""  # the event that ended this attempt, if any
        self.after_failure = False  # this attempt followed a failure
        self.free: list[tuple[int, int]] = []  # time of this attempt that no event has claimed, in order
        self.spans: list[Stretch] = []
        self.counted: list[tuple[int, list[int]]] = []  # steps that count so far and their spans, steps ascending

    def take(self, event: Event) -> None:
        """Account for the time up to an event."""
        seconds = event.seconds()
        gap = 0 if self.clock is None else event.time - self.clock
        if gap < 0:
            gap = 0 if event.event == "started" else seconds
        before, self.now, self.clock = self.now, self.now + _whole(gap), event.time
        if event.event == "started" or event.attempt != self.attempt:
            self._start_attempt(event, before)
        elif self.now > before:
            self.free.append((before, self.now))
            if self.stepped and len(self.free) > MOST_FREE:  # the oldest will not be claimed any more
                old, self.free = self.free[: MOST_FREE // 2], self.free[MOST_FREE // 2 :]
                self._give(old, "other")
        spans = self._claim(event, seconds) if event.event in CLAIMED else []
        self._follow(event, spans, before)

    def _follow(self, event: Event, spans: list[int], before: int) -> None:
        """Do what an event means for the steps and for the time that is free."""
        name = event.event
        if name == "step":
            self._undo(event.step)
            self.counted.append((event.step, spans))
            if not self.stepped:
                self._give_rest("restoring")
            self.stepped = True
        elif name in ("started", "restored", "rewound"):
            self._undo(event.step + 1)
        elif name == "saved":
            self.saves += 1
        elif name in ("stalled", "failed") and self.stepped:
            down = [self.spans[i] for i in self._take_free(self.now - before, "down", self.now)]
            self.restart += sum(span.end - span.start for span in down)
        if name in ("stalled", "failed", "stopped", "finished"):
            self.ended = name

    def _start_attempt(self, event: Event, before: int) -> None:
        """Close the attempt before; the time since its last event was down, except what this event claims."""
        if self.attempt is not None:
            self._close()
            self.after_failure = self.ended not in ("stopped", "finished")
            self.failures += self.after_failure
        self.attempts += 1
        self.attempt, self.stepped, self.ended = event.attempt, False, ""
        claimed = min(self.now - before, _whole(event.seconds()) if event.event in CLAIMED else 0)
        self._add(before, self.now - claimed, "down")
        self.restart += self.now - claimed - before if self.after_failure else 0
        self.free = [(self.now - claimed, self.now)] if claimed else []

    def _claim(self, event: Event, seconds: float) -> list[int]:
        """Give an event the seconds that it names, as far as they are free; return the spans."""
        until = self.now - _whole(event.seconds("background"))
        return self._take_free(_whole(seconds), CLAIMED[event.event], until)

    def _take_free(self, length: int, kind: str, until: int) -> list[int]:
        """Take the latest free time before `until`, and after it where that is not enough; return the spans."""
        early = [(start, min(end, until)) for start, end in self.free if start < until]
        late = [(max(start, until), end) for start, end in self.free if end > until]
        taken: list[int] = []
        for part in (early, late):
            while part and length:
                start, end = part.pop()
                cut = max(start, end - length)
                length -= end - cut
                taken.append(self._add(cut, end, kind))
                if cut > start:
                    part.append((start, cut))
        self.free = early + late
        return taken

    def _undo(self, first: int) -> None:
        """Take steps from this one on as lost."""
        while self.counted and self.counted[-1][0] >= first:
            for i in self.counted.pop()[1]:
                old = self.spans[i]
                self.spans[i] = Stretch(start=old.start, end=old.end, kind="lost", attempt=old.attempt)
            self.lost_steps += 1

    def _give_rest(self, kind: str) -> None:
        self._give(self.free, kind)
        self.free = []

    def _give(self, parts: Iterable[tuple[int, int]], kind: str) -> None:
        for start, end in parts:
            self._add(start, end, kind)

    def _add(self, start: int, end: int, kind: str) -> int:
        """Add a span and return its index."""
        if kind == "restoring" and self.after_failure and not self.stepped:
            self.restart += end - start
        self.spans.append(Stretch(start=start, end=end, kind=kind, attempt=self.attempts))
        return len(self.spans) - 1

    def _close(self) -> None:
        self._give_rest("other" if self.stepped else "restoring")

    def result(self) -> Goodput:
        """Return the account so far."""
        self._close()
        self.failures += self.ended in ("failed", "stalled")
        totals = dict.fromkeys(KINDS, 0)
        for span in self.spans:
            totals[span.kind] += span.end - span.start
        return Goodput(
            microseconds=totals,
            spans=sorted((span for span in self.spans if span.end > span.start), key=lambda span: span.start),
            attempts=self.attempts,
            failures=self.failures,
            steps=len(self.counted),
            lost_steps=self.lost_steps,
            saves=self.saves,
            restart_microseconds=self.restart,
        )


def _whole(seconds: float) -> int:
    return round(seconds * MICROSECONDS)
