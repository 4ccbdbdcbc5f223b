"""Gains of rounds with their intervals, and the verdict that they allow."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsmini.diagnosis.contention import Contention
from dsmini.diagnosis.diagnosis import Diagnosis, conclude
from dsmini.diagnosis.experiment import Measured
from dsmini.diagnosis.gains import LEAST_ROUNDS, Gain, gain, gain_of_rounds, sign_test_rank
from dsmini.diagnosis.training_work import TRAINING
from dsmini.diagnosis.verdict import LEAST, Outcome, verdict
from dsmini.planner.binding import Axis
from tests.diagnosis.conftest import step_of

DATA, ALGORITHM, MACHINE = Axis.DATA, Axis.ALGORITHM, Axis.MACHINE
BINDS, NOTHING, MIXED, UNDETERMINED = Outcome.BINDS, Outcome.NOTHING_BINDS, Outcome.MIXED, Outcome.UNDETERMINED


def exactly(low: float, high: float | None = None, rounds: int = 20) -> Gain:
    high = low if high is None else high
    return Gain(value=(low + high) / 2, low=low, high=high, rounds=rounds)


def test_slow_round_cancels() -> None:
    """Check the worked example: the third round is twice as slow, on both sides."""
    found = gain([0.2, 0.21, 0.4, 0.2, 0.2], [0.1, 0.104, 0.205, 0.1, 0.1])
    assert found.value == pytest.approx(0.5) and found.low > 0.48 and found.high < 0.51 and found.rounds == 5


def test_too_few_rounds_are_refused() -> None:
    few = [1.0] * (LEAST_ROUNDS - 1)
    with pytest.raises(ValueError, match="at least 5"):
        gain(few, few)
    with pytest.raises(ValueError, match="equally many"):
        gain([1.0] * 6, [1.0] * 7)


# --- intervals


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


@pytest.mark.parametrize("rounds", [5, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 8, 10, 13, 20))])
def test_interval_of_few_rounds_holds_the_truth(rounds: int) -> None:
    """Check 600 medians of skewed noise; 5 rounds cannot do better than 1 - 2 / 2^5 = 94 %.

    The share of misses has a standard deviation of sqrt(0.05 * 0.95 / 600) = 0.9 %.
    """
    draw, truth = np.random.default_rng(rounds), 2 ** (1 / 1.2) - 1
    hits = 0
    for _ in range(600):
        found = gain_of_rounds(draw.pareto(1.2, rounds))
        hits += found.low <= truth <= found.high
    assert hits / 600 >= (0.9375 if rounds == 5 else 0.95) - 3 * 0.009


def test_noise_widens_the_interval_and_chance_does_not() -> None:
    draw = np.random.default_rng(1).standard_normal(30)
    quiet, noisy, again = (gain_of_rounds(0.3 + scale * draw) for scale in (0.01, 0.2, 0.2))
    assert noisy.high - noisy.low > 10 * (quiet.high - quiet.low) and noisy == again


def test_ranks_of_the_sign_test() -> None:
    """Check ranks of tables of the sign test: 6 to 8 draws have 1, 9 have 2, 20 have 6, 60 have 22."""
    assert [sign_test_rank(n) for n in (5, 6, 8, 9, 12, 20, 60)] == [1, 1, 1, 2, 3, 6, 22]
    assert 400 < sign_test_rank(1000) < 500


# --- verdicts

# ends of the gain of Data, Algorithm and Machine; the outcome, and the axis that binds
VERDICTS: list[tuple[list[tuple[float, float]], Outcome, Axis | None]] = [
    ([(0.4, 0.5), (0.0, 0.05), (0.0, 0.2)], BINDS, DATA),
    ([(0.0, 0.01), (0.11, 0.2), (0.0, 0.1)], BINDS, ALGORITHM),
    ([(0.0, 0.0), (0.0, 0.0), (0.11, 0.12)], BINDS, MACHINE),
    ([(0.0, 0.01), (0.0, LEAST), (0.0, 0.02)], NOTHING, None),
    ([(0.3, 0.5), (0.2, 0.4), (0.0, 0.0)], MIXED, None),
    ([(0.05, 0.2), (0.0, 0.05), (0.0, 0.0)], UNDETERMINED, None),
    ([(0.2, 0.3), (-0.3, 0.4), (0.0, 0.0)], UNDETERMINED, None),
    ([(0.2, 0.3), (0.0, 0.2), (0.0, 0.0)], UNDETERMINED, None),
    ([(-0.2, 0.3), (-0.3, 0.2), (0.0, 0.0)], UNDETERMINED, None),
]


@pytest.mark.parametrize(("ends", "outcome", "axis"), VERDICTS)
def test_verdict(ends: list[tuple[float, float]], outcome: Outcome, axis: Axis | None) -> None:
    found = verdict({name: exactly(*pair) for name, pair in zip(Axis, ends, strict=True)})
    assert (found.outcome, found.axis) == (outcome, axis)
    assert bool(found.decides) == (outcome in (MIXED, UNDETERMINED))
    assert "  " not in found.sentence and found.sentence.endswith(".")
    assert axis is None or axis.value in found.sentence
    if outcome is MIXED or ends[1] == (-0.3, 0.4):
        assert "Algorithm" in found.sentence and "Machine" not in found.sentence, "every axis that hides the answer"


def test_rounds_that_would_decide_grow_with_noise() -> None:
    """Check that four times the width asks for sixteen times the rounds, and a hopeless case for a quiet machine."""
    narrow = verdict({DATA: exactly(0.13, 0.17, 8), ALGORITHM: exactly(0.0, 0.14, 8)})
    assert narrow.outcome is UNDETERMINED and "--rounds" in narrow.decides
    leads = "Undetermined: Data 15 % (13 to 17) of a step leads, and Algorithm 7 % (0 to 14) may be as much."
    assert narrow.sentence == leads
    on_the_line = verdict({DATA: exactly(0.09, 0.11), ALGORITHM: exactly(0.0)})
    words = "Undetermined: Data 10 % (9 to 11) of a step may be more or less than the 10%"
    assert on_the_line.sentence.startswith(words)
    assert on_the_line.decides.startswith("The interval is narrow already")
    hopeless = verdict({DATA: exactly(0.0, 0.22, 60), ALGORITHM: exactly(0.0)})
    assert "quiet machine" in hopeless.decides
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
    assert verdict(axes).outcome is UNDETERMINED
    assert verdict(TRAINING.by_axis(gains | {"all_threads": exactly(0.15, 0.25)})).outcome is UNDETERMINED
    assert verdict(TRAINING.by_axis(gains | {"uniform_routing": exactly(0.0, 0.03)})).outcome is NOTHING


@pytest.mark.parametrize(("ends", "confirmed"), [((-0.01, 0.05), True), ((-0.3, 0.3), False), ((0.05, 0.08), False)])
def test_replay_confirms_the_clock_of_steps_only_where_it_hides_little(ends: Any, confirmed: bool) -> None:
    measured: Any = SimpleNamespace(steps=[SimpleNamespace(data_wait=0.0)] * 5)
    assert bool(TRAINING.estimated(measured, {"replay": exactly(*ends)})) is confirmed


# --- verdicts under noise


def concluded(seed: int, gain: float, rounds: int, noise: float) -> Diagnosis:
    """Conclude from steps of 1 s, of which balanced experts gain a share; each takes Pareto noise of its own."""
    draw = np.random.default_rng(seed)

    def taken(seconds: float) -> Any:
        return seconds * (1 + noise * draw.pareto(1.2, rounds) + 0.002 * draw.standard_normal(rounds))

    free = {"replay": taken(1.0), "uniform_routing": taken(1.0 - gain)}
    quiet = [Contention(others=0.0, steadiness=1.0)] * rounds
    plain = [step_of(1.0)] * rounds
    return conclude(Measured(plain=taken(1.0), free=free, contention=quiet, steps=plain), None, {}, [])


# a gain, the noise of a step, and how many of 200 runs may name an axis: none where nothing is to be gained; where the
# gain is the limit itself, 2.5 % by a 95 % interval, and three standard deviations of a binomial more
ALARMS = [(0.0, 0.05, 0.0), (LEAST, 0.2, 200 * 0.025 + 3 * (200 * 0.025 * 0.975) ** 0.5)]


@pytest.mark.parametrize("rounds", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 10, 13, 20))])
@pytest.mark.parametrize(("gain", "noise", "most"), ALARMS, ids=["nothing to gain", "at the limit"])
def test_alarms_are_as_rare_as_the_interval_says(gain: float, noise: float, most: float, rounds: int) -> None:
    named = [concluded(seed, gain, rounds, noise).named for seed in range(200)]
    assert named.count("Algorithm") <= most and named.count("") == 200 - named.count("Algorithm")
