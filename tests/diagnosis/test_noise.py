"""Noise: steps that take random extra time must give no wrong verdict, and the same steps without it the right one."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from dsmini.diagnosis import experiment
from dsmini.diagnosis.contention import Contention, Watch
from dsmini.diagnosis.diagnosis import Diagnosis, conclude
from dsmini.diagnosis.experiment import run_in_turns
from dsmini.diagnosis.gains import LEAST_ROUNDS, Gain, gain_of_rounds, sign_test_rank
from dsmini.diagnosis.interventions.algorithm import UNIFORM
from dsmini.diagnosis.interventions.data import REPLAY
from dsmini.diagnosis.interventions.intervention import Intervention, Step
from dsmini.diagnosis.subject import Subject
from dsmini.diagnosis.verdict import LEAST, Outcome
from dsmini.planner.binding import Axis
from dsmini.training.trainer import StepResult

Noise = Callable[[], float]
JITTER = 0.002
"""Spread of steps on a quiet machine."""


class Timed:
    """Steps of 1 s by a clock that only they move, with noise that is added or a factor."""

    def __init__(self, seed: int, extra: float = 0.0, factor: bool = False) -> None:
        self.draw, self.extra, self.factor, self.now = np.random.default_rng(seed), extra, factor, 0.0

    def take(self, seconds: float) -> float:
        """Let a step of this many seconds pass. Extra time is Pareto, of infinite variance."""
        noise = self.extra * self.draw.pareto(1.2) + JITTER * self.draw.standard_normal()
        taken = seconds * (1 + noise) if self.factor else seconds + noise
        self.now += taken
        return taken

    def step(self) -> StepResult:
        losses: dict[str, Any] = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
        seconds = self.take(1.0)
        return StepResult(step=1, tokens=8, seconds=seconds, data_wait=0.0, counts=None, skipped=False, **losses)


class Quiet:
    """A watch that sees nobody else."""

    def begin(self) -> None: ...

    def end(self) -> Contention:
        return Contention(others=0.0, steadiness=1.0)


def freed(of: Intervention, gain: float) -> Intervention:
    """Return the intervention with a true gain."""

    @contextmanager
    def apply(subject: Any) -> Iterator[Step]:
        yield lambda _base: subject.take(1.0 - gain)

    return dataclasses.replace(of, apply=apply)


def diagnosed(timed: Any, gain: float, rounds: int, seconds: float = math.inf) -> Diagnosis:
    arms, watch = [freed(REPLAY, 0.0), freed(UNIFORM, gain)], Quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.time, "perf_counter", lambda: timed.now)
        found = run_in_turns(timed, arms, watch, rounds=rounds, seconds=seconds, least=LEAST_ROUNDS)  # pyright: ignore[reportArgumentType]
    return conclude(found, None, {}, [])


@pytest.mark.parametrize(("gain", "outcome"), [(0.12, Outcome.BINDS), (0.08, Outcome.NOTHING_BINDS)])
def test_noise_hides_a_gain_near_a_tenth(gain: float, outcome: Outcome) -> None:
    """Check 20 diagnoses of 180 s each: right without noise, undetermined with it.

    An interval misses the truth once in 20 times. More than 4 misses of 20 happen by chance 0.003.
    """
    hidden = 0
    for seed in range(20):
        quiet = diagnosed(Timed(seed), gain, 200, seconds=180.0)
        assert quiet.verdict.outcome is outcome and quiet.measured.rounds == 20, "9 steps a round"
        noisy = diagnosed(Timed(seed, extra=0.5), gain, 200, seconds=600.0)
        hidden += noisy.verdict.outcome is Outcome.UNDETERMINED
        if noisy.verdict.outcome is Outcome.UNDETERMINED:
            assert noisy.named == "" and noisy.sentence.startswith("Undetermined") and noisy.verdict.decides
    assert hidden >= 16


@pytest.mark.parametrize("rounds", [7, 20])
def test_noise_alone_is_no_alarm(rounds: int) -> None:
    """Check 200 diagnoses of runs in which nothing is to be gained: not one may name an axis.

    The gain would have to be 10 % for the lower end to be above it in 2.5 % of the cases.
    """
    found = [diagnosed(Timed(seed, extra=0.05), 0.0, rounds) for seed in range(200)]
    assert not any(each.named for each in found)


@pytest.mark.parametrize("rounds", [6, 7, 10, 13, 20])
def test_alarms_at_the_limit_are_as_rare_as_the_interval_says(rounds: int) -> None:
    """Check 200 runs whose true gain is the limit itself: an alarm is a lower end above the truth.

    A 95 % interval allows it in 2.5 % of the runs, 5 of 200. Chance adds three standard deviations of a binomial,
    3 * sqrt(200 * 0.025 * 0.975) = 6.6, so that at most 11 are right.
    """
    most = 200 * 0.025 + 3 * (200 * 0.025 * 0.975) ** 0.5
    found = [diagnosed(Timed(seed, extra=0.2, factor=True), LEAST, rounds) for seed in range(200)]
    assert sum(each.named == "Algorithm" for each in found) <= most
    assert not any(each.named in ("Data", "Machine") for each in found)


@pytest.mark.parametrize("rounds", [5, 6, 7, 8, 10, 13, 20])
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


def test_ranks_of_the_sign_test() -> None:
    """Check ranks of tables of the sign test: 6 to 8 draws have 1, 9 have 2, 20 have 6, 60 have 22."""
    assert [sign_test_rank(n) for n in (5, 6, 8, 9, 12, 20, 60)] == [1, 1, 1, 2, 3, 6, 22]
    assert 400 < sign_test_rank(1000) < 500


# --- real steps of a small run, with real sleeps

ROUNDS = 6


def slept(subject: Subject, seconds: float, noise: Noise) -> Diagnosis:
    """Let every step sleep this long, and for as long as the noise says; the intervention frees the first.

    Steps and sleeps are timed by the clock of this machine.
    """
    step, work = subject.trainer.step, [seconds]

    def longer() -> StepResult:
        start = time.perf_counter()
        time.sleep(work[0] + noise())
        return dataclasses.replace(step(), seconds=time.perf_counter() - start)

    @contextmanager
    def apply(_subject: Subject) -> Iterator[Step]:
        work[0] = 0.0
        try:
            yield lambda _base: subject.step().seconds
        finally:
            work[0] = seconds

    arm = dataclasses.replace(UNIFORM, apply=apply)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject.trainer, "step", longer)
        taken = run_in_turns(subject, [arm], Watch(None, torch.device("cpu")), rounds=ROUNDS, seconds=0, least=ROUNDS)
    taken.contention[:] = [Contention(others=0.0, steadiness=1.0)] * ROUNDS  # whatever else this machine does
    return conclude(taken, None, {}, [])


def test_real_sleeps_hide_a_real_gain(subject: Subject) -> None:
    """Check steps that sleep half of their time, and a fifth of it hidden by sleeps of up to ten steps."""
    subject.step()
    own = min(subject.step().seconds for _ in range(3))
    draw = np.random.default_rng(0)
    quiet = slept(subject, own, lambda: 0.0)
    assert quiet.verdict.axis is Axis.ALGORITHM
    noisy = slept(subject, own / 4, lambda: own * min(10.0, 3 * draw.pareto(0.8)))
    assert noisy.verdict.outcome is Outcome.UNDETERMINED and noisy.named == ""
    assert width(noisy.gains["uniform_routing"]) > width(quiet.gains["uniform_routing"])


def width(gain: Gain) -> float:
    return gain.high - gain.low
