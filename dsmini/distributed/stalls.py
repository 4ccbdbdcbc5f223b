"""Find the rank for which the others wait, from a heartbeat of each rank. Pure: watchdog.py brings the heartbeats.

A training of many ranks stands still as a whole. The collectives see to that: a rank that stops makes the others wait,
and no error names it. Three rules find it, in this order:

1. A rank is silent: its heartbeat does not come any more. It was stopped or killed, or its host is cut off.
2. All ranks stand still, some of them outside a collective. One of those is it: the one with the fewest steps, then
   the one that stands still longest.
3. All ranks stand still inside a collective. Some rank is in another one than the rest, or left one out: the one with
   the fewest steps, then the one whose place in the code is the rarest.

As long as one rank moves, or is in a phase that may take long, there is no alarm, however long the others wait.
Times are durations that each process measures on its own: clocks of different hosts are never compared.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ENDED = "ended"
"""Phase of a rank that has closed its watchdog."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Times after which a rank that does not move is stalled, in seconds."""

    timeout: float = 60.0
    """Limit of every phase that is not named, and of a silent rank. The main thread must `beat` more often."""
    phases: Mapping[str, float] = field(
        default_factory=lambda: {"starting": 900.0, "saving": 900.0, "validating": 900.0}
    )
    """Limits of the phases that may take longer."""

    def __post_init__(self) -> None:
        for name, limit in {"timeout": self.timeout, **self.phases}.items():
            if not limit > 0:
                raise ValueError(f"the watchdog's limit of {name} is {limit}, want seconds above 0; leave it out")

    def of(self, phase: str) -> float:
        """Return the limit of a phase."""
        return self.phases.get(phase, self.timeout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """One rank's message to the others."""

    rank: int
    host: str
    pid: int
    count: int
    """Number of this message; a new one is a sign of life."""
    step: int
    phase: str
    still: float
    """Seconds since the main thread last moved."""
    waiting: bool
    """The main thread is inside a collective."""
    where: str
    """Place of the main thread, as FILE:LINE FUNCTION."""

    def to_json(self) -> str:
        """Return the message as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Return the message that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class SignOfLife:
    """The knowledge of one rank about another."""

    heartbeat: Heartbeat | None
    """Its last message; None before the first."""
    silent: float
    """Seconds since a new one came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stall:
    """The finding that a run stands still, and because of which rank."""

    kind: Literal["silent", "still", "collective", "store"]
    """silent: no heartbeat. still: outside a collective. collective: all are inside one. store: it does not answer."""
    rank: int
    host: str = ""
    pid: int | None = None
    """None of a rank that was never seen."""
    seconds: float
    step: int = 0
    phase: str = ""
    where: str = ""
    speaker: int
    """Rank that found it."""

    def to_json(self) -> str:
        """Return the finding as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Stall":
        """Return the finding that `to_json` wrote."""
        return cls(**json.loads(text))

    @property
    def sentence(self) -> str:
        """The finding for people."""
        who = f"rank {self.rank}" + (f" (pid {self.pid} on {self.host})" if self.pid is not None else "")
        at = f"step {self.step}, {self.phase}, in {self.where}"
        time = f"{self.seconds:.0f} s"
        match self.kind:
            case "silent" if self.pid is None:
                return f"{who} has given no sign of life in {time}; it did not start, or its host is cut off"
            case "silent":
                return f"{who} has given no sign of life for {time}; it was stopped or killed after {at}"
            case "still":
                return f"{who} has stood still for {time}: {at}; the others wait for it"
            case "store":
                return f"{who} holds the store, which has not answered for {time}; it was stopped, or is cut off"
            case _:
                return f"all ranks have waited inside a collective for {time}; {who} is the odd one: {at}"


def find_stall(signs: Mapping[int, SignOfLife], limits: Limits, speaker: int) -> Stall | None:
    """Return why the run stands still, or None if it does not.

    Args:
        signs: of every rank, the speaker's own included.
        speaker: the rank that asks.
    """
    signs = {rank: sign for rank, sign in signs.items() if not has_ended(sign)}
    silent = {rank: sign for rank, sign in signs.items() if is_silent(sign, limits)}
    if silent:
        rank = max(silent, key=lambda one: silent[one].silent)
        sign = silent[rank]
        if sign.heartbeat is None:
            return Stall(kind="silent", rank=rank, seconds=sign.silent, speaker=speaker)
        return _stall("silent", sign.heartbeat, sign.silent, speaker)
    beats = [sign.heartbeat for sign in signs.values() if sign.heartbeat is not None]
    if not beats or len(beats) < len(signs) or any(beat.still <= limits.of(beat.phase) for beat in beats):
        return None
    idle = [beat for beat in beats if not beat.waiting]
    if idle:
        stalled = min(idle, key=lambda beat: (beat.step, -beat.still))
        return _stall("still", stalled, stalled.still, speaker)
    places = Counter(beat.where for beat in beats)
    odd = min(beats, key=lambda beat: (beat.step, places[beat.where], -beat.still))
    return _stall("collective", odd, min(beat.still for beat in beats), speaker)


def is_silent(sign: SignOfLife, limits: Limits) -> bool:
    """Return whether a rank should have given a sign of life, but has not."""
    return sign.silent > (limits.of("starting") if sign.heartbeat is None else limits.timeout)


def has_ended(sign: SignOfLife) -> bool:
    """Return whether a rank has closed its watchdog."""
    return sign.heartbeat is not None and sign.heartbeat.phase == ENDED


def _stall(kind: Any, beat: Heartbeat, seconds: float, speaker: int) -> Stall:
    return Stall(
        kind=kind,
        rank=beat.rank,
        host=beat.host,
        pid=beat.pid,
        seconds=seconds,
        step=beat.step,
        phase=beat.phase,
        where=beat.where,
        speaker=speaker,
    )
