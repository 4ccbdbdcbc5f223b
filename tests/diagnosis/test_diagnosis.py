"""A diagnosis from steps whose times are known: who is named, what is kept, and what is predicted."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rich.console import Console

from dsmini.diagnosis import predictions
from dsmini.diagnosis.contention import Contention, Watch
from dsmini.diagnosis.diagnosis import LookPlan, conclude, diagnose
from dsmini.diagnosis.experiment import COUNTED, UNCOUNTED, Measured, run_in_turns
from dsmini.diagnosis.interventions.algorithm import UNIFORM
from dsmini.diagnosis.interventions.data import REPLAY
from dsmini.diagnosis.pages import report_of
from dsmini.diagnosis.predictions import BatchTime
from dsmini.diagnosis.record import record_of
from dsmini.diagnosis.subject import Subject
from dsmini.diagnosis.training_work import TRAINING
from dsmini.diagnosis.verdict import Outcome
from dsmini.measure import cpu_time
from dsmini.training.trainer import StepResult

QUIET = Contention(others=0.0, steadiness=1.0)
FEW = LookPlan(rounds=6, least=6)


def step(seconds: float = 0.1, wait: float = 0.0, counts: Sequence[Sequence[int]] | None = None) -> StepResult:
    losses: dict[str, Any] = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
    load = None if counts is None else torch.tensor(counts)
    return StepResult(step=1, tokens=8, seconds=seconds, data_wait=wait, counts=load, skipped=False, **losses)


def measured(replay: float, uniform: float, rounds: int = 8, **of_step: Any) -> Measured:
    """Return rounds of 0.1 s whose free steps take these seconds, each with a little noise."""
    noise = [1 + 0.01 * (i % 3) for i in range(rounds)]
    return Measured(
        plain=[0.1 * n for n in noise],
        free={"replay": [replay * n for n in noise], "uniform_routing": [uniform * n for n in noise]},
        contention=[of_step.pop("contention", QUIET)] * rounds,
        steps=[step(**of_step)] * rounds,
    )


def test_waiting_that_replay_confirms_binds() -> None:
    found = conclude(measured(0.06, 0.1, wait=0.4), None, {}, [])
    assert (found.verdict.outcome, found.named) == (Outcome.BINDS, "Data")
    assert found.gains["waiting"].value == pytest.approx(0.4)
    assert [f.name for f in found.findings if f.is_fault] == ["waiting"]


def test_replay_decides_where_the_steps_clock_sees_nothing() -> None:
    """Check a loader whose threads take the cores: no step waits, and replaying gains 40 %."""
    found = conclude(measured(0.06, 0.1, wait=0.0), None, {}, [])
    assert found.named == "Data" and "waiting" not in found.gains


def test_balance_binds() -> None:
    found = conclude(measured(0.1, 0.07), None, {}, [])
    assert found.named == "Algorithm"


def test_other_programs_bind_only_if_the_probes_agree() -> None:
    """Check that neither CPU time of others nor slow probes alone are blamed."""
    for others, steady, named in ((1.0, 0.6, "Machine"), (1.0, 1.0, ""), (0.0, 0.6, "")):
        turn = Contention(others=others, steadiness=steady)
        found = conclude(measured(0.1, 0.1, contention=turn), None, {}, [])
        assert found.named == named, (others, steady)
        assert any(f.is_fault for f in found.findings) == bool(named)


def test_healthy_run_is_acquitted() -> None:
    found = conclude(measured(0.1, 0.1, counts=[[5, 5, 6, 4]]), None, {}, [])
    assert (found.verdict.outcome, found.named) == (Outcome.NOTHING_BINDS, "")


def test_idle_experts_are_named_though_they_cost_no_time() -> None:
    found = conclude(measured(0.1, 0.1, counts=[[10, 10, 0, 0]]), None, {}, [])
    assert found.verdict.outcome is Outcome.NOTHING_BINDS and found.named == "Algorithm"
    assert "50% of the experts" in found.sentence and "MaxVio 1.00" in found.sentence


def test_whole_diagnosis_of_a_small_run(subject: Subject) -> None:
    """Check that every intervention is tried or says why not, and what terminal, page and JSON have."""
    parts: list[tuple[float, str]] = []
    found = diagnose(subject, FEW, None, lambda share, what: parts.append((share, what)))
    tried = {name for name in found.gains if name not in ("quiet_machine", "waiting")}
    assert tried | found.not_tried.keys() == {each.name for each in TRAINING.interventions}
    assert {"replay", "uniform_routing", "dense_active"} <= tried
    assert found.measured.rounds == 6 and len(found.measured.steps) == 6 * COUNTED
    assert [share for share, _ in parts] == sorted(share for share, _ in parts) and parts[-1][0] == 1.0
    record = json.loads(json.dumps(record_of(found)))
    assert record["gains"]["replay"]["rounds"] == 6 and record["outcome"] in {o.value for o in Outcome}
    report = report_of(found, "Diagnosis", {}, "python -m dsmini.diagnose")
    page = report.html()
    assert "uniform_routing" in page and found.verdict.sentence.split(":")[0] in page
    with Console(record=True, width=80) as console:
        report.show(console)
    shown = console.export_text()
    assert "dense_active" in shown and "rounds in turns" in shown and "idle_experts" in shown


def test_interrupted_diagnosis_keeps_its_whole_rounds(subject: Subject) -> None:
    def stop(share: float, what: str) -> None:
        if what == "round 7":
            raise KeyboardInterrupt

    found = diagnose(subject, LookPlan(rounds=50), None, stop)
    assert found.stopped and found.measured.rounds == 6
    assert all(len(taken) == 6 for taken in found.measured.free.values())

    def stop_early(share: float, what: str) -> None:
        if what == "round 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(subject, LookPlan(rounds=50), None, stop_early)


def test_turns_take_turns(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the order of steps: a turn of plain ones, one of each intervention, and nobody always first."""
    order: list[str] = []
    monkeypatch.setattr(subject, "step", lambda: order.append("plain") or step())

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def apply(self, _subject: Subject) -> Any:
            class Context:
                def __enter__(inner) -> Any:  # noqa: N805
                    return lambda _base: order.append(self.name) or 0.05

                def __exit__(inner, *_: object) -> None: ...  # noqa: N805

            return Context()

    arms: Any = [Named("a"), Named("b")]
    found = run_in_turns(subject, arms, Watch(None, torch.device("cpu")), rounds=2, seconds=9, least=1)
    turn = UNCOUNTED + COUNTED
    turns = order[::turn]
    assert turns == ["plain", "a", "b", "plain", "a", "b", "plain", "b", "a"] and len(order) == turn * len(turns)
    assert found.rounds == 2 and found.free == {"a": [0.05, 0.05], "b": [0.05, 0.05]}


def test_time_ends_an_experiment_after_the_least_rounds(subject: Subject) -> None:
    watch = Watch(None, torch.device("cpu"))
    assert run_in_turns(subject, [], watch, rounds=100, seconds=0.0, least=7).rounds == 7


@pytest.mark.parametrize(
    ("workers", "seconds", "cpu", "threads", "wait"),
    [
        (0, 0.3, 0.3, 2, 0.3),  # nobody prepares ahead
        (1, 0.3, 0.0, 2, 0.2),  # sleeps longer than a step
        (1, 0.05, 0.0, 2, 0.0),  # hidden behind it
        (4, 0.3, 0.0, 2, 0.0),  # four at a time
        (1, 0.05, 0.05, 2, 0.05),  # hidden, but it takes a core from the products
        (1, 0.05, 0.05, 1, 0.0),  # which leave it one
    ],
)
def test_predicted_wait(
    workers: int, seconds: float, cpu: float, threads: int, wait: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "cores", lambda: 2)
    monkeypatch.setattr(predictions.torch, "get_num_threads", lambda: threads)
    batch = BatchTime(seconds=seconds, cpu=cpu)
    assert predictions.waiting_seconds(batch, 0.1, workers) == pytest.approx(wait)


def test_cpu_time_of_others_is_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 3 busy seconds in 2 seconds, of which 1.5 are ours: others keep 0.75 of a core busy."""
    clock, busy, own = iter([10.0, 12.0]), iter([100.0, 103.0]), iter([(5.0, 1.0), (6.0, 1.5)])
    monkeypatch.setattr(cpu_time.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(cpu_time, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(cpu_time.os, "times", lambda: next(own))
    watch = Watch(None, torch.device("cpu"))
    watch.begin()
    assert watch.end().others == pytest.approx(0.75)


def test_forward_backward_leaves_no_gradient(subject: Subject) -> None:
    before = [p.detach().clone() for p in subject.trainer.model.parameters()]
    assert subject.forward_backward() > 0
    for p, q in zip(subject.trainer.model.parameters(), before, strict=True):
        assert p.grad is None and torch.equal(p, q)


def test_interventions_have_names_of_their_own() -> None:
    names = [each.name for each in TRAINING.interventions]
    assert len(set(names)) == len(names) and REPLAY in TRAINING.interventions and UNIFORM in TRAINING.interventions
