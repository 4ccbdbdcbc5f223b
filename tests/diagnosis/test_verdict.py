"""The verdict that gains of arms allow, and how rarely noise makes one."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsmini.diagnosis import evidence, training
from dsmini.diagnosis.arms import AXES, LEAST, Arm, Axis, Comparison, percent
from dsmini.diagnosis.contention import Contention
from dsmini.diagnosis.evidence import gather
from dsmini.diagnosis.findings import other_programs
from dsmini.diagnosis.pages import record_of, sentence_of
from dsmini.diagnosis.training import PlainTurn, Subject
from dsmini.diagnosis.verdict import Diagnosis, gains_by_axis, verdict
from dsmini.measure.price import Prices
from dsmini.measure.turns import Estimate, Turns
from tests.diagnosis.conftest import QUIET, Imagine, idle, step_of

DATA, ALGORITHM, MACHINE = AXES
BINDS, NOTHING, MIXED, UNDETERMINED = "binds", "nothing binds", "mixed", "undetermined"


def exactly(low: float, high: float | None = None, rounds: int = 20) -> Estimate:
    high = low if high is None else high
    return Estimate(value=(low + high) / 2, low=low, high=high, turns=rounds)


def arm(name: str, axis: Axis = "Machine", **more: Any) -> Arm:
    return Arm(name=name, axis=axis, apply=idle, **more)


def compare(taken: Mapping[str, Sequence[float]], axis: Axis = "Algorithm", **of: Any) -> Comparison:
    """Return arms that took these seconds in turns. All but the first have these fields, and replay is of Data."""
    first, *rest = taken
    arms = [arm(first), *(arm(name, "Data" if name == "replay" else axis, **of) for name in rest)]
    return Comparison(arms=arms, turns=Turns({name: [*seconds] for name, seconds in taken.items()}))


def diagnosis(compared: Comparison, **more: Any) -> Diagnosis:
    return Diagnosis(compared=compared, findings=[], **more)


# --- gains


def test_gain_of_rare_stalls_is_that_of_all_turns_together() -> None:
    """Check stalls of 9 s in two of ten turns of 1 s: 18 of 28 s would go, and a median says nothing would."""
    taken = {"plain": [1.0] * 8 + [10.0] * 2, "replay": [1.0] * 10}
    rare, usual = (compare(taken, is_rare=is_rare).gains["replay"].value for is_rare in (True, False))
    assert (rare, usual) == (pytest.approx(18 / 28), 0.0)


def test_gain_is_of_a_token() -> None:
    """Check a step that makes twice the tokens in 1.5 times the time, measured and predicted."""
    found = compare({"batch 1": [1.0] * 5, "batch 2": [1.5] * 5}, tokens=2.0)
    found.predicted = {"batch 1": 2.0, "batch 2": 2.0}
    assert found.gains["batch 2"].value == 0.25 and found.predicted_gain(found.arms[1]) == 0.5


@pytest.mark.parametrize("rare", [True, False])
@pytest.mark.parametrize(("arms", "least"), [(1, 6), (4, 7)])
def test_few_rounds_have_no_interval_and_no_axis(arms: int, least: int, rare: bool) -> None:
    """Check gains of 80 % after one round less than a verdict needs, and after that."""
    for rounds in (least - 1, least):
        names = ("replay", *(f"arm {n}" for n in range(arms)))
        taken = {"plain": [1.0] * rounds} | {name: [0.2] * rounds for name in names}
        found = diagnosis(compare(taken, "Data", is_rare=rare))
        assert found.compared.least_turns == least and found.gains["replay"].is_clear == (rounds == least)
        assert found.named == ("Data" if rounds == least else "")
        if rounds < least:
            assert percent(found.gains["replay"]) == "80 %" and found.verdict.outcome == UNDETERMINED
            assert f"{rounds} rounds in the time" in found.sentence and f"--rounds {least}" in found.verdict.decides
            assert "So far a step without the cost of Data is shorter by 80 %, which may be chance." in found.sentence


def test_too_few_rounds_say_what_is_known_and_how_long_a_verdict_takes() -> None:
    """Check changes that lengthen a step, with 3 steps of 2 s and of 12 s in a round."""
    found = diagnosis(compare({"plain": [2.0], "replay": [2.0], "all_threads": [12.0]}, "Machine"))
    assert found.sentence.endswith("needs 6. So far no change shortens a step.")
    assert found.verdict.decides == "About 6 rounds, 4.80 min, would decide it (--rounds 6)."


def test_an_end_next_to_the_least_gain_tells_its_side() -> None:
    ends = ((0.096, 0.13), (0.104, 0.13), (0.1, 0.2), (0.05, 0.0951))
    said = [percent(exactly(low, high)).partition(" (")[2] for low, high in ends]
    assert said == ["9.6 to 13)", "10.4 to 13)", "10 to 20)", "5 to 9.5)"]


def test_other_programs_never_bind_and_may_hide_what_does() -> None:
    """Check costs of 40 % next to a gain of 20 %, the other way round, perhaps as much as it, and both small."""

    def found(others: float, measured: float, most: float | None = None) -> Diagnosis:
        return diagnosis(compare({"plain": [1.0] * 20, "a": [1 - measured] * 20}), others=exactly(others, most))

    first, as_much, hidden = found(0.4, 0.2), found(0.1, 0.3, 0.5), found(0.01, 0.3, 0.35)
    assert hidden.verdict.outcome == UNDETERMINED and "quiet machine" in hidden.verdict.decides, "no rounds would"
    assert first.verdict.outcome == UNDETERMINED and not first.named and "quiet machine" in first.verdict.decides
    assert "computed" in first.sentence and "Algorithm 20 %" in first.sentence
    assert not as_much.named and "other programs (computed) 30 % (10 to 50) may be as much" in as_much.sentence
    assert found(0.2, 0.4).named == "Algorithm" and found(0.05, 0.05).verdict.outcome == NOTHING


def test_others_that_cost_much_are_a_fault_after_few_rounds_too() -> None:
    """Check a cost of 40 % without an interval, which is known, and one of 5 %."""
    for loss, is_fault in ((0.4, True), (0.05, False)):
        once = Estimate(value=loss, low=-math.inf, high=math.inf, turns=1)
        found = other_programs([Contention(others=1.5, delayed=loss)], once, "training")
        assert found.is_fault == is_fault and f"Others cost about {percent(loss)} of a step" in found.sentence


# --- verdicts

VERDICTS = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["verdicts"]


@pytest.mark.parametrize(("ends", "outcome", "axis"), VERDICTS)
def test_verdict(ends: list[list[float]], outcome: str, axis: str) -> None:
    found = verdict({name: exactly(*pair) for name, pair in zip(AXES, ends, strict=True)})
    assert (found.outcome, found.axis or "") == (outcome, axis)
    assert bool(found.decides) == (outcome in (MIXED, UNDETERMINED))
    assert "  " not in found.sentence and found.sentence.endswith(".")
    assert axis in found.sentence
    if outcome == MIXED or ends[1] == [-0.3, 0.4]:
        assert "Algorithm" in found.sentence and "Machine" not in found.sentence, "every axis that hides the answer"


def test_rounds_that_would_decide_grow_with_noise() -> None:
    """Check that four times the width asks for sixteen times the rounds, and a hopeless case for a quiet machine."""
    narrow = verdict({DATA: exactly(0.13, 0.17, 8), ALGORITHM: exactly(0.0, 0.14, 8)})
    assert narrow.outcome == UNDETERMINED and "--rounds" in narrow.decides
    leads = "Undetermined: Data leads with 15 % (13 to 17) of a step, and Algorithm 7 % (0 to 14) may be as much."
    assert narrow.sentence == leads
    for low, high, rounds in ((0.09, 0.11, 20), (0.0, 0.22, 60)):
        hopeless = verdict({DATA: exactly(low, high, rounds), ALGORITHM: exactly(0.0)})
        assert "of a step may be above or below 10 %, the least that pays" in hopeless.sentence
        assert "quiet machine" in hopeless.decides
        assert ("Data costs most" in hopeless.sentence) == (low > 0), "only where nothing else may be as much"
    assert verdict({}).outcome == UNDETERMINED, "the time was over"


def test_change_that_noise_hides_keeps_its_axis_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a gain of 30 % (-2 to 60) is not dropped for one of 1 % (0 to 2) of the same axis."""
    gains = {"free_cache": exactly(-0.02, 0.6), "dense_active": exactly(0.0, 0.02), "replay": exactly(0.0)}
    axes: dict[str, Axis] = {"free_cache": "Algorithm", "dense_active": "Algorithm", "replay": "Data"}
    arms = [arm("plain"), *(arm(name, axis) for name, axis in axes.items()), arm("all_threads")]

    def by_axis(**others: Estimate) -> dict[Axis, Estimate]:
        found = gains | others
        monkeypatch.setattr(Comparison, "gains", found)
        return gains_by_axis(Comparison(arms=arms, turns=Turns({name: [1.0] for name in ("plain", *found)})))

    assert (by_axis()[ALGORITHM].low, by_axis()[ALGORITHM].high) == (0.0, 0.6)
    assert verdict(by_axis()).outcome == UNDETERMINED
    assert verdict(by_axis(all_threads=exactly(0.15, 0.25))).outcome == UNDETERMINED
    assert verdict(by_axis(free_cache=exactly(0.0, 0.03))).outcome == NOTHING


# --- verdicts under noise


def concluded(seed: int, gain: float, rounds: int, noise: float, arms: int = 1) -> Diagnosis:
    """Conclude from steps of 1 s, of which arms of an axis gain a share; each takes Pareto noise of its own."""
    draw = np.random.default_rng(seed)

    def taken(seconds: float) -> list[float]:
        return list(seconds * (1 + noise * draw.pareto(1.2, rounds) + 0.002 * draw.standard_normal(rounds)))

    names = [f"arm {n}" for n in range(arms)]
    seconds = {"plain": taken(1.0), "replay": taken(1.0)} | {name: taken(1.0 - gain) for name in names}
    return diagnosis(compare(seconds))


# a gain, the noise of a step, and how many of 200 runs may name an axis: none where nothing is to be gained; where the
# gain is the limit itself, 5 % by the level of the intervals, and three standard deviations of a binomial more
ALARMS = [(0.0, 0.05, 0.0), (LEAST, 0.2, 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5)]


@pytest.mark.parametrize("arms", [1, 5])
@pytest.mark.parametrize("rounds", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 7, 10, 13, 20))])
@pytest.mark.parametrize(("gain", "noise", "most"), ALARMS, ids=["nothing to gain", "at the limit"])
def test_alarms_are_as_rare_as_the_interval_says(
    gain: float, noise: float, most: float, rounds: int, arms: int
) -> None:
    """Check one arm, and the best of five, whose intervals are corrected for the choice."""
    named = [concluded(seed, gain, rounds, noise, arms).named for seed in range(200)]
    assert named.count("Algorithm") <= most and named.count("") == 200 - named.count("Algorithm")
    assert rounds >= 6 + (arms == 5) or "Algorithm" not in named


# --- evidence next to the verdict: a sweep over batches of known times, and one that leaves the run as it was

SEEN = PlainTurn(steps=[step_of()], contention=QUIET, preparing=0.0)
"""A turn of plain steps that wait for nothing."""


def state_of(subject: Subject) -> list[object]:
    """Return all that an experiment changes and must put back."""
    trainer = subject.trainer
    owners = [trainer, trainer.loader, trainer.model, *trainer.optimizers]
    names = [sorted(n for n in vars(o) if n in ("prepared", "take", "step")) for o in owners]
    return [
        *(trainer.config, trainer.phase, sorted(vars(trainer)), subject.rows, trainer.steps_done),
        *(id(trainer.loader), trainer.model.compute_dtype, torch.get_num_threads(), names),
        [id(m) for m in trainer.model.modules()],
    ]


@pytest.fixture
def few(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """Return the subject with two batches to try, in one turn."""
    monkeypatch.setattr(evidence, "MOST_TURNS", 1)
    monkeypatch.setattr(training, "FACTORS", (2.0,))
    monkeypatch.setattr(subject, "turns", [SEEN])
    return subject


@pytest.mark.parametrize("with_prices", [True, False])
def test_sweep_predicts_measures_and_leaves_the_subject(few: Subject, prices: Prices, with_prices: bool) -> None:
    """Check table and plot, and modules, loader, threads and dtype after it."""
    few.arms(prices if with_prices else None)
    before, found = state_of(few), nothing_yet()
    gather(found, few, 1e6)
    assert state_of(few) == before and found.not_tried == {}
    (section,), sweep = found.sections, found.sweeps["batches"]
    assert section.finding.endswith(".") and section.plots[0].series and section.tables[0].rows
    assert set(sweep.turns.seconds) == {arm.name for arm in sweep.arms}
    assert [(arm.at, arm.axis) for arm in sweep.arms] == [(4, None), (8, None)]
    assert bool(sweep.predicted) == with_prices
    if with_prices:
        assert 0 < sweep.predicted["batch 4"] < sweep.predicted["batch x 2"]


def test_sweep_finds_what_steps_cost(imagine: Imagine) -> None:
    subject = imagine(jitter=0.0, computing=0.06, row=0.015)
    subject.turns.append(SEEN)
    gather(found := nothing_yet(), subject, 1e6)
    words = "The knee is at 4.0 sequences. With batch x 2 a token took 25 % (25 to 25) less time than with batch 4."
    assert found.sections[0].finding == words


def test_sweep_in_a_short_time_has_fewer_batches(imagine: Imagine) -> None:
    """Check steps of 1 s for a sequence: in 25 s there is time for three turns of 4, 1 and 2 sequences."""
    subject = imagine(jitter=0.0, computing=0.0, row=0.25)
    subject.turns.append(SEEN)
    found = Diagnosis(compared=compared({"plain": 1.0}), findings=[])
    gather(found, subject, 6.0)
    assert [arm.at for arm in found.sweeps["batches"].arms] == [4, 1, 2]


def test_batches_fit_into_memory(subject: Subject, prices: Prices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 2 and 8 times the batch with a forecast of what the large one needs; without one it is not tried."""
    monkeypatch.setattr(training, "FACTORS", (0.5, 2.0, 8.0))
    for given, memory, want in ((prices, 1e12, [4, 2, 8, 32]), (prices, 1.0, [4, 2]), (None, 1e12, [4, 2, 8])):
        monkeypatch.setattr(subject, "prices", given)
        monkeypatch.setattr(training, "memory_bytes", lambda _, memory=memory: memory)
        assert subject.batch_sizes() == want


# --- any comparison


def compared(taken: dict[str, float]) -> Comparison:
    """Return arms of the machine that took these seconds in 20 turns each."""
    arms = [Arm(name=name, axis="Machine", apply=idle, advice=f"Do {name}.") for name in taken]
    return Comparison(arms=arms, turns=Turns({name: [seconds] * 20 for name, seconds in taken.items()}))


def nothing_yet() -> Diagnosis:
    """Return a diagnosis whose plain steps took 1 ms."""
    return Diagnosis(compared=compared({"plain": 0.001}), findings=[])


def test_what_to_try_ranks_gains_of_all_experiments() -> None:
    """Check that what gains less than 2 %, or nothing, is left out, and an advice is given once."""
    batches = compared({"batch 1": 1.0, "batch x 4": 0.5, "waiting": 0.6})
    sweeps = {"batches": batches, "dtypes": compared({"x": 1, "fp8": 2})}
    first = compared({"plain": 1.0, "waiting": 0.7, "dtype": 0.99})
    tries = Diagnosis(compared=first, findings=[], sweeps=sweeps).tries
    assert [(arm.name, round(gain.value, 3)) for arm, gain, _ in tries] == [("batch x 4", 0.5), ("waiting", 0.4)]


BEST = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["best"]


@pytest.mark.parametrize(("turns", "words"), BEST)
def test_best_of_few_rounds_is_not_a_fact(turns: list[float], words: str) -> None:
    arms = [Arm(name=name, apply=idle) for name in "ab"]
    found = Comparison(arms=arms, turns=Turns({"a": [1.0] * len(turns), "b": turns}))
    assert sentence_of(found).startswith(words)


# --- gathering


@pytest.mark.parametrize(
    ("error", "seconds", "why"),
    [
        (RuntimeError("no memory\nfor it"), 60.0, "it failed: no memory"),
        (MemoryError(), 60.0, "it failed: MemoryError"),
        (KeyboardInterrupt(), 60.0, "it was interrupted"),
        (None, 0.0, "the time was over"),
    ],
)
def test_what_is_not_gathered_says_why(
    imagine: Imagine, error: Any, seconds: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Comparison:
        raise error

    monkeypatch.setattr(evidence, "sweep", fail)
    gather(found := nothing_yet(), imagine(), seconds)
    assert found.sections == [] and found.not_tried == {"batches": why}
    assert found.stopped == record_of(found)["stopped"] == isinstance(error, KeyboardInterrupt)
    assert ("some evidence is missing" in "".join(found.warnings)) == found.stopped
