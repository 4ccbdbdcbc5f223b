"""Evidence next to the verdict: a sweep over batches of known times, and a real one that leaves the run as it was."""

from typing import Any

import pytest
import torch

from dsmini.diagnosis import evidence, training
from dsmini.diagnosis.arms import Arm, Comparison
from dsmini.diagnosis.evidence import gather
from dsmini.diagnosis.pages import record_of, sentence_of
from dsmini.diagnosis.training import PlainTurn, Subject
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.measure.price import Prices
from dsmini.measure.turns import Turns
from tests.diagnosis.conftest import QUIET, Imagine, idle, step_of

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


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([0.5, 0.5], "With b a token took 50 % less time than with a. That may be chance: it rests on 2 rounds."),
        (
            [0.9, 0.9, 0.9, 1.1, 0.9, 0.9, 0.9],
            "With b a token took 10 % (-10 to 10) less time than with a, which may be",
        ),
        ([0.9] * 7, "With b a token took 10 % (10 to 10) less time than with a."),
        ([1.1] * 7, "Nothing was faster than a, as it is."),
    ],
)
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
