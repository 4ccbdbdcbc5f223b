"""Sections of a step, virtual speed-ups, the time line and the roofline, with times that are known."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dsmini.diagnosis.evidence import roofline, sections, timeline, virtual_speedup
from dsmini.diagnosis.evidence.sections import MODULES, SectionClock, between_marks, predicted_sections, watched
from dsmini.diagnosis.evidence.virtual_speedup import LOADER, predicted_gains
from dsmini.diagnosis.predictions import BatchTime, shape_of
from dsmini.diagnosis.subject import Subject
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates


def operation(name: str = "mm", size: int = 1, **more: Any) -> CountedOperation:
    options: dict[str, Any] = {"kind": "product", "flops": 8, "read": 4, "written": 4, "cold": 0, "rows": 1.0}
    options |= {"dtype": torch.float32, "shape": ((size,),), "seconds": 1.0} | more
    return CountedOperation(name=name, **options)


def test_every_section_is_entered_and_left(subject: Subject) -> None:
    """Check forward and backward of each module, and that no section lies inside another."""
    told: list[tuple[str, str]] = []
    trainer = subject.trainer
    with watched(
        trainer.model, trainer.optimizers, lambda n: told.append(("in", n)), lambda n: told.append(("out", n))
    ):
        subject.step()
    assert [kind for kind, _ in told] == ["in", "out"] * (len(told) // 2)
    assert [name for _, name in told[::2]] == [name for _, name in told[1::2]]
    entered = [name for kind, name in told if kind == "in"]
    blocks = 3  # two, and that of multi-token prediction
    assert entered.count("attention") == entered.count("feed-forward") == 2 * blocks
    assert entered.count("head and losses") == 2 * 2 and entered.count("optimizer") == len(trainer.optimizers)
    assert entered[0] == "attention" and entered[-1] == "optimizer"
    subject.step()
    assert len([1 for kind, _ in told if kind == "in"]) == len(entered), "nothing is told afterwards"


def test_clock_counts_pairs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr(sections.time, "perf_counter", lambda: next(times))
    clock = SectionClock()
    clock.leave("a")
    clock.enter("a")
    clock.leave("a")
    clock.enter("a")
    clock.leave("a")
    assert clock.seconds == {"a": 3.0}


def test_operations_lie_between_marks() -> None:
    marked = [
        operation("mm", 1),
        operation("digamma", 1),  # enters a
        operation("mm", 2),
        operation("digamma", 3),  # enters b inside it
        operation("mm", 3),
        operation("digamma", 2),  # leaves a
        operation("mm", 4),
        operation("digamma", 4),  # leaves b
        operation("mm", 5),
    ]
    found = between_marks(marked, ("a", "b"))
    assert {name: [op.shape[0][0] for op in ops] for name, ops in found.items()} == {"a": [2, 3], "b": [3, 4]}


def test_predicted_phases_are_the_whole_step(subject: Subject, rates: Rates) -> None:
    """Check that forward, backward and update are the forecast, and that sections lie inside of them."""
    shape = shape_of(subject.config, subject.rows, "float32")
    found = predicted_sections(shape, rates)
    phases = sum(found[name] for name in sections.PHASES)
    assert phases == pytest.approx(forecast(shape, rates).seconds, rel=0.03)
    assert all(found[name] > 0 for name in MODULES)
    assert sum(found[name] for name in MODULES) < phases and found["optimizer"] < found["update"]


def test_part_in_sequence_gains_its_share() -> None:
    """Check that without a loader in the way a part gains s times its share, and a hidden loader nothing."""
    gains = predicted_gains({"attention": 0.06, LOADER: 0.02}, 0.2, lambda c, s: max(0.0, s * 0.02 - c))
    assert gains["attention"] == pytest.approx([0.075, 0.15, 0.225])
    assert gains[LOADER] == pytest.approx([0.0, 0.0, 0.0])


def test_loader_that_binds_next_bounds_the_gain() -> None:
    """Check the worked example: attention half as long gains 20 ms of 200, since a batch takes 180."""
    gains = predicted_gains({"attention": 0.06, LOADER: 0.18}, 0.2, lambda c, s: max(0.0, s * 0.18 - c))
    assert gains["attention"] == pytest.approx([0.075, 0.1, 0.1])
    gains = predicted_gains({"attention": 0.06, LOADER: 0.4}, 0.2, lambda c, s: max(0.0, s * 0.4 - c))
    assert gains["attention"] == pytest.approx([0.0, 0.0, 0.0]), "a loader that binds leaves nothing to gain"
    assert gains[LOADER] == pytest.approx([0.25, 0.5, 0.5])


class Pipeline:
    """Steps of a pipeline: `computing` seconds beside a loader of one thread, with the delays of an experiment."""

    def __init__(self, computing: float, batch: float) -> None:
        self.computing, self.batch, self.late, self.held = computing, batch, 0.0, 0.0

    def seconds(self) -> float:
        return max(self.computing + self.late, self.batch + self.held)


@pytest.mark.parametrize(
    ("batch", "attention", "loader"), [(0.02, [0.15, 0.3, 0.45], [0.0] * 3), (0.4, [0.0] * 3, [0.25, 0.5, 0.5])]
)
def test_delays_show_what_a_speedup_would_gain(
    subject: Subject, batch: float, attention: list[float], loader: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the experiment on a pipeline whose times are known, of which attention is 120 of 200 ms."""
    pipeline = Pipeline(0.2, batch)
    monkeypatch.setattr(virtual_speedup, "time_batches", lambda _: BatchTime(seconds=batch, cpu=0.0))
    monkeypatch.setattr(virtual_speedup, "clocked", lambda _: {"attention": 0.12})
    monkeypatch.setattr(virtual_speedup, "delayed", lambda _: setter(pipeline, "held"))
    monkeypatch.setattr(virtual_speedup, "late_takes", lambda _: setter(pipeline, "late"))
    monkeypatch.setattr(virtual_speedup, "_turn", lambda _subject, off: pipeline.seconds() - off)
    found = virtual_speedup.numbers(subject, None, 0.0)
    assert found.gains["attention"] == pytest.approx(attention)
    assert found.gains[LOADER] == pytest.approx(loader)


def setter(pipeline: Pipeline, name: str) -> Any:
    return nullcontext(lambda seconds: setattr(pipeline, name, seconds))


def test_reasons_not_to_speed_up(subject: Subject) -> None:
    assert virtual_speedup.why_not(subject) is None
    train = dataclasses.replace(subject.config.train, recompute=True)
    subject.trainer.config = dataclasses.replace(subject.config, train=train)
    assert "recompute" in (virtual_speedup.why_not(subject) or "")


def test_phases_are_the_whole_step(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    step = subject.step

    def noted() -> Any:
        result = step()
        taken.append(result.seconds)
        return result

    monkeypatch.setattr(subject, "step", noted)
    found = timeline.numbers(subject, None, 0.0)
    assert [sum(parts) for parts in zip(*found.taken.values(), strict=True)] == pytest.approx(taken[1:])
    assert all(min(found.taken[name]) > 0 for name in sections.PHASES)


def test_flops_of_formula_and_counter_agree(subject: Subject) -> None:
    counted = roofline.flops_by_counter(count(subject.step).operations)
    formula = roofline.flops_by_formula(subject)
    assert counted.weights == pytest.approx(formula.weights, rel=0.01)
    assert formula.context <= counted.context


def test_operations_of_one_shape_are_one_point(rates: Rates) -> None:
    passes = [[operation(seconds=1.0), operation(seconds=2.0), operation(size=2, seconds=4.0)]] * 2
    found = roofline.points_of(passes, rates)
    assert [(p.shape, p.seconds, p.flops, p.bytes) for p in found] == [("[2]", 4.0, 8, 8), ("[1]", 3.0, 16, 16)]
    assert found[0].intensity == 1.0
