"""Gains of rounds, and the verdict that they allow."""

from types import SimpleNamespace

import numpy as np
import pytest

from dsmini.diagnosis.gains import LEAST_ROUNDS, Gain, gain, gain_of_rounds
from dsmini.diagnosis.training_work import TRAINING
from dsmini.diagnosis.verdict import LEAST, Outcome, verdict
from dsmini.planner.binding import Axis

DATA, ALGORITHM, MACHINE = Axis.DATA, Axis.ALGORITHM, Axis.MACHINE


def exactly(low: float, high: float | None = None, rounds: int = 20) -> Gain:
    high = low if high is None else high
    return Gain(value=(low + high) / 2, low=low, high=high, rounds=rounds)


def test_slow_round_cancels() -> None:
    """Check the worked example: the third round is twice as slow, on both sides."""
    found = gain([0.2, 0.21, 0.4, 0.2, 0.2], [0.1, 0.104, 0.205, 0.1, 0.1])
    assert found.value == pytest.approx(0.5) and found.low > 0.48 and found.high < 0.51 and found.rounds == 5


def test_interval_covers_the_truth() -> None:
    """Check 400 experiments of 20 rounds whose true median gain is 0.3; 19 of 20 intervals should hold it.

    A share of 0.95 over 400 varies by 0.011. The percentile interval of a median is known to cover a little less.
    """
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(400):
        found = gain_of_rounds(0.3 + 0.1 * draw.standard_normal(20), seed)
        hits += found.low <= 0.3 <= found.high
    assert 0.90 <= hits / 400 <= 0.99


def test_noise_widens_the_interval() -> None:
    draw = np.random.default_rng(1).standard_normal(30)
    quiet, noisy = (gain_of_rounds(0.3 + scale * draw) for scale in (0.01, 0.2))
    assert noisy.high - noisy.low > 10 * (quiet.high - quiet.low)


def test_same_rounds_give_the_same_interval() -> None:
    values = np.random.default_rng(2).standard_normal(15)
    assert gain_of_rounds(values) == gain_of_rounds(values)


def test_too_few_rounds_are_refused() -> None:
    few = [1.0] * (LEAST_ROUNDS - 1)
    with pytest.raises(ValueError, match="at least 5"):
        gain(few, few)
    with pytest.raises(ValueError, match="equally many"):
        gain([1.0] * 6, [1.0] * 7)


@pytest.mark.parametrize(
    ("gains", "outcome", "axis"),
    [
        ({DATA: (0.4, 0.5), ALGORITHM: (0.0, 0.05), MACHINE: (0.0, 0.2)}, Outcome.BINDS, DATA),
        ({DATA: (0.0, 0.01), ALGORITHM: (0.11, 0.2), MACHINE: (0.0, 0.1)}, Outcome.BINDS, ALGORITHM),
        ({MACHINE: (0.11, 0.12)}, Outcome.BINDS, MACHINE),
        ({DATA: (0.0, 0.01), ALGORITHM: (0.0, LEAST), MACHINE: (0.0, 0.02)}, Outcome.NOTHING_BINDS, None),
        ({DATA: (0.3, 0.5), ALGORITHM: (0.2, 0.4), MACHINE: (0.0, 0.0)}, Outcome.MIXED, None),
        ({DATA: (0.05, 0.2), ALGORITHM: (0.0, 0.05), MACHINE: (0.0, 0.0)}, Outcome.UNDETERMINED, None),
        ({DATA: (0.2, 0.3), ALGORITHM: (-0.3, 0.4), MACHINE: (0.0, 0.0)}, Outcome.UNDETERMINED, None),
        ({DATA: (0.2, 0.3), ALGORITHM: (0.0, 0.2), MACHINE: (0.0, 0.0)}, Outcome.UNDETERMINED, None),
        ({DATA: (-0.2, 0.3), ALGORITHM: (-0.3, 0.2), MACHINE: (0.0, 0.0)}, Outcome.UNDETERMINED, None),
    ],
)
def test_verdict(gains: dict[Axis, tuple[float, float]], outcome: Outcome, axis: Axis | None) -> None:
    found = verdict({name: exactly(*ends) for name, ends in gains.items()})
    assert (found.outcome, found.axis) == (outcome, axis)
    assert bool(found.decides) == (outcome in (Outcome.MIXED, Outcome.UNDETERMINED))
    for name in gains:
        if outcome is Outcome.MIXED and name is not MACHINE:
            assert name.value in found.sentence
    assert found.axis is None or found.axis.value in found.sentence
    assert "  " not in found.sentence and found.sentence.endswith(".")


def test_every_axis_that_hides_the_answer_is_named() -> None:
    found = verdict({DATA: exactly(0.2, 0.3), ALGORITHM: exactly(-0.3, 0.4), MACHINE: exactly(0.0)})
    assert "Algorithm" in found.sentence and "Machine" not in found.sentence


def test_rounds_that_would_decide_grow_with_noise() -> None:
    """Check that four times the width asks for sixteen times the rounds, and a hopeless case for a quiet machine."""
    narrow = verdict({DATA: exactly(0.13, 0.17, 8), ALGORITHM: exactly(0.0, 0.14, 8)})
    assert narrow.outcome is Outcome.UNDETERMINED and "--rounds" in narrow.decides
    assert (
        narrow.sentence
        == "Undetermined: Data 15 % (13 to 17) of a step leads, and Algorithm 7 % (0 to 14) may be as much."
    )
    on_the_line = verdict({DATA: exactly(0.09, 0.11), ALGORITHM: exactly(0.0)})
    assert on_the_line.sentence.startswith(
        "Undetermined: Data 10 % (9 to 11) of a step may be more or less than the 10%"
    )
    assert on_the_line.decides.startswith("The interval is narrow already")
    hopeless = verdict({DATA: exactly(0.0, 0.22, 60), ALGORITHM: exactly(0.0)})
    assert "quiet machine" in hopeless.decides


def test_no_gains_are_refused() -> None:
    with pytest.raises(ValueError, match="no gain was measured"):
        verdict({})


def test_change_that_noise_hides_keeps_its_axis_open() -> None:
    """Check that a gain of 30 % (-2 to 60) is not dropped for one of 1 % (0 to 2) of the same axis."""
    gains = {
        "uniform_routing": Gain(value=0.3, low=-0.02, high=0.6, rounds=20),
        "dense_active": exactly(0.0, 0.02),
        "waiting": exactly(0.0),
        "replay": exactly(-0.2, 0.3),
        "quiet_machine": exactly(0.0, 0.01),
    }
    axes = TRAINING.by_axis(gains)
    assert (axes[ALGORITHM].low, axes[ALGORITHM].high) == (0.0, 0.6)
    assert axes[DATA].high == 0.0, "an exact gain stands alone"
    assert verdict(axes).outcome is Outcome.UNDETERMINED
    assert verdict(TRAINING.by_axis(gains | {"all_threads": exactly(0.15, 0.25)})).outcome is Outcome.UNDETERMINED
    assert verdict(TRAINING.by_axis(gains | {"uniform_routing": exactly(0.0, 0.03)})).outcome is Outcome.NOTHING_BINDS


@pytest.mark.parametrize(("ends", "confirmed"), [((-0.01, 0.05), True), ((-0.3, 0.3), False), ((0.05, 0.08), False)])
def test_replay_confirms_a_step_s_own_clock_only_where_it_hides_little(
    ends: tuple[float, float], confirmed: bool
) -> None:
    step = SimpleNamespace(data_wait=0.0)
    measured = SimpleNamespace(steps=[step] * 5)
    assert bool(TRAINING.estimated(measured, {"replay": exactly(*ends)})) is confirmed  # pyright: ignore[reportArgumentType]
