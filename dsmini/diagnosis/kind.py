"""A kind of work: all that a diagnosis has to know of training, or of decoding, to diagnose it.

The experiment, the gains, the verdict and the pages are the same for every kind. A kind says what can be made free, how
it is predicted, and what else is looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

from dsmini.diagnosis.experiment import Measured, R
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings.steps import STOP_OTHERS
from dsmini.diagnosis.gains import Gain
from dsmini.diagnosis.interventions.intervention import Intervention, MadeFree
from dsmini.diagnosis.predictions import Prediction
from dsmini.measure.step_rates import Rates
from dsmini.planner.binding import Axis

QUIET = MadeFree(
    name="quiet_machine",
    axis=Axis.MACHINE,
    words="other programs take nothing; estimated",
    action=STOP_OTHERS,
)
"""Gain without other programs. It is estimated, as they cannot be stopped to see."""
S = TypeVar("S")


def _no_gains(measured: Measured[Any], gains: Mapping[str, Gain]) -> Mapping[str, Gain]:
    return {}


def _nothing_seen(subject: Any, measured: Measured[Any]) -> Sequence[Finding]:
    return ()


def _no_parts(measured: Measured[Any]) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class KindOfWork(Generic[S, R]):
    """A kind of work that can be diagnosed. S is its subject, R what a step of it returns."""

    interventions: Sequence[Intervention[S]]
    predict: Callable[[S, list[str], Rates], Prediction]
    """Predicts a plain step and one with each of the interventions named."""
    look: Callable[[S], Sequence[Finding]]
    """Returns findings that need no steps."""
    look_back: Callable[[S, Measured[R]], Sequence[Finding]] = _nothing_seen
    """Returns findings of the subject that compare it with its steps."""
    findings: Callable[[Measured[R], Prediction | None], Sequence[Finding | None]]
    """Returns findings of the plain steps."""
    estimates: Sequence[MadeFree] = (QUIET,)
    """Changes whose gains are estimated from plain steps."""
    estimated: Callable[[Measured[R], Mapping[str, Gain]], Mapping[str, Gain]] = _no_gains
    """Returns gains that plain steps tell, QUIET's apart; is given those of the interventions."""
    exact: Mapping[Axis, str] = field(default_factory=dict)
    """Estimates that stand for their axis wherever they are made, by axis."""
    parts: Callable[[Measured[R]], Mapping[str, float]] = _no_parts
    """Returns measured seconds of a plain step beyond what a forecast has, by part."""
    not_here: Mapping[str, str] = field(default_factory=dict)
    """Reasons why some things cannot be made free in this kind of work."""
    vocabulary: Sequence[tuple[str, str, str, str]] = ()
    """Axis, what is meant here, the article's word, the textbook's."""
    about_words: str = ""
    """Where both vocabularies agree and where they differ."""

    @cached_property
    def changes(self) -> Mapping[str, MadeFree]:
        """Interventions and estimates by name."""
        return {each.name: each for each in (*self.interventions, *self.estimates)}

    def best(self, gains: Mapping[str, Gain]) -> dict[Axis, str]:
        """Return for each axis the change that gains most for certain."""
        best: dict[Axis, str] = {}
        for name, found in gains.items():
            axis = self.changes[name].axis
            if axis not in best or found.low > gains[best[axis]].low:
                best[axis] = name
        best |= {axis: name for axis, name in self.exact.items() if name in gains}
        return {axis: best[axis] for axis in Axis if axis in best}

    def by_axis(self, gains: Mapping[str, Gain]) -> dict[Axis, Gain]:
        """Return each axis's gain: the best of its changes, with the highest upper end of all of them.

        A change that noise hides may gain more than the best one, and then nobody knows what binds.
        """
        found: dict[Axis, Gain] = {}
        for axis, name in self.best(gains).items():
            others = [other for other in gains if self.changes[other].axis is axis]
            others = [name] if self.exact.get(axis) == name else others
            found[axis] = replace(gains[name], high=max(gains[other].high for other in others))
        return found
