"""A diagnosis of training: faults put into a run are named, what is changed is taken back, and what is shown."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmini.diagnosis import answer as answering
from dsmini.diagnosis import experiment, predictions
from dsmini.diagnosis.answer import answer
from dsmini.diagnosis.contention import Contention, Watch
from dsmini.diagnosis.diagnosis import Diagnosis, LookPlan, diagnose
from dsmini.diagnosis.evidence.evidence import to_try
from dsmini.diagnosis.evidence.gather import Gathered
from dsmini.diagnosis.experiment import COUNTED, UNCOUNTED, run_in_turns
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.interventions import algorithm, machine
from dsmini.diagnosis.interventions.algorithm import dense, uniformly
from dsmini.diagnosis.interventions.intervention import Intervention
from dsmini.diagnosis.pages import report_of, short_report_of
from dsmini.diagnosis.predictions import BatchTime, Prediction
from dsmini.diagnosis.record import record_of
from dsmini.diagnosis.subject import Subject
from dsmini.diagnosis.training_work import TRAINING
from dsmini.diagnosis.verdict import Outcome
from dsmini.measure import cpu_time
from dsmini.measure.step_rates import Rates
from dsmini.nn import FeedForward, Gate, MoE
from dsmini.report import Figure, Section
from tests.diagnosis.conftest import World
from tests.helpers.pages import check_page, on_terminal, text_of

Worlds = Callable[..., World]
PAGES = Path(__file__).parent / "pages"
BY_NAME = {each.name: each for each in TRAINING.interventions}
QUIET = dataclasses.replace(TRAINING, look=lambda _: [], look_back=lambda *_: [])
"""Training, of whose text and batches nothing is looked at."""


def diagnosed(subject: Subject, rounds: int = 8, seconds: float = 1e9, **more: Any) -> Diagnosis:
    return diagnose(subject, LookPlan(rounds=rounds, least=5, seconds=seconds), None, work=QUIET, **more)


# --- faults

# what a run's state costs, the axis that is named, the verdict's outcome, and what gains most of that axis
FAULTS: dict[str, tuple[dict[str, Any], str, Outcome, str]] = {
    "none": ({}, "", Outcome.NOTHING_BINDS, ""),
    "batches that come late": ({"batch": 0.16}, "Data", Outcome.BINDS, "waiting"),
    "batches that come just in time": ({"batch": 0.09}, "", Outcome.NOTHING_BINDS, ""),
    "unequal loads": ({"imbalance": 0.03}, "Algorithm", Outcome.BINDS, "uniform_routing"),
    "dear routing": ({"routing": 0.03}, "Algorithm", Outcome.BINDS, "dense_active"),
    "routing that costs little": ({"routing": 0.003}, "", Outcome.NOTHING_BINDS, ""),
    "one of two cores": ({"cores": 2}, "Machine", Outcome.BINDS, "all_threads"),
    "the slower dtype": ({"slow_dtype": 1.4}, "Machine", Outcome.BINDS, "fastest_dtype"),
    "other programs": ({"others": 0.4}, "Machine", Outcome.BINDS, "quiet_machine"),
    "two at once": ({"routing": 0.05, "slow_dtype": 1.5}, "", Outcome.MIXED, ""),
    "idle experts": ({"counts": [[10, 10, 0, 0]]}, "Algorithm", Outcome.NOTHING_BINDS, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_put_into_a_run_is_named(subject: Subject, world: Worlds, fault: str) -> None:
    costs, named, outcome, best = FAULTS[fault]
    world(**costs)
    found = diagnosed(subject)
    assert (found.named, found.verdict.outcome) == (named, outcome)
    if best:
        assert best in found.best.values() and found.gains[best].low > 0.1
        assert found.sentence.startswith(f"{named} binds")
    if fault == "batches that come late":
        assert found.gains["waiting"].value == pytest.approx(0.06 / 0.16, abs=0.01)
        assert [each.name for each in found.findings if each.is_fault] == ["waiting"]
    if fault == "idle experts":
        assert "50% of the experts" in found.sentence and "MaxVio 1.00" in found.sentence


def test_replay_decides_where_the_steps_clock_sees_nothing(subject: Subject, world: Worlds) -> None:
    """Check a loader whose threads take the cores: no step waits, and replaying gains 40 %."""
    there = world(batch=0.16)
    step = there.step
    subject.trainer.step = lambda: dataclasses.replace(step(), data_wait=0.0)  # the world puts it back
    found = diagnosed(subject)
    assert found.named == "Data" and "waiting" not in found.gains


def test_neither_probes_nor_times_of_others_are_blamed_alone(subject: Subject, world: Worlds, monkeypatch: Any) -> None:
    world()
    for others, steady in ((1.0, 1.0), (0.0, 0.6)):
        seen = Contention(others=others, steadiness=steady)
        monkeypatch.setattr(Watch, "end", lambda _, seen=seen: seen)
        found = diagnosed(subject)
        assert found.named == "" and not any(each.is_fault for each in found.findings)


def test_noise_hides_a_fault_and_makes_none(subject: Subject, world: Worlds) -> None:
    """Check steps with extra time of infinite variance: what binds is undetermined, not another axis."""
    hidden = 0
    for seed in range(6):
        draw = np.random.default_rng(seed)
        there = world(imbalance=0.014, noise=lambda draw=draw: 0.05 * draw.pareto(1.2))
        noisy = diagnosed(subject, rounds=12)
        assert noisy.named in ("", "Algorithm")
        if noisy.verdict.outcome is Outcome.UNDETERMINED:
            hidden += 1
            assert noisy.sentence.startswith("Undetermined") and noisy.verdict.decides
        there.noise = lambda: 0.0
    assert hidden >= 4
    assert diagnosed(subject, rounds=12).named == "Algorithm", "the same without noise"


# --- turns


def test_turns_take_turns(subject: Subject, world: Worlds) -> None:
    """Check the order of steps: a turn of plain ones, one of each intervention, and nobody always first."""
    there, order = world(), list[str]()
    plain = there.step
    subject.trainer.step = lambda: order.append("plain") or plain()

    def named(name: str) -> Any:
        step = lambda _base: order.append(name) or 0.05  # noqa: E731
        return Intervention(
            name=name, axis=BY_NAME["replay"].axis, words="", action="", why_not=lambda _: None,
            apply=lambda _: nullcontext(step),
        )  # fmt: skip

    watch = Watch(None, torch.device("cpu"))
    found = run_in_turns(subject, [named("a"), named("b")], watch, rounds=2, seconds=9, least=1)
    turn = UNCOUNTED + COUNTED
    assert order[::turn] == ["plain", "a", "b", "plain", "a", "b", "plain", "b", "a"] and len(order) == 9 * turn
    assert found.rounds == 2 and found.free == {"a": [0.05, 0.05], "b": [0.05, 0.05]}
    assert len(found.steps) == 2 * COUNTED and found.seconds == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (20.0, 13), (1e9, 50)])
def test_time_ends_an_experiment_after_the_least_rounds(
    subject: Subject, world: Worlds, seconds: float, rounds: int
) -> None:
    """Check rounds of 15 steps, which take 1.5 s, and one more that only warms up."""
    world()
    assert diagnosed(subject, 50, seconds).measured.rounds == rounds


def stop_at(round_: str) -> Callable[[float, str], None]:
    """Return an on_part that interrupts before this round."""

    def on_part(share: float, what: str) -> None:
        if what == round_:
            raise KeyboardInterrupt

    return on_part


def test_interrupted_diagnosis_keeps_its_whole_rounds(subject: Subject, world: Worlds) -> None:
    world()
    found = diagnosed(subject, 50, on_part=stop_at("round 7"))
    assert found.stopped and found.measured.rounds == 6
    assert all(len(taken) == 6 for taken in found.measured.free.values())
    with pytest.raises(KeyboardInterrupt):
        diagnosed(subject, 50, on_part=stop_at("round 3"))


def test_cpu_time_of_others_is_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 3 busy seconds in 2 seconds, of which 1.5 are ours: others keep 0.75 of a core busy."""
    clock, busy, own = iter([10.0, 12.0]), iter([100.0, 103.0]), iter([(5.0, 1.0), (6.0, 1.5)])
    monkeypatch.setattr(cpu_time.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(cpu_time, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(cpu_time.os, "times", lambda: next(own))
    watch = Watch(None, torch.device("cpu"))
    watch.begin()
    assert watch.end().others == pytest.approx(0.75)


# --- interventions


def losses_and_routing(subject: Subject) -> list[Tensor]:
    """Return what a forward on a fixed text gives."""
    text = torch.arange(4 * 9).view(4, 9) % 256
    found = subject.trainer.model.losses(text[:, :-1], text[:, 1:])
    return [found.total.detach(), *(r.indices for r in found.routing), *(r.weights.detach() for r in found.routing)]


@pytest.mark.parametrize("name", BY_NAME)
def test_change_is_taken_back(subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that modules, loader, threads and what a forward gives are as before, also after an error."""
    monkeypatch.setattr(machine, "cores", lambda: torch.get_num_threads() + 1)
    monkeypatch.setattr(machine, "pick_dtype", lambda *_: torch.bfloat16)
    model = subject.trainer.model
    threads, loader, modules = torch.get_num_threads(), subject.trainer.loader, list(model.modules())
    before = losses_and_routing(subject)
    for error in (False, True):
        with pytest.raises(KeyboardInterrupt) if error else nullcontext(), BY_NAME[name].apply(subject):
            changed = (torch.get_num_threads() > threads, model.compute_dtype == torch.bfloat16)
            assert changed == (name == "all_threads", name == "fastest_dtype")
            assert all(p.dtype == torch.float32 for p in model.parameters())
            if error:
                raise KeyboardInterrupt
    assert torch.get_num_threads() == threads and subject.trainer.loader is loader
    assert list(model.modules()) == modules
    assert all(map(torch.equal, losses_and_routing(subject), before))


def test_steps_stay_at_their_place_of_the_schedules(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "at", 5)
    monkeypatch.setattr(subject.trainer, "steps_done", 5)
    sequences = subject.trainer.sequences
    rates = {subject.step().lr for _ in range(3)}
    assert subject.trainer.steps_done == 5 and len(rates) == 1
    assert subject.trainer.sequences == sequences + 3 * 4, "the data go on"


def test_replay_takes_one_batch_again_and_again(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(subject).pop("one_batch", None)
    whole, asked = subject.trainer.loader.prepared, list[object]()
    monkeypatch.setattr(subject.trainer.loader, "prepared", lambda request: asked.append(request) or whole(request))
    with BY_NAME["replay"].apply(subject) as step:
        for _ in range(4):
            step(0.0)
    assert len(asked) == 1, "it is prepared once"
    subject.step()
    subject.step()
    assert len(asked) > 1, "and the loader is back"


def test_uniform_routing_balances_every_gate(subject: Subject) -> None:
    """Check that loads differ by one at most, and a token's experts differ."""
    gates = subject.trainer.model.gates()
    before = [gate.bias.clone() for gate in gates if gate.bias is not None]
    try:
        for gate in gates:
            assert gate.bias is not None
            gate.bias[:2] = 10.0  # all tokens choose the same experts
        with BY_NAME["uniform_routing"].apply(subject):
            text = torch.arange(4 * 9).view(4, 9) % 256
            found = subject.trainer.model.losses(text[:, :-1], text[:, 1:])
        assert losses_and_routing(subject)[1].unique().tolist() == [0, 1], "the bias is as it was"
    finally:
        for gate, bias in zip(gates, before, strict=True):
            gate.bias = bias
    assert len(found.routing) == 2, "the block and that of multi-token prediction"
    for routing in found.routing:
        assert routing.counts.max() - routing.counts.min() <= 1
        assert routing.counts.sum() == routing.indices.numel()
        assert all(len(set(row)) == len(row) for row in routing.indices.tolist())


@pytest.mark.parametrize("normed", [True, False])
def test_uniform_routing_weighs_as_its_gate_does(normed: bool) -> None:
    gate = Gate(dim=8, n_routed_experts=8, n_expert_groups=1, n_limited_groups=1, norm_topk_prob=normed)
    found = uniformly(gate, gate.forward, torch.randn(12, 8))
    scores = found.scores.gather(1, found.indices)
    want = scores / scores.sum(1, keepdim=True) if normed else scores
    torch.testing.assert_close(found.weights, gate.options["route_scale"] * want)


@pytest.mark.parametrize(("total", "width"), [(False, 3 * 16), (True, 9 * 16)])
def test_dense_twin_has_as_many_parameters(subject: Subject, total: bool, width: int) -> None:
    """Check the width of what stands in: two chosen experts and the shared one, or all of them."""
    seen: list[Sequence[int]] = []
    real = FeedForward.forward

    def watched(self: FeedForward, x: Tensor) -> Tensor:
        seen.append(self.w1.weight.shape)
        return real(self, x)

    with pytest.MonkeyPatch.context() as patch, dense(subject, total) as step:
        patch.setattr(FeedForward, "forward", watched)
        step(1.0)
    assert [tuple(shape) for shape in seen].count((width, 32)) == 2
    assert all(isinstance(block.ffn, MoE) for block in subject.blocks())
    assert all(p.grad is None for p in subject.trainer.model.parameters()), "nothing is left for the next step"


@pytest.mark.parametrize(("base", "free"), [(1.0, 0.8), (0.3, 0.15)])
def test_pair_of_a_slow_moment_is_no_longer_than_its_step(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, base: float, free: float
) -> None:
    """Check 0.4 s with experts and 0.2 without, next to plain steps of 1 s and of 0.3."""
    monkeypatch.setattr(algorithm, "dense_pair", lambda *_: nullcontext(lambda: (0.4, 0.2)))
    with dense(subject) as step:
        assert step(base) == pytest.approx(free)


def test_forward_backward_leaves_no_gradient(subject: Subject) -> None:
    before = [p.detach().clone() for p in subject.trainer.model.parameters()]
    assert subject.forward_backward() > 0
    for p, q in zip(subject.trainer.model.parameters(), before, strict=True):
        assert p.grad is None and torch.equal(p, q)


def test_reasons_not_to_try(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    used = torch.get_num_threads()
    for cores, fastest, threads, dtype in (
        (used, torch.float32, f"all {used} cores are used already", "float32 is the fastest dtype here, and used"),
        (used + 1, torch.bfloat16, None, None),
    ):
        monkeypatch.setattr(machine, "cores", lambda n=cores: n)
        monkeypatch.setattr(machine, "pick_dtype", lambda *_, dtype=fastest: dtype)
        assert BY_NAME["all_threads"].why_not(subject) == threads
        assert BY_NAME["fastest_dtype"].why_not(subject) == dtype
    train = dataclasses.replace(subject.config.train, compile=True)
    monkeypatch.setattr(subject.trainer, "config", dataclasses.replace(subject.config, train=train))
    for name in ("uniform_routing", "dense_active", "fastest_dtype"):
        assert "compiled" in (BY_NAME[name].why_not(subject) or "")


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


# --- whole diagnoses, and what is shown


def test_whole_diagnosis_of_a_real_run(subject: Subject, rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that every intervention is predicted and tried or says why not, with real steps and this text."""
    monkeypatch.setattr(experiment, "UNCOUNTED", 0)
    monkeypatch.setattr(experiment, "COUNTED", 1)
    monkeypatch.setattr(machine, "cores", lambda: torch.get_num_threads())
    monkeypatch.setattr(machine, "pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(predictions, "pick_dtype", lambda *_: torch.bfloat16)
    parts: list[tuple[float, str]] = []
    found = diagnose(subject, LookPlan(rounds=5, least=5), rates, lambda share, what: parts.append((share, what)))
    tried = {"replay", "uniform_routing", "dense_active", "fastest_dtype"}
    assert tried == found.gains.keys() - {"quiet_machine", "waiting"} and found.not_tried.keys() == {"all_threads"}
    assert found.measured.rounds == len(found.measured.steps) == 5
    assert all(found.prediction and found.prediction.gain(name) is not None for name in tried)
    assert [share for share, _ in parts] == sorted(share for share, _ in parts) and parts[-1][0] == 1.0
    named = [each.name for each in found.findings]
    assert {"waiting", "idle_experts", "other_programs", "duplicates", "padding", "loader_rate"} <= {*named}
    assert len({*named}) == len(named)
    record = json.loads(json.dumps(record_of(found)))
    assert record["gains"]["replay"]["rounds"] == 5 and record["outcome"] in {o.value for o in Outcome}
    assert all(json.loads(line) for line in report_of(found, "Diagnosis", {}, "command").json_lines())


def gathered_evidence() -> Gathered:
    gain = [to_try("batch_sweep", "batch x 4", "Set train.batch_size = 16.", [0.48, 0.5, 0.51], 1.0, 0.45)]
    gain.append(to_try("batch_sweep", "batch x 2", "Set train.batch_size = 8.", [0.99], 1.0, None))
    times = [Figure(question="batch_sweep", case={"batch": 4}, metric="step", unit="s", measured=0.16)]
    sweep = Section(
        name="batch_sweep",
        title="What does a larger batch give?",
        finding="Four times the batch halves the time of a token.",
        figures=[*gain, *times],
        warnings=["A warning of the evidence."],
    )
    return Gathered(sections=[sweep], not_tried={"threads": "all cores are used already"})


def test_pages_of_a_diagnosis(subject: Subject, world: Worlds, rates: Rates) -> None:
    """Compare terminal and page with those that are stored: verdict, gains, what to try, and what is wrong."""
    world(batch=0.16, routing=0.01, counts=[[5, 5, 6, 4]])
    parts: Any = SimpleNamespace(by_class={"experts": 0.06, "product": 0.04, "calls": 0.01}, seconds=0.11)
    predicted = Prediction(plain=0.15, free={"replay": 0.11, "dense_active": 0.15}, forecast=parts)
    finding = Finding(
        axis="Data", name="duplicates", value=0.3, unit="share", low=0.3, high=0.3, is_fault=True,
        sentence="30.0% of the tokens are copies.", fix="Remove them.",
    )  # fmt: skip
    work = dataclasses.replace(QUIET, look=lambda _: [finding], predict=lambda *_: predicted)
    found = diagnose(subject, LookPlan(rounds=8, least=8), rates, work=work)
    short = short_report_of(found, "Diagnosis of a run", gathered_evidence())
    check_page(PAGES / "diagnosis.terminal.txt", on_terminal(short))
    report = report_of(
        found, "Diagnosis of a run", {"The run": {"batch": "4 x 8 tokens"}}, "command", gathered_evidence()
    )
    check_page(PAGES / "diagnosis.page.txt", text_of(report.html()))
    assert report.html().count("<svg") == 4, "gains, and parts of a step, in light and dark"


# --- the answer of the command


@pytest.fixture
def asked(subject: Subject, world: Worlds, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the small subject answer in a world of its own, and return the arguments of each call of `gather`."""
    calls: list[Any] = []

    def gather(*args: Any, **named: Any) -> Gathered:
        calls.append((*args, named))
        return gathered_evidence()

    world()
    for name, value in {
        "config_of": lambda _: (subject.config, None),
        "subject_of": lambda *_: subject,
        "stored_rates": lambda _: None,
        "load_or_measure_rates": lambda *_, **__: None,
        "card": lambda _: {"processor": "A processor"},
        "gather": gather,
        "TRAINING": QUIET,
    }.items():
        monkeypatch.setattr(answering, name, value)
    return calls


def told(quick: bool, on_part: Any = lambda share, what: None) -> Any:
    return answer(None, quick=quick, rounds=5, command="command", on_part=on_part)


def test_evidence_gets_what_is_left_of_the_time(asked: Sequence[Any]) -> None:
    shares: list[float] = []
    found = told(False, lambda share, _: shares.append(share))
    ((_, _, left, _, named),) = asked
    # 6 rounds of 15 steps of 0.1 s, and as many for the dense twins
    assert left == pytest.approx(answering.TOTAL_SECONDS - 6 * 15 * 0.1, abs=1.0) and named["step"] > 0
    assert shares == sorted(shares) and max(shares) <= answering.ROUNDS, "the rest is for evidence"
    record = json.loads(json.dumps(found.record))
    assert record["evidence"]["batch_sweep"][0]["measured"] == 0.5 and record["outcome"] == "nothing binds"
    assert record["evidence_not_tried"] == {"threads": "all cores are used already"}
    assert "batch x 4" in found.report.html()
    assert "batch x 4" in found.short.sections[2].finding, "the largest gain is first"


def test_quick_diagnosis_gathers_none(asked: Sequence[Any]) -> None:
    found = told(True)
    assert not asked and found.record["evidence"] == {} and not found.stopped


def test_interrupted_rounds_gather_none(asked: Sequence[Any]) -> None:
    found = answer(None, quick=False, rounds=50, command="", on_part=stop_at("round 7"))
    assert not asked and found.stopped and found.record["stopped"]


def test_interrupted_evidence_keeps_the_verdict(asked: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Gathered(not_tried={"threads": "it was interrupted"}, stopped=True)
    monkeypatch.setattr(answering, "gather", lambda *_, **__: stopped)
    found = told(False)
    assert found.stopped and not found.record["stopped"] and found.record["outcome"]
    assert "some evidence is missing" in found.report.warnings[0]


def test_unknown_or_useless_intervention_is_refused(asked: Sequence[Any]) -> None:
    for name, words in (
        ("replays", "unknown intervention 'replays'; use one of replay, "),
        ("all_threads", "leave it out"),
    ):
        with pytest.raises(ValueError, match=words):
            answer(None, quick=True, rounds=5, only=[name], command="", on_part=lambda *_: None)
