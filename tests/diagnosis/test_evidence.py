"""Evidence next to the verdict: sweeps on steps of known times, and real ones that leave the run as it was."""

from typing import Any

import pytest
import torch

from dsmini.diagnosis import evidence, training
from dsmini.diagnosis.arms import Arm, Comparison
from dsmini.diagnosis.evidence import Evidence, all_evidence, gather
from dsmini.diagnosis.pages import record_of
from dsmini.diagnosis.training import PlainTurn, Subject
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.measure.price import Prices
from dsmini.measure.turns import Turns
from dsmini.report import Section
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
    """Return the subject on a machine of two cores, with two batches to try, in one turn."""
    monkeypatch.setattr(evidence, "MOST_TURNS", 1)
    monkeypatch.setattr(evidence, "cores", lambda: 2)
    monkeypatch.setattr(training, "FACTORS", (2.0,))
    monkeypatch.setattr(subject, "turns", [SEEN])
    return subject


@pytest.mark.parametrize("with_prices", [True, False])
def test_experiments_predict_measure_and_leave_the_subject(few: Subject, prices: Prices, with_prices: bool) -> None:
    """Check tables and plots of all, and modules, loader, threads and dtype after each."""
    few.arms(prices if with_prices else None)
    before, found = state_of(few), nothing_yet()

    def on_part(share: float, what: str) -> None:
        assert state_of(few) == before, f"before {what}"

    gather(found, few, 1e6, on_part)
    assert [section.name for section in found.sections] == ["batches", "threads"] and found.not_tried == {}
    for section in found.sections:
        assert section.finding.endswith(".") and section.plots[0].series and section.tables[0].rows, section.name
    for name, sweep in found.sweeps.items():
        assert bool(sweep.predicted) == with_prices and set(sweep.turns.seconds) >= set(sweep.predicted), name
    assert [(arm.at, arm.axis) for arm in found.sweeps["batches"].arms] == [(4, None), (8, None)]
    assert {arm.axis for arm in found.sweeps["threads"].arms} == {"Machine"}
    if with_prices:
        steps = found.sweeps["batches"].predicted
        assert 0 < steps["batch 4"] < steps["batch x 2"]


@pytest.mark.parametrize(
    ("name", "costs", "words"),
    [
        ("batches", {"computing": 0.06, "row": 0.015}, "With batch x 2 a token takes 25 % (25 to 25) less time than"),
        ("threads", {"cores": 2}, "With 2 threads a token takes 50 % (50 to 50) less time than with 1 thread."),
    ],
)
def test_experiment_finds_what_steps_cost(imagine: Imagine, name: str, costs: Any, words: str) -> None:
    subject = imagine(jitter=0.0, **costs)
    subject.turns.append(SEEN)
    section, _ = next(each for each in all_evidence(subject, 0.01) if each.name == name).run(1e6)
    assert words in section.finding and (name != "batches" or "The knee is at 4.0 sequences." in section.finding)


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


# --- gathering


def fake(name: str, error: BaseException | None = None, why: str | None = None) -> Evidence:
    def section(seconds: float) -> tuple[Section, Comparison]:
        if error is not None:
            raise error
        return Section(name=name, title="?", finding=f"{seconds:.1f}"), compared({"plain": 1.0})

    return Evidence(name=name, why_not=why, run=section)


# experiments, and seconds that there are; the seconds that each of those has which are made, and why the others are not
GATHERED: dict[str, tuple[list[Evidence], float, dict[str, str], dict[str, str]]] = {
    "shares of what is left": ([fake("a"), fake("b"), fake("c")], 600, {"a": "200.0", "b": "300.0", "c": "600.0"}, {}),
    "what fails or does not apply": (
        [fake("a"), fake("b", RuntimeError("no memory\nfor it")), fake("c", why="no experts"), fake("e")],
        *(60, {"a": "20.0", "e": "60.0"}, {"b": "it failed: no memory", "c": "no experts"}),
    ),
    "no time": ([fake("a")], 0, {}, {"a": "the time was over"}),
    "an interruption": (
        [fake("a"), fake("b", KeyboardInterrupt()), fake("c")],
        *(60, {"a": "20.0"}, {"b": "it was interrupted", "c": "it was interrupted"}),
    ),
}


@pytest.mark.parametrize("case", GATHERED)
def test_what_is_not_gathered_says_why(imagine: Imagine, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every, seconds, made, not_tried = GATHERED[case]
    monkeypatch.setattr(evidence, "all_evidence", lambda *_: every)
    gather(found := nothing_yet(), imagine(), seconds)
    assert {section.name: section.finding for section in found.sections} == made and found.not_tried == not_tried
    assert found.stopped == record_of(found)["stopped"] == (case == "an interruption")
    assert ("some evidence is missing" in "".join(found.warnings)) == found.stopped
