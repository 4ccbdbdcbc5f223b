"""Things to try: everything that gained when it was tried, the largest gain first."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsmini.diagnosis.diagnosis import Diagnosis
from dsmini.diagnosis.evidence.evidence import GAIN
from dsmini.diagnosis.gains import percent
from dsmini.diagnosis.interventions.data import REPLAY
from dsmini.diagnosis.interventions.machine import DTYPE, THREADS
from dsmini.diagnosis.training_work import WAITING
from dsmini.report import Section, pick

LEAST_GAIN = 0.02
"""Gain below which nothing is worth a line."""
IN_SECTIONS = {DTYPE.name: "dtypes", THREADS.name: "threads", REPLAY.name: WAITING.name}
"""Interventions that an experiment shows in more detail, or another gain more exactly."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """A change that gained."""

    what: str
    value: float
    gain: str
    """Measured gain with its interval, in words."""
    predicted: str
    action: str


def tries_of(found: Diagnosis, sections: Sequence[Section]) -> list[Try]:
    """Return the changes that gained, best first: those of the verdict, and those of the evidence."""
    better = {section.name for section in sections} | found.gains.keys()
    tries: list[Try] = []
    for name, g in found.gains.items():
        if IN_SECTIONS.get(name) not in better:
            said = None if found.prediction is None else found.prediction.gain(name)
            action = found.work.changes[name].action
            tries.append(Try(what=name, value=g.value, gain=str(g), predicted=_percent(said), action=action))
    for section in sections:
        for figure in pick(section.figures, GAIN):
            value, low, high = figure.measured or 0.0, figure.low or 0.0, figure.high or 0.0
            tries.append(
                Try(
                    what=str(figure.case["try"]),
                    value=value,
                    gain=percent(value, low, high),
                    predicted=_percent(figure.predicted),
                    action=figure.note,
                )
            )
    return sorted((each for each in tries if each.value >= LEAST_GAIN), key=lambda each: -each.value)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
