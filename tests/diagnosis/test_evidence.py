"""Evidence beside the verdict: each experiment leaves its subject as before, and predicts from hand-made rates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from dsmini.diagnosis import scaling
from dsmini.diagnosis.diagnosis import LookPlan, diagnose
from dsmini.diagnosis.evidence import (
    batch_sweep,
    dense_twin,
    dtypes,
    evidence,
    gather,
    loader_delay,
    loss_gap,
    threads,
    timeline,
)
from dsmini.diagnosis.evidence.evidence import GAIN, Evidence, in_turns, patched, to_try
from dsmini.diagnosis.gains import Gain
from dsmini.diagnosis.pages import report_of, short_report_of
from dsmini.diagnosis.predictions import shape_of
from dsmini.diagnosis.subject import Subject
from dsmini.diagnosis.training_work import TRAINING
from dsmini.diagnosis.tries import tries_of
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates
from dsmini.report import Section, pick
from dsmini.training.trainer import Trainer

CALLS = ("loader_delay", "batch_sweep", "threads", "dtypes", "dense_twin", "virtual_speedup", "timeline")
BY_NAME = {each.name: each for each in gather.EVERY}


def state_of(subject: Subject) -> list[object]:
    """Return all that an experiment changes and must put back."""
    trainer = subject.trainer
    owners = [trainer, trainer.loader, trainer.model, *trainer.optimizers]
    patched_names = [sorted(n for n in vars(o) if n in ("prepared", "take", "step", "cross_entropy")) for o in owners]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
    kept = [id(m) for m in trainer.model.modules()]
    return [
        *(trainer.config, trainer.passes.losses, sorted(vars(trainer)), subject.rows, trainer.steps_done),
        *(id(trainer.loader), trainer.model.compute_dtype, torch.get_num_threads(), patched_names, hooks, kept),
    ]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let turns be few, and this machine have two cores."""
    monkeypatch.setattr(evidence, "MOST_TURNS", 2)
    monkeypatch.setattr(scaling, "TURNS", 1)
    monkeypatch.setattr(timeline, "MOST_STEPS", 3)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(dtypes, "slow_bf16", lambda _: False)
    monkeypatch.setattr(loss_gap, "MOST_STEPS", 3)


@pytest.mark.parametrize("name", CALLS)
def test_subject_is_as_before(subject: Subject, quick: None, name: str) -> None:
    """Check modules, hooks, loader, threads and dtype after each experiment."""
    before = state_of(subject)
    section = BY_NAME[name].run(subject, None, 0.0)
    assert section.name == name and section.finding and section.figures
    assert state_of(subject) == before


@pytest.mark.parametrize(("name", "last"), [*((name, 4) for name in CALLS), ("virtual_speedup", 9)])
def test_subject_is_as_before_after_an_error(subject: Subject, quick: None, name: str, last: int) -> None:
    """Check the same after a step, the last of so many, that is interrupted while it runs."""
    before, whole = state_of(subject), Trainer.forward_backward
    calls = 0

    def forward_backward(trainer: Trainer, rows: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return whole(trainer, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "forward_backward", forward_backward)
        with pytest.raises(KeyboardInterrupt):
            BY_NAME[name].run(subject, None, 0.0)
    assert calls == last
    assert state_of(subject) == before


def test_patched_puts_back_what_was_there() -> None:
    class Owner:
        def told(self) -> str:
            return "class"

    owner = Owner()
    with patched(owner, "told", lambda: "first"):
        with suppress(ZeroDivisionError), patched(owner, "told", lambda: "second"):
            assert owner.told() == "second"
            _ = 1 / 0
        assert owner.told() == "first"
    assert owner.told() == "class" and not vars(owner)


def test_turns_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that arms of a second take turns while another turn fits, and that the first turn does not count."""
    now = [0.0]
    monkeypatch.setattr(evidence.time, "perf_counter", lambda: now[0])

    def arm(seconds: float) -> Callable[[], float]:
        def taken() -> float:
            now[0] += seconds
            return now[0]

        return taken

    assert in_turns({"a": arm(1.0), "b": arm(1.0)}, 8.0) == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    assert [len(each) for each in in_turns({"a": arm(1.0)}, 0.0).values()] == [2]


def test_gain_to_try_has_quartiles() -> None:
    figure = to_try("q", "x", "do it", [0.5, 0.6, 0.7, 0.8, 0.9], 1.0, 0.25)
    assert (figure.measured, figure.low, figure.high) == pytest.approx((0.3, 0.2, 0.4))
    assert figure.predicted == 0.25


# --- threads, dtypes, dense twin


def test_thread_counts_have_what_the_run_uses() -> None:
    assert threads.counts_of(2, 2) == [1, 2]
    assert threads.counts_of(12, 6) == [1, 2, 4, 6, 8, 12]


def test_twin_has_the_dtype_and_leaves_the_random_state(subject: Subject) -> None:
    random = torch.get_rng_state()
    for name, want in (("float32", torch.float32), ("fp8", torch.bfloat16)):
        config = dtypes.with_dtype(subject.config, name)
        assert dtypes.dtype_of(config) == name
        with dtypes.twin(subject, config) as step:
            assert step() > 0
        assert (want == torch.float32) == (config.train.dtype == "float32")
    assert torch.equal(torch.get_rng_state(), random)


def test_no_dtype_gains_more_than_its_peak() -> None:
    found = dtypes.DtypeSteps(now="float32", taken={}, predicted={}, peaks={"float32": 100.0, "bfloat16": 220.0})
    assert found.most("bfloat16") == pytest.approx(2.2) and found.most("fp8") is None


def test_limit_is_that_of_the_faster_dtype() -> None:
    for figure in (
        dtypes._limit("bfloat16", "float32", 1.5, 2.2),
        dtypes._limit("float32", "bfloat16", 1 / 1.5, 1 / 2.2),
    ):
        assert figure.case["dtype"] == "bfloat16 over float32" and figure.bound
        assert (figure.measured, figure.predicted) == pytest.approx((1.5, 2.2))


def test_dense_twin_counts_both_sides(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that turns pair, and that the turn that warms up counts on neither side."""
    pairs = iter([(9.0, 9.0), (1.0, 2.0), (2.0, 5.0)])

    @contextmanager
    def pair(_subject: Subject, total: bool) -> Iterator[Callable[[], tuple[float, float]]]:
        assert total
        yield lambda: next(pairs)

    monkeypatch.setattr(dense_twin, "dense_pair", pair)
    found = dense_twin.numbers(subject, None, 0.0)
    assert (found.routed, found.dense, found.ratios) == ([1.0, 2.0], [2.0, 5.0], [2.0, 2.5])


# --- all of them


def fake(
    name: str, run: Callable[[], None] = lambda: None, why: str | None = None, needs_rates: bool = False
) -> Evidence:
    def section(_subject: Subject, _rates: object, seconds: float) -> Section:
        run()
        return Section(name=name, title="?", finding=f"{seconds:.1f}")

    return Evidence(name=name, why_not=lambda _: why, run=section, weight=1.0, steps=10, needs_rates=needs_rates)


def test_what_does_not_apply_or_fails_says_why(subject: Subject) -> None:
    def fail() -> None:
        raise RuntimeError("no memory\nfor it")

    every = [fake("a"), fake("b", fail), fake("c", why="no experts"), fake("d", needs_rates=True), fake("e")]
    found = gather.gather(subject, None, 60.0, every=every)
    assert [section.name for section in found.sections] == ["a", "e"] and not found.stopped
    assert found.not_tried == {
        "b": "it failed: no memory",
        "c": "no experts",
        "d": "this machine's rates are not measured",
    }


def test_what_takes_far_too_long_is_not_tried(subject: Subject) -> None:
    """Check ten steps of 2 s against shares of 30 and of 10 s."""
    assert not gather.gather(subject, None, 60.0, every=[fake("a"), fake("b")], step=2.0).not_tried
    found = gather.gather(subject, None, 10.0, every=[fake("a")], step=2.0)
    assert found.not_tried == {"a": "it takes about 20 s, and has 10"} and not found.sections


def test_interruption_keeps_the_sections_before(subject: Subject) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    found = gather.gather(subject, None, 60.0, every=[fake("a"), fake("b", stop), fake("c")])
    assert found.stopped and [section.name for section in found.sections] == ["a"]
    assert found.not_tried == {"b": "it was interrupted", "c": "it was interrupted"}


def test_time_is_shared_by_weight(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gather.time, "perf_counter", lambda: now[0])

    def slow() -> None:
        now[0] += 60.0

    found = gather.gather(subject, None, 60.0, every=[fake("a"), fake("b", slow), fake("c")])
    assert [section.finding for section in found.sections] == ["18.5", "28.5"]
    assert found.not_tried == {"c": "the time was over"}


# --- with rates: predictions come first


def test_predictions_are_shown_beside_what_was_measured(subject: Subject, quick: None, rates: Rates) -> None:
    """Check that every experiment shows predictions, and that those of larger batches grow."""
    found = gather.gather(subject, rates, 600.0)
    assert not found.not_tried
    for section in found.sections:
        assert any(figure.predicted is not None for figure in section.figures), section.name
        assert section.plots[0].series
    (sweep,) = [section for section in found.sections if section.name == "batch_sweep"]
    steps = [figure.predicted or 0.0 for figure in pick(sweep.figures, "step")]
    assert steps == sorted(steps) and steps[0] > 0
    assert {figure.case["try"] for figure in pick(sweep.figures, GAIN)} <= {"batch x 2", "batch x 4", "batch x 8"}


def test_predictions_come_before_the_first_step(subject: Subject, quick: None, rates: Rates) -> None:
    """Check it by steps that end the experiment: every prediction has been made by then."""
    order: list[str] = []
    config = subject.config
    said = forecast(shape_of(config, subject.rows, config.train.dtype), rates)
    with pytest.MonkeyPatch.context() as patch:
        for module in (batch_sweep, loader_delay, threads, dtypes):
            patch.setattr(module, "forecast", lambda *_: order.append("predict") or said)
        patch.setattr(
            threads, "seconds_with_threads", lambda _, counts, __: order.append("predict") or [1.0] * len(counts)
        )
        patch.setattr(Subject, "step", lambda _self: order.append("step") or 1 / 0)
        for name in ("batch_sweep", "loader_delay", "threads", "dtypes"):
            order.clear()
            with pytest.raises(ZeroDivisionError):
                BY_NAME[name].run(subject, rates, 0.0)
            assert order[0] == "predict" and order[-1] == "step" and order.count("step") == 1


# --- pages


def test_what_to_try_ranks_gains_of_all_experiments() -> None:
    gains = {
        "waiting": Gain(value=0.3, low=0.2, high=0.4, rounds=9),
        "replay": Gain(value=0.31, low=0.2, high=0.4, rounds=9),
    }
    found: Any = SimpleNamespace(gains=gains, prediction=None, work=TRAINING)
    figures = [
        to_try("batch_sweep", "batch x 4", "Set it.", [0.5], 1.0, 0.45),
        to_try("batch_sweep", "batch x 2", "Set it.", [0.9], 1.0, None),
        to_try("dtypes", "fp8", "Set it.", [1.5], 1.0, -0.4),
    ]
    tries = tries_of(found, [Section(name="batch_sweep", title="?", finding="!", figures=figures)])
    assert [(each.what, each.predicted) for each in tries] == [
        ("batch x 4", "45 %"),
        ("waiting", ""),
        ("batch x 2", ""),
    ]


def test_terminal_of_80_columns_shows_verdict_gains_tries_and_faults(subject: Subject) -> None:
    found = diagnose(subject, LookPlan(rounds=5, least=5), None)
    gathered = gather.gather(subject, None, 60.0, every=[fake("a"), fake("b", why="no experts")])
    short = short_report_of(found, "Diagnosis", gathered)
    assert [section.name for section in short.sections] == ["verdict", "evidence", "what_to_try", "faults"]
    with Console(record=True, width=80) as console:
        short.show(console)
    shown = console.export_text()
    said = {section.finding for section in short.sections}  # sentences are wrapped by the terminal itself
    assert max(len(line) for line in shown.splitlines() if line not in said) <= 80 and "dense_active" in shown
    page = report_of(found, "Diagnosis", {}, "command", gathered)
    names = [section.name for section in page.sections]
    assert names[:3] == ["verdict", "evidence", "what_to_try"] and names[-2:] == ["a", "not_tried"]
    assert ["b", "no experts"] in [list(row) for row in page.sections[-1].tables[0].rows]
