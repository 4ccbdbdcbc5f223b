"""Dense twin: what would a dense model with as many parameters cost?

A mixture of E experts, of which a token visits k, and a shared one has a twin: one feed-forward with all parameters. It
is (E + 1) / (k + 1) times as wide as what a token visits, and a token multiplies with all of it. FLOPs of both are
counted before anything runs. The forecast says how far seconds follow: the twin's products are fewer and larger.

Worked example: 16 experts, 4 visited, one shared: the twin's feed-forwards take 17 / 5 = 3.4 times the FLOPs. If they
are half of all FLOPs, a forward and backward takes 0.5 + 0.5 * 3.4 = 2.2 times as many.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dsmini.diagnosis.evidence.evidence import Evidence, in_ms, in_turns, timed
from dsmini.diagnosis.interventions.algorithm import dense_pair, no_experts
from dsmini.diagnosis.predictions import Priced, routed_and_dense, shape_of
from dsmini.diagnosis.subject import Subject
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Plot, Section


@dataclass(frozen=True, kw_only=True)
class DenseTwin:
    """Seconds of forward and backward with experts, and of the dense twin."""

    routed: Sequence[float]
    dense: Sequence[float]
    predicted: tuple[Priced, Priced] | None

    @property
    def ratios(self) -> list[float]:
        """Seconds of the twin over those with experts, turn by turn, ascending."""
        return sorted(b / a for a, b in zip(self.routed, self.dense, strict=True))


def numbers(subject: Subject, rates: Rates | None, seconds: float) -> DenseTwin:
    """Predict, then measure."""
    predicted = None
    if rates is not None:
        predicted = routed_and_dense(
            shape_of(subject.config, subject.rows, subject.config.train.dtype), rates, total=True
        )
    routed: list[float] = []

    with dense_pair(subject, total=True) as pair:

        def turn() -> float:
            with_routing, without = pair()
            routed.append(with_routing)
            return without

        dense = in_turns({"dense": turn}, seconds)["dense"]
    return DenseTwin(routed=routed[-len(dense) :], dense=dense, predicted=predicted)


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    ratio, said = statistics.median(found.ratios), found.predicted
    priced = {} if said is None else {"experts": said[0].seconds, "dense twin": said[1].seconds}
    sides = {"experts": found.routed, "dense twin": found.dense}
    figures = [
        timed("dense_twin", {"model": name}, taken, priced.get(name), metric="forward_and_backward")
        for name, taken in sides.items()
    ]
    flops = None if said is None else said[1].flops / said[0].flops
    figures.append(
        Figure(
            question="dense_twin",
            case={"model": "dense twin"},
            metric="seconds_over_experts",
            unit="x",
            measured=ratio,
            predicted=None if said is None else said[1].seconds / said[0].seconds,
            low=found.ratios[0],
            high=found.ratios[-1],
        )
    )
    if flops is not None:
        case = {"model": "dense twin"}
        figures.append(Figure(question="dense_twin", case=case, metric="flops_over_experts", unit="x", predicted=flops))
    names = list(sides)
    middle = [statistics.median(sides[name]) for name in names]
    bars = in_ms((), middle, [priced[name] for name in names] if priced else None, bars=True)
    return Section(
        name="dense_twin",
        title="What would a dense model with as many parameters cost?",
        finding=f"It would take {ratio:.2f} times the time of the experts"
        + (f", for {flops:.2f} times the FLOPs." if flops is not None else "."),
        figures=figures,
        plots=[Plot(title="Forward and backward", x="model", y="ms", series=bars, labels=names)],
        about="One dense feed-forward stands in for all experts of a block, with as many parameters. "
        "The optimizer is left out: it moves as much in both.",
    )


DENSE_TWIN = Evidence(name="dense_twin", why_not=no_experts, run=run, weight=8.0, steps=6)
