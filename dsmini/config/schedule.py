"""The schedule of the learning rates, as phases in a config:

    lr_schedule = ["warmup 0.05", "constant 0.5", "cosine to 0.1", "constant 0.1 at 0.03"]

    warmup SHARE                 up from 0 to the peak; only as the first phase
    constant [SHARE]             flat, at the end of the previous phase: at the peak if nothing decayed
    constant [SHARE] at LEVEL    flat, at another level
    cosine [SHARE] to LEVEL      along half a cosine
    linear [SHARE] to LEVEL      along a straight line

SHARE is a share of the run's steps, LEVEL a share of the peak learning rate. One phase may leave out its share: it
takes the remaining steps.

Lengths are shares of the run's steps, so a run of any length has the shape of the published one (DeepSeek-V3 report,
section 4.2, and configs/deepseek-v3.toml). Steps count from 0.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, reduce
from itertools import accumulate
from operator import sub

from dsmini.config.fields import require

SPELLINGS = "'warmup SHARE', 'constant [SHARE] [at LEVEL]', 'cosine [SHARE] to LEVEL' or 'linear [SHARE] to LEVEL'"
NUMBER = r"-?\d*\.?\d+(?:[eE][+-]?\d+)?|-?\d+\."
PHASE = re.compile(rf"(\w+)(?: ({NUMBER}))?(?: (to|at) ({NUMBER}))?")
WORDS: dict[str, tuple[str | None, ...]] = {
    "warmup": (None,),
    "constant": (None, "at"),
    "cosine": ("to",),
    "linear": ("to",),
}
"""Words that may stand before the level of a phase, by its kind; None: it needs no level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of the learning rate."""

    kind: str
    """Shape of the phase: warmup, constant, cosine or linear."""
    share: float | None
    """Share of the run's steps; None: all steps that the other phases leave."""
    level: float | None
    """Learning rate at the end of the phase, as a share of the peak; None: the peak after a warm-up, else as before."""

    def __str__(self) -> str:
        word = "at" if self.kind == "constant" else "to"
        parts = (("", self.share), (f" {word}", self.level))
        # the shortest text that float() reads as the same bits
        return self.kind + "".join(f"{w} {n!r}".removesuffix(".0") for w, n in parts if n is not None)


@cache
def read_phases(texts: tuple[str, ...]) -> tuple[Phase, ...]:
    """Read a schedule. A text may hold several phases or a part of one, since a shell splits at spaces.

    Raises: ValueError for a text that is not a phase, and for phases that do not fit together.
    """
    phases = tuple(_read(text) for text in _split(texts))
    written = ", ".join(map(str, phases))
    opened = [repr(str(phase)) for phase in phases if phase.share is None]
    taken = sum(phase.share or 0.0 for phase in phases)
    for wrong, words in (
        (not phases, f" is empty; write phases such as {SPELLINGS}"),
        (
            any(phase.kind == "warmup" for phase in phases[1:]),
            f"={written!r} has a warm-up that is not the first phase; move it to the front",
        ),
        (
            len(opened) > 1,
            f"={written!r} leaves out the share of {' and of '.join(opened)}; only one phase can take the remaining "
            "steps",
        ),
        (
            taken > 1 + 1e-9,
            f"={written!r} takes {taken:g} of the steps; want 1 or less, what is left is the phase without a share",
        ),
        (
            not opened and taken < 1 - 1e-9,
            f"={written!r} takes only {taken:g} of the steps; leave out the share of one phase, which then takes the "
            "rest",
        ),
    ):
        require(not wrong, f"train.lr_schedule{words}")
    return phases


def _split(texts: Iterable[str]) -> list[str]:
    """Join the texts, and split them again before each kind of phase."""
    phases: list[str] = []
    for word in " ".join(texts).replace(",", " ").split():
        if word in WORDS or not phases:
            phases.append(word)
        else:
            phases[-1] += f" {word}"
    return phases


def _read(text: str) -> Phase:
    match = PHASE.fullmatch(text)
    if match is None or match[3] not in WORDS.get(match[1], ()):
        raise ValueError(f"train.lr_schedule has {text!r}, which is not a phase; write {SPELLINGS}")
    share, level = (None if number is None else float(number) for number in match.group(2, 4))
    for name, value in (("share", share), ("level", level)):
        require(
            value is None or 0 <= value <= 1,
            f"train.lr_schedule has {text!r}, whose {name} is not between 0 and 1; use a share of one",
        )
    return Phase(kind=match[1], share=share, level=level)


# --- the values at a step


def rate_share(step: int, steps: int, phases: tuple[Phase, ...]) -> float:
    """Return the share of its peak that every learning rate has at this step.

    A warm-up ends with the first step at the full peak. A decay starts at the level before it and ends at its own, both
    included. A decay of one step has the level before it. A phase may be too short for a step.
    """
    level, start = 1.0, 0
    for phase, end in zip(phases, phase_ends(phases, steps), strict=True):
        if step < end:
            return _share_within(phase, step - start, end - start, level)
        level, start = level if phase.level is None else phase.level, max(start, end)
    return level


def phase_ends(phases: tuple[Phase, ...], steps: int) -> list[int]:
    """Return for each phase the first step after it.

    Shares before the phase without one are added up from the start, those after it are subtracted from the end.
    """
    rest = next((i for i, phase in enumerate(phases) if phase.share is None), len(phases) - 1)
    shares = [phase.share or 0.0 for phase in phases]
    after = [reduce(sub, shares[i + 1 :], 1.0) for i in range(rest, len(shares))]
    return [round(end * steps) for end in (*accumulate(shares[:rest]), *after)]


def _share_within(phase: Phase, step: int, length: int, before: float) -> float:
    """Return the learning rate share at a step of a phase, which starts at the level `before`."""
    if phase.kind == "warmup":
        return (step + 1) / length
    level = before if phase.level is None else phase.level
    if phase.kind == "constant":
        return level
    progress = step / max(1, length - 1)
    above = 0.5 * (1 + math.cos(math.pi * progress)) if phase.kind == "cosine" else 1 - progress
    return level + (before - level) * above
