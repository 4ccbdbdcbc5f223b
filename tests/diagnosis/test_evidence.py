"""Evidence beside the verdict: experiments on steps of known times, and real ones that leave the run as it was."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsmini.diagnosis import predictions, scaling
from dsmini.diagnosis.evidence import (
    batch_sweep,
    dtypes,
    evidence,
    gather,
    loader_delay,
    loss_gap,
    roofline,
    sections,
    threads,
    timeline,
    virtual_speedup,
)
from dsmini.diagnosis.evidence.evidence import GAIN, Evidence, in_turns, to_try
from dsmini.diagnosis.evidence.numerics import NUMERICS
from dsmini.diagnosis.evidence.sections import MODULES, SectionClock, predicted_sections, watched
from dsmini.diagnosis.evidence.virtual_speedup import LOADER, predicted_gains
from dsmini.diagnosis.gains import Gain
from dsmini.diagnosis.predictions import BatchTime, shape_of
from dsmini.diagnosis.scaling import ideal_seconds, seconds_with_threads
from dsmini.diagnosis.subject import Subject
from dsmini.diagnosis.training_work import TRAINING
from dsmini.diagnosis.tries import tries_of
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.forecast import Forecast, forecast
from dsmini.measure.step_rates import Rates
from dsmini.report import Section, pick
from dsmini.training.trainer import Trainer
from tests.conftest import Clock
from tests.diagnosis.conftest import MODEL

BY_NAME = {each.name: each for each in gather.EVERY}
PATCHED = ("loader_delay", "batch_sweep", "threads", "dtypes", "dense_twin", "virtual_speedup", "timeline")


def state_of(subject: Subject) -> list[object]:
    """Return all that an experiment changes and must put back."""
    trainer = subject.trainer
    owners = [trainer, trainer.loader, trainer.model, *trainer.optimizers]
    names = [sorted(n for n in vars(o) if n in ("prepared", "take", "step", "cross_entropy")) for o in owners]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
    kept = [id(m) for m in trainer.model.modules()]
    return [
        *(trainer.config, trainer.passes.losses, sorted(vars(trainer)), subject.rows, trainer.steps_done),
        *(id(trainer.loader), trainer.model.compute_dtype, torch.get_num_threads(), names, hooks, kept),
    ]


@pytest.fixture(scope="module")
def said(rates: Rates) -> Callable[..., Forecast]:
    """Return a forecast that counts the operations of each shape once."""
    once = functools.cache(lambda shape: forecast(shape, rates))
    return lambda shape, _rates: once(shape)


@pytest.fixture(scope="module")
def parts(rates: Rates) -> Callable[..., dict[str, float]]:
    """Return the same of the sections of a step."""
    once = functools.cache(lambda shape: predicted_sections(shape, rates))
    return lambda shape, _rates: once(shape)


@pytest.fixture
def quick(said: Any, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let turns and forecasts be few, and this machine have two cores, which read memory 1.2 times as fast as one."""
    for module in (batch_sweep, loader_delay, threads, dtypes, virtual_speedup, scaling):
        monkeypatch.setattr(module, "forecast", said)
    for module in (timeline, virtual_speedup):
        monkeypatch.setattr(module, "predicted_sections", parts)
    changes: list[tuple[Any, str, object]] = [(evidence, "MOST_TURNS", 1), (evidence, "LEAST_TURNS", 1)]
    changes += [(scaling, "TURNS", 1), (scaling, "SHAPES", {"training": [(MODEL, 2, 8)]})]
    changes += [(scaling, "matmul_rate", lambda *_: 1e9 * torch.get_num_threads())]
    changes += [(scaling, "read_bandwidth", lambda *_: 1e9 * (1.2 if torch.get_num_threads() > 1 else 1.0))]
    changes += [(threads, "cores", lambda: 2), (dtypes, "slow_bf16", lambda _: False)]
    changes += [(timeline, "MOST_STEPS", 3), (loss_gap, "MOST_STEPS", 3), (virtual_speedup, "SHARES", (0.25, 0.5))]
    clocked = virtual_speedup.clocked
    changes += [(virtual_speedup, "clocked", lambda subject: dict([*clocked(subject).items()][:1]))]
    changes += [(virtual_speedup, "CLOCKED", 1), (batch_sweep, "FACTORS", (1.0, 2.0))]
    for module, name, value in changes:
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("with_rates", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_experiments_predict_measure_and_leave_the_subject(
    subject: Subject, quick: None, rates: Rates, with_rates: bool
) -> None:
    """Check figures and plots of all, and modules, hooks, loader, threads and dtype after each."""
    before, every = state_of(subject), [each for each in gather.EVERY if each is not NUMERICS]

    def on_part(share: float, what: str) -> None:
        assert state_of(subject) == before, f"before {what}"

    found = gather.gather(subject, rates if with_rates else None, 1e6, on_part, every)
    names = [section.name for section in found.sections]
    assert names == [each.name for each in every if with_rates or not each.needs_rates]
    assert found.not_tried == ({} if with_rates else {"roofline": "this machine's rates are not measured"})
    for section in found.sections:
        assert section.finding.endswith(".") and section.figures and section.plots[0].series, section.name
        assert any(figure.predicted is not None for figure in section.figures) == with_rates, section.name
    if with_rates:
        (sweep,) = [section for section in found.sections if section.name == "batch_sweep"]
        steps = [figure.predicted or 0.0 for figure in pick(sweep.figures, "step")]
        assert steps == sorted(steps) and steps[0] > 0
        assert {figure.case["try"] for figure in pick(sweep.figures, GAIN)} == {"batch x 2"}


# an experiment, what steps cost in a world of their own, and what it says
FOUND: dict[str, tuple[dict[str, float], str]] = {
    "batch_sweep": (
        {"computing": 0.06, "row": 0.01},
        "The knee is at 6.0 sequences; the run has 4. In a batch of 32 a token takes 53% less time.",
    ),
    "threads": ({"cores": 2}, "2 threads are 2.00 times as fast as one."),
    "dense_twin": ({"routing": 0.06}, "It would take 0.63 times the time of the experts."),
}


@pytest.mark.parametrize("name", FOUND)
def test_experiment_finds_what_steps_cost(subject: Subject, world: Any, monkeypatch: Any, name: str) -> None:
    costs, words = FOUND[name]
    there: World = world(jitter=0.0, **costs)
    monkeypatch.setattr(batch_sweep, "batches_of", lambda *_: [1, 2, 4, 32])
    assert BY_NAME[name].run(subject, None, 1e6).finding == words and there.now > 0


@pytest.mark.parametrize("name", PATCHED)
def test_subject_is_as_before_after_an_error(subject: Subject, quick: None, name: str) -> None:
    """Check the same after a step that is interrupted while it runs, the fourth."""
    before, whole, calls = state_of(subject), Trainer.forward_backward, list[int]()

    def forward_backward(trainer: Trainer, rows: int) -> Any:
        calls.append(rows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(trainer, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "forward_backward", forward_backward)
        patch.setattr(evidence, "MOST_TURNS", 3)
        patch.setattr(evidence, "LEAST_TURNS", 3)
        with pytest.raises(KeyboardInterrupt):
            BY_NAME[name].run(subject, None, 0.0)
    assert len(calls) == 4
    assert state_of(subject) == before


def test_predictions_come_before_the_first_step(subject: Subject, quick: None, said: Any, rates: Rates) -> None:
    """Check it by steps that end the experiment: every prediction has been made by then."""
    order: list[str] = []
    made = said(shape_of(subject.config, subject.rows, "float32"), rates)
    with pytest.MonkeyPatch.context() as patch:
        for module in (batch_sweep, loader_delay, threads, dtypes):
            patch.setattr(module, "forecast", lambda *_: order.append("predict") or made)
        patch.setattr(
            threads, "seconds_with_threads", lambda _, counts, __: order.append("predict") or [1.0] * len(counts)
        )
        patch.setattr(Subject, "step", lambda _self: order.append("step") or 1 / 0)
        for name in ("batch_sweep", "loader_delay", "threads", "dtypes"):
            order.clear()
            with pytest.raises(ZeroDivisionError):
                BY_NAME[name].run(subject, rates, 0.0)
            assert order[0] == "predict" and order[-1] == "step" and order.count("step") == 1


def test_turns_end_with_the_time(clock: Clock) -> None:
    """Check that arms of a second take turns while another turn fits, and that the first turn does not count."""
    arm = partial(clock.pay, 1.0)
    assert in_turns({"a": arm, "b": arm}, 8.0) == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    assert [len(each) for each in in_turns({"a": arm}, 0.0).values()] == [2]


# --- gathering


def fake(
    name: str, run: Callable[[], object] = lambda: None, why: str | None = None, needs_rates: bool = False
) -> Evidence:
    def section(_subject: Subject, _rates: object, seconds: float) -> Section:
        run()
        return Section(name=name, title="?", finding=f"{seconds:.1f}")

    return Evidence(name=name, why_not=lambda _: why, run=section, weight=1.0, steps=10, needs_rates=needs_rates)


def raising(error: BaseException) -> Callable[[], object]:
    def run() -> None:
        raise error

    return run


# experiments, seconds that there are, seconds of a step; the names that are made, and why the others are not
GATHERED: dict[str, tuple[Sequence[Evidence], float, float, list[str], dict[str, str]]] = {
    "what fails or does not apply": (
        [
            fake("a"),
            fake("b", raising(RuntimeError("no memory\nfor it"))),
            fake("c", why="no experts"),
            fake("d", needs_rates=True),
            fake("e"),
        ],
        *(60.0, 0.0, ["a", "e"]),
        {"b": "it failed: no memory", "c": "no experts", "d": "this machine's rates are not measured"},
    ),
    "ten steps of 2 s in shares of 15 s": ([fake("a"), fake("b")], 30.0, 2.0, ["a", "b"], {}),  # not far longer
    "ten steps of 2 s in 10 s": ([fake("a")], 10.0, 2.0, [], {"a": "it takes about 20 s, and has 10"}),
    "an interruption": (
        [fake("a"), fake("b", raising(KeyboardInterrupt())), fake("c")],
        *(60.0, 0.0, ["a"]),
        {"b": "it was interrupted", "c": "it was interrupted"},
    ),
}


@pytest.mark.parametrize("case", GATHERED)
def test_what_is_not_gathered_says_why(subject: Subject, case: str) -> None:
    every, seconds, step, names, not_tried = GATHERED[case]
    found = gather.gather(subject, None, seconds, every=every, step=step)
    assert [section.name for section in found.sections] == names and found.not_tried == not_tried
    assert found.stopped == (case == "an interruption")


def test_time_is_shared_by_weight(subject: Subject, clock: Clock) -> None:
    slow = fake("b", lambda: clock.pay(60.0))
    found = gather.gather(subject, None, 60.0, every=[fake("a"), slow, fake("c")])
    assert [section.finding for section in found.sections] == ["18.5", "28.5"]
    assert found.not_tried == {"c": "the time was over"}


def test_what_to_try_ranks_gains_of_all_experiments() -> None:
    gains = {
        name: Gain(value=value, low=0.2, high=0.4, rounds=9) for name, value in (("waiting", 0.3), ("replay", 0.31))
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
    spread = to_try("q", "x", "do it", [0.5, 0.6, 0.7, 0.8, 0.9], 1.0, 0.25)
    assert (spread.measured, spread.low, spread.high, spread.predicted) == pytest.approx((0.3, 0.2, 0.4, 0.25))


# --- threads


def test_threads_that_are_tried_have_what_the_run_uses() -> None:
    assert threads.counts_of(2, 2) == [1, 2]
    assert threads.counts_of(12, 6) == [1, 2, 4, 6, 8, 12]


BY_CLASS = {"product": 0.10, "pointwise": 0.06, "calls": 0.04}


@pytest.mark.parametrize(("measured", "want"), [(0.8, 0.170), (0.6, 0.140), (1.0, 0.200), (1.1, 0.215)])
def test_step_of_another_model_says_which_share_is_real(quick: None, measured: float, want: float) -> None:
    """Check the worked example, all of the ideal change, none of it, and threads that slow a step down."""
    assert ideal_seconds(BY_CLASS, (1.0, 1.0), (2.0, 1.2)) == pytest.approx(0.05 + 0.05 + 0.04)
    of_other = SimpleNamespace(by_class={"product": 0.8, "calls": 0.2}, seconds=1.0)
    shape = SimpleNamespace(work="training", dtype="bfloat16")
    now: Any = SimpleNamespace(by_class=BY_CLASS, seconds=0.2, shape=shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "forecast", lambda *_: of_other)
        patch.setattr(scaling, "_measured", lambda *_: {1: 1.0, 2: measured})
        there: Any = None
        assert seconds_with_threads(now, [1, 2], there) == pytest.approx([0.2, want])
    assert torch.get_num_threads() == 1


# --- dtypes and the dense twin


def test_twin_has_the_dtype_and_leaves_the_random_state(subject: Subject) -> None:
    random = torch.get_rng_state()
    for name, want in (("float32", "float32"), ("fp8", "bfloat16")):
        config = dtypes.with_dtype(subject.config, name)
        assert dtypes.dtype_of(config) == name and config.train.dtype == want
        with dtypes.twin(subject, config) as step:
            assert step() > 0
    assert torch.equal(torch.get_rng_state(), random)


def test_no_dtype_gains_more_than_its_peak() -> None:
    found = dtypes.DtypeSteps(now="float32", taken={}, predicted={}, peaks={"float32": 100.0, "bfloat16": 220.0})
    assert found.most("bfloat16") == pytest.approx(2.2) and found.most("fp8") is None
    for limit in (
        dtypes._limit("bfloat16", "float32", 1.5, 2.2),
        dtypes._limit("float32", "bfloat16", 1 / 1.5, 1 / 2.2),
    ):
        assert limit.case["dtype"] == "bfloat16 over float32" and limit.bound
        assert (limit.measured, limit.predicted) == pytest.approx((1.5, 2.2))


# --- loader delay


@pytest.mark.parametrize(
    ("workers", "cpu", "want"),
    [
        (1, 0.0, [0.2, 0.2, 0.22, 0.42]),  # flat up to the slack of 0.18, then slope 1
        (2, 0.0, [0.2, 0.2, 0.2, 0.21]),  # two at a time: slope 1/2 after 0.38
        (0, 0.0, [0.22, 0.32, 0.42, 0.62]),  # nobody prepares ahead
        (1, 0.02, [0.22, 0.22, 0.22, 0.42]),  # preparing takes a core from the step
    ],
)
def test_predicted_delay(workers: int, cpu: float, want: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "cores", lambda: torch.get_num_threads())
    delays, batch = [0.0, 0.1, 0.2, 0.4], BatchTime(seconds=0.02, cpu=cpu)
    assert loader_delay.predicted_steps(delays, 0.2, batch, workers) == pytest.approx(want)
    if not cpu:
        slack = {0: 0.0, 1: 0.18, 2: 0.38}[workers]
        assert loader_delay.slack_of(delays, want, workers) == pytest.approx(slack), "where slope and level meet"


def with_workers(subject: Subject, workers: int, patch: pytest.MonkeyPatch) -> None:
    data = dataclasses.replace(subject.config.data, workers=workers)
    patch.setattr(subject.trainer, "config", dataclasses.replace(subject.config, data=data))


@pytest.mark.parametrize(("workers", "slack"), [(0, 0.0), (1, 0.18), (2, 0.38)])
def test_predicted_slack(
    subject: Subject, rates: Rates, monkeypatch: pytest.MonkeyPatch, workers: int, slack: float
) -> None:
    """Check a step of 200 ms and batches of 20, which each thread prepares for a step of its own."""
    with_workers(subject, workers, monkeypatch)
    monkeypatch.setattr(loader_delay, "forecast", lambda *_: SimpleNamespace(seconds=0.2))
    monkeypatch.setattr(loader_delay, "time_batches", lambda _: BatchTime(seconds=0.02, cpu=0.0))
    monkeypatch.setattr(loader_delay, "in_turns", lambda arms, _: {name: [1.0] for name in arms})
    assert loader_delay.numbers(subject, rates, 0.0).predicted_slack == pytest.approx(slack)


def test_held_batches_are_let_go(subject: Subject) -> None:
    """Check that a batch held for an hour is there when the experiment is over; else this test ends by its limit."""
    with loader_delay.delayed(subject) as delay:
        subject.step()  # what it starts is not held
        delay(3600.0)
        subject.step()  # what it starts is
    subject.step()


# --- batch sweep


@pytest.mark.parametrize(
    ("rows", "parts", "most", "room", "want"),
    [
        (8, 1, 99, 99.0, [1, 2, 4, 8, 16, 32, 64]),
        (8, 4, 99, 99.0, [4, 8, 16, 32, 64]),  # a step of four parts
        (8, 1, 20, 99.0, [1, 2, 4, 8, 16]),  # memory for twenty
        (8, 1, 99, 3 * 0.47, [1, 2, 4, 8, 16]),  # three turns of 0.31 s fit, of 0.63 s do not
        (3, 1, 99, 0.0, [3]),  # no time: what the run has
    ],
)
def test_batches_fit_into_memory_and_time(rows: int, parts: int, most: int, room: float, want: list[int]) -> None:
    found = batch_sweep.batches_of(rows, parts, lambda n: n <= most, lambda n: 0.01 * n, room)
    assert found == want


def test_batch_of_takes_as_many_sequences(subject: Subject) -> None:
    before = subject.trainer.sequences
    with batch_sweep.batch_of(subject) as step:
        step(8)
        assert subject.trainer.sequences == before + 8
        step(2)
    assert subject.trainer.sequences == before + 10 and subject.step().tokens == 4 * 8


# --- sections of a step, and virtual speed-ups


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
    for told in (clock.leave, clock.enter, clock.leave, clock.enter, clock.leave):
        told("a")
    assert clock.seconds == {"a": 3.0}


def test_predicted_phases_are_the_whole_step(subject: Subject, said: Any, parts: Any, rates: Rates) -> None:
    """Check that forward, backward and update are the forecast, and that sections lie inside of them."""
    shape = shape_of(subject.config, subject.rows, "float32")
    found = parts(shape, rates)
    phases = sum(found[name] for name in sections.PHASES)
    assert phases == pytest.approx(said(shape, rates).seconds, rel=0.03)
    assert all(found[name] > 0 for name in MODULES)
    assert sum(found[name] for name in MODULES) < phases and found["optimizer"] < found["update"]


# seconds of a batch beside 0.2 s of computing, 0.06 of them attention; gains of both if 25, 50 and 75 % faster
BOUNDED: list[tuple[float, list[float], list[float]]] = [
    (0.02, [0.075, 0.15, 0.225], [0.0, 0.0, 0.0]),  # its share, and nothing for a hidden loader
    (0.18, [0.075, 0.1, 0.1], [0.0, 0.0, 0.0]),  # the worked example: half of it gains 20 ms, as a batch takes 180
    (0.4, [0.0, 0.0, 0.0], [0.25, 0.5, 0.5]),  # a loader that binds leaves nothing to gain
]


@pytest.mark.parametrize(("batch", "attention", "loader"), BOUNDED)
def test_loader_that_binds_next_bounds_the_gain(batch: float, attention: list[float], loader: list[float]) -> None:
    gains = predicted_gains({"attention": 0.06, LOADER: batch}, 0.2, lambda c, s: max(0.0, s * batch - c))
    assert gains["attention"] == pytest.approx(attention) and gains[LOADER] == pytest.approx(loader)


@pytest.mark.parametrize(
    ("workers", "batch", "attention", "loader"),
    [
        (1, 0.02, [0.15, 0.3, 0.45], [0.0] * 3),
        (1, 0.4, [0.0] * 3, [0.25, 0.5, 0.5]),
        (2, 0.8, [0.0] * 3, [0.25, 0.5, 0.5]),
    ],
)
def test_delays_show_what_a_speedup_would_gain(
    subject: Subject, workers: int, batch: float, attention: list[float], loader: list[float], monkeypatch: Any
) -> None:
    """Check the experiment on a pipeline whose times are known, of which attention is 120 of 200 ms."""
    delays = {"computing": 0.0, "loading": 0.0}
    with_workers(subject, workers, monkeypatch)

    def setter(name: str) -> Any:
        return nullcontext(lambda seconds: delays.__setitem__(name, seconds))

    for name, value in {
        "time_batches": lambda _: BatchTime(seconds=batch, cpu=0.0),
        "clocked": lambda _: {"attention": 0.12},
        "delayed": lambda _: setter("loading"),
        "late_takes": lambda _: setter("computing"),
        "_turn": lambda _subject, off: max(0.2 + delays["computing"], (batch + delays["loading"]) / workers) - off,
    }.items():
        monkeypatch.setattr(virtual_speedup, name, value)
    found = virtual_speedup.numbers(subject, None, 0.0)
    assert found.gains["attention"] == pytest.approx(attention)
    assert found.gains[LOADER] == pytest.approx(loader)


def test_reasons_not_to_speed_up(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert virtual_speedup.why_not(subject) is None
    train = dataclasses.replace(subject.config.train, recompute=True)
    monkeypatch.setattr(subject.trainer, "config", dataclasses.replace(subject.config, train=train))
    assert "recompute" in (virtual_speedup.why_not(subject) or "")


def test_phases_are_the_whole_step(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST_STEPS", 3)
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


# --- the roofline


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
