"""A diagnosis of training and of decoding: faults are named, what is changed is taken back, and what is shown."""

import dataclasses
import json
import math
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from dsmini import ModelConfig, Transformer, accounting, ops
from dsmini.diagnosis import decoding as module
from dsmini.diagnosis import diagnosis as whole
from dsmini.diagnosis import evidence, training
from dsmini.diagnosis.arms import Arm, Comparison, measure, predict
from dsmini.diagnosis.contention import Contention
from dsmini.diagnosis.decoding import VARIANTS, Acceptance, DecodingSubject, Point, accepted_guesses, guessing_steps
from dsmini.diagnosis.diagnosis import Plan, answer, diagnose
from dsmini.diagnosis.findings import Finding
from dsmini.diagnosis.pages import record_of, report_of, short_report_of
from dsmini.diagnosis.training import Subject, dense_baseline, routed_blocks
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.inference.fused import Decoder
from dsmini.inference.speculative import Drafter
from dsmini.measure.price import Forecast, Part, Prices
from dsmini.measure.turns import TimeOverError, Turns
from dsmini.measure.workloads import StepShape, decoding_step
from dsmini.nn import FeedForward, MoE
from dsmini.report import Report, Section
from tests.conftest import Clock
from tests.diagnosis.conftest import MODEL, QUIET, SIZES, Imagine, World, arm_of, decoding_subject
from tests.helpers.configs import V4
from tests.helpers.pages import check_page, on_terminal, text_of
from tests.helpers.questions import InventedPrices, invented_roofs

PAGES = Path(__file__).parent / "pages"
NAMES = ("replay", "dense_active", "all_threads", "fastest_dtype")


def diagnosed(subject: Subject, rounds: int = 8, seconds: float = math.inf) -> Diagnosis:
    return diagnose(subject, Plan(rounds=rounds, seconds=seconds), None)


# --- faults


FAULTS = tomllib.loads(Path(__file__).with_name("faults.toml").read_text())


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_put_into_a_run_is_named(imagine: Imagine, fault: str) -> None:
    of = FAULTS[fault]
    costs = {name: Contention(**value) if name == "seen" else value for name, value in of["costs"].items()}
    found = diagnosed(imagine(**costs), rounds=20 if "stalls" in costs else 8)
    assert (found.named, found.verdict.outcome) == (of["named"], of["outcome"]) and of.get("says", "") in found.sentence
    if "replay" in of:
        gain, within = of["replay"]
        assert found.gains["replay"].value == pytest.approx(gain, abs=within)


# --- turns


def counted_arm(name: str, order: list[str], seconds: float = 0.05, **more: Any) -> Arm:
    """Return an arm that notes its steps, and what it was told of the plain ones."""
    step = lambda base: order.append(f"{name} {base:g}") or seconds  # noqa: E731
    return Arm(name=name, apply=lambda: nullcontext(step), **more)


def test_arms_take_turns_and_are_told_of_the_plain_steps() -> None:
    order: list[str] = []
    arms = [counted_arm("plain", order, 0.1, uncounted=2, counted=1), counted_arm("a", order, uncounted=0)]
    found = measure(arms, count=2)
    assert order == ["plain 0"] * 3 + ["a 0.1"] * 2 + (["plain 0.1"] * 3 + ["a 0.1"] * 2) * 2
    assert found.turns.seconds == {"plain": [0.1] * 2, "a": [0.05] * 2} and found.gains["a"].value == 0.5


@pytest.mark.parametrize(
    ("seconds", "rounds", "words"), [(0.5, 1, "0 rounds"), (4.0, 1, "1 round "), (9.0, 4, "4 rounds")]
)
def test_clock_decides_and_what_is_known_is_said(imagine: Imagine, seconds: float, rounds: int, words: str) -> None:
    """Check less time than the least rounds need: in 0.5 s not even one is whole."""
    subject = imagine(batch=0.3)
    found = diagnosed(subject, 50, seconds)
    assert subject.world.now < seconds + 1.0 and found.compared.turns.count == rounds
    assert found.verdict.outcome == "undetermined" and words in found.sentence
    assert "--rounds 6" in found.verdict.decides
    assert seconds < 1 or "without the cost of Data is shorter by 67 %" in found.sentence
    json.dumps(record_of(found), allow_nan=False)
    assert ("Nothing was tried" in text_of(report_of(found).html())) == (seconds < 1)


# --- arms


def losses_and_routing(subject: Subject) -> list[Tensor]:
    """Return what a forward on a fixed text gives."""
    text = torch.arange(4 * 9).view(4, 9) % 256
    found = subject.trainer.model.losses(text[:, :-1], text[:, 1:])
    return [found.total.detach(), *(r.indices for r in found.routing), *(r.weights.detach() for r in found.routing)]


def saw_plain_steps(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    """Let a subject have seen a turn of plain steps that waited for nothing."""
    monkeypatch.setattr(subject, "turns", [SimpleNamespace(seconds=1.0, waited=0.0, preparing=0.0)])


@pytest.mark.parametrize("name", ["plain", *NAMES])
def test_change_is_taken_back(subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that modules, loader, threads and what a forward gives are as before, also after an error."""
    monkeypatch.setattr(training, "cores", lambda: torch.get_num_threads() + 1)
    monkeypatch.setattr(training, "fastest_dtype", lambda _: "bfloat16")
    saw_plain_steps(monkeypatch, subject)
    arm, model = arm_of(subject, name), subject.trainer.model
    threads, loader, modules = torch.get_num_threads(), subject.trainer.loader, list(model.modules())
    before = losses_and_routing(subject)
    for error in (False, True):
        with pytest.raises(KeyboardInterrupt) if error else nullcontext(), arm.apply() as step:
            changed = (torch.get_num_threads() > threads, model.compute_dtype == torch.bfloat16)
            assert changed == (name == "all_threads", name == "fastest_dtype")
            assert all(p.dtype == torch.float32 for p in model.parameters())
            if error:
                raise KeyboardInterrupt
            if name == "plain":
                step(0.0)
                before = losses_and_routing(subject)
    assert torch.get_num_threads() == threads and subject.trainer.loader is loader
    assert list(model.modules()) == modules and "prepared" not in vars(loader)
    assert all(map(torch.equal, losses_and_routing(subject), before))


def test_steps_stay_at_their_place_of_the_schedules(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "at", 5)
    monkeypatch.setattr(subject.trainer, "steps_done", 5)
    sequences = subject.trainer.sequences
    rates = {subject.step().lr for _ in range(3)}
    assert subject.trainer.steps_done == 5 and len(rates) == 1
    assert subject.trainer.sequences == sequences + 3 * 4, "the data go on"


def test_batch_that_grows_is_swept_at_its_other_sizes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    train = dataclasses.replace(subject.config.train, batch_start=2, batch_ramp=0.5)
    monkeypatch.setattr(subject.trainer, "config", dataclasses.replace(subject.config, train=train))
    with subject.batch_of(8) as step:
        assert subject.trainer.config.train.batch_size == 8 and step(0.0) > 0
    assert subject.trainer.config.train == train


def test_steps_that_time_themselves_wait_for_the_device(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the clock starts and stops when the device is done, of training and of decoding."""
    events: list[str] = []
    monkeypatch.setattr("dsmini.machine.synchronize", lambda device: events.append("done"))
    monkeypatch.setattr(subject.trainer, "forward_backward", lambda rows: events.append("step"))
    subject.forward_backward()
    assert events == ["done", "step", "done"]
    turn = module.timed(lambda: events.append("step"), torch.device("cpu"))
    events.clear()
    turn()
    assert (events[0], events[1], events[-1]) == ("done", "step", "done")


def test_dense_baseline_has_as_many_active_parameters(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the width of what stands in: two chosen experts and the shared one; nothing is left for the next step."""
    seen: list[Any] = []
    note = lambda part, *_: seen.append(part.w1.weight.shape) if isinstance(part, FeedForward) else None  # noqa: E731
    saw_plain_steps(monkeypatch, subject)
    with subject.dense() as step, register_module_forward_pre_hook(note):
        assert step(1.0) < 2.0
    assert seen.count((3 * 16, 32)) == 2 and dense_baseline(subject.config.model).w1.weight.shape == (3 * 16, 32)
    assert all(isinstance(block.ffn, MoE) for block in routed_blocks(subject.trainer.model))
    assert all(p.grad is None for p in subject.trainer.model.parameters())


@pytest.mark.parametrize(("base", "waited", "want"), [(1.0, 0.0, 0.8), (0.3, 0.0, 0.15), (1.0, 0.9, 0.95)])
def test_dense_saves_at_most_what_plain_steps_computed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, base: float, waited: float, want: float
) -> None:
    """Without experts a pass takes 0.2 s of 0.4, so half of what is not waited is saved, and half of 0.4 s at most."""
    seconds = iter([0.4, 0.2])
    monkeypatch.setattr(subject, "turns", [SimpleNamespace(waited=waited)])
    monkeypatch.setattr(subject, "forward_backward", lambda: next(seconds))
    with arm_of(subject, "dense_active").apply() as step:
        assert step(base) == pytest.approx(want)


def test_reasons_not_to_try(imagine: Imagine) -> None:
    used = torch.get_num_threads()
    for costs, threads, dtype in (
        ({"cores": used}, f"all {used} cores are used already", "float32 is the fastest dtype here, and used"),
        ({"cores": used + 1, "slow_dtype": 2.0}, None, None),
    ):
        reasons = {arm.name: arm.why_not for arm in imagine(**costs).arms(None)}
        assert (reasons["all_threads"], reasons["fastest_dtype"]) == (threads, dtype)
    subject = imagine()
    train = dataclasses.replace(subject.config.train, compile=True)
    subject.world.config = dataclasses.replace(subject.config, train=train)
    for name in ("dense_active", "fastest_dtype"):
        assert "compiled" in (arm_of(subject, name).why_not or "")


# --- predictions


WAITS = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["waits"]


@pytest.mark.parametrize(("workers", "seconds", "cpu", "cores", "wait"), WAITS)
def test_predicted_wait(workers: int, seconds: float, cpu: float, cores: int, wait: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "cores", lambda: cores * torch.get_num_threads())
    assert training.waiting_seconds(seconds, cpu, 0.1, workers) == pytest.approx(wait)


def test_threads_are_predicted_with_calls_timed_on_them(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that each call is as fast as there are threads, that the wait stays, and threads are put back."""
    prices, threads = InventedPrices(), torch.get_num_threads()
    alone = prices.alone
    monkeypatch.setattr(prices, "alone", lambda call: alone(call) / torch.get_num_threads())
    monkeypatch.setattr(prices, "between", lambda *_: 0.0)
    monkeypatch.setitem(vars(subject), "wait", 0.5)
    subject.arms(prices)
    one, two = (subject.seconds_on(n) - 0.5 for n in (1, 2))
    assert one == pytest.approx(2 * two, rel=0.05) and two > 0 and torch.get_num_threads() == threads


def test_predictions_end_with_their_time(imagine: Imagine, prices: Prices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the rounds follow, that the page is drawn, and what a sweep does without the time to predict."""
    subject = imagine(cores=2)
    plain, first = subject.shape(), prices.forecast(subject.shape())

    def forecast(shape: StepShape, *more: Any) -> Forecast:
        if shape != plain or more:
            raise TimeOverError
        return first

    monkeypatch.setattr(prices, "forecast", forecast)
    found = diagnose(subject, Plan(rounds=6, seconds=math.inf), prices)
    assert found.compared.predicted.keys() == {"plain", "replay"} and "Machine binds" in found.sentence
    assert found.warnings[0].startswith("Some changes have no prediction")
    evidence.gather(found, subject, 100.0)
    assert [arm.at for arm in found.sweeps["batches"].arms] == [4, 1, 2], "what fits is not known of others"
    assert "batch x 0.5" in text_of(report_of(found).html())


# --- whole diagnoses, and what is shown


def test_whole_diagnosis_of_a_real_run(subject: Subject, prices: Prices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that every arm is predicted and tried or says why not, with real steps and this text."""
    monkeypatch.setattr(training, "cores", lambda: torch.get_num_threads())
    monkeypatch.setattr(training, "fastest_dtype", lambda _: "bfloat16")
    monkeypatch.setattr(subject, "turns", [])
    shares: list[float] = []
    found = diagnose(subject, Plan(rounds=5, seconds=math.inf), prices, lambda share, what: shares.append(share))
    assert found.gains.keys() == {*NAMES} - {"all_threads"} and found.not_tried.keys() == {"all_threads"}
    assert found.compared.turns.count == len(subject.turns) - 1 == 5 and len(subject.turns[1].steps) == 2
    assert all(found.compared.predicted_gain(arm) is not None for arm in found.compared.measured)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert {each.name for each in found.findings} >= {"idle_experts", "other_programs", "duplicates", "padding"}
    json.dumps(record_of(found), allow_nan=False)


def add_evidence(found: Diagnosis, *_: Any) -> None:
    """Add a sweep of batches of which one gains 50 %, one nothing, and one what is not sure."""
    arms = [counted_arm("batch 4", [], tokens=1.0)] + [
        counted_arm(f"batch x {n}", [], advice=f"Set train.batch_size = {4 * n}.", at=4.0 * n, tokens=float(n))
        for n in (2, 4)
    ]
    taken = {"batch 4": [1.0, 1.02, 1.0, 0.98, 1.0, 1.0], "batch x 2": [1.99, 2.0, 2.0, 2.01, 1.99, 2.0]}
    taken["batch x 4"] = [2.0, 1.92, 2.0, 2.04, 2.0, 2.0]
    sweep = Comparison(arms=arms, turns=Turns(taken), predicted={"batch 4": 1.0, "batch x 2": 1.5, "batch x 4": 2.2})
    title, finding = "What does a larger batch give?", "Four times the batch halves it."
    found.sections.append(Section(name="batches", title=title, finding=finding))
    found.sweeps["batches"], found.not_tried["threads"] = sweep, "this process may use one core only"


def test_pages_of_a_diagnosis(imagine: Imagine, prices: Prices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare terminal and page with those that are stored: verdict, gains, what to try, and what is wrong."""
    subject = imagine(batch=0.16, routing=0.01, counts=[[5, 5, 6, 4]])
    parts = [Part("experts", 4, 0.06, 0.03, 10**9, 10**7), Part("product", 9, 0.04, 0.04, 10**9, 10**9)]
    forecast = Forecast(shape=subject.shape(), parts=[*parts, Part("calls", 50, 0.01)], peak=0)
    for name, value in {"forecast": lambda *_: forecast, "wait": 0.04, "routing": lambda: 0.01}.items():
        monkeypatch.setitem(vars(subject), name, value)
    words = {"sentence": "30.0 % of the tokens are copies.", "fix": "Remove them."}
    subject.found = [Finding(axis="Data", name="duplicates", value=0.3, **words)]
    found = diagnose(subject, Plan(rounds=8, seconds=math.inf), prices)
    add_evidence(found)
    found.facts = {"batch": "4 x 8 tokens"}
    check_page(PAGES / "diagnosis.terminal.txt", on_terminal(short_report_of(found)))
    report = report_of(found, "command")
    check_page(PAGES / "diagnosis.page.txt", text_of(report.html()))
    assert report.html().count("<svg") == 2, "gains, and parts of a step"


# --- the answer of the command


@pytest.fixture
def ask(imagine: Imagine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what answers the command about a world of its own: the diagnosis, the seconds for evidence, the world."""
    monkeypatch.setattr(Prices, "here", lambda **_: None)

    def ask(quick: bool, costs: Any = None, **more: Any) -> tuple[Diagnosis, list[float], World]:
        subject, given = imagine(**costs or {}), list[float]()
        monkeypatch.setattr(whole, "training_subject", lambda _: subject)
        monkeypatch.setattr(evidence, "gather", lambda found, *more: (given.append(more[1]), add_evidence(found)))
        found = answer(None, quick=quick, **{"rounds": 6, "on_part": lambda *_: None, **more})
        return found, given, subject.world

    return ask


def test_interruption_before_enough_rounds_gives_no_diagnosis(ask: Any) -> None:
    def stop(share: float, what: str, left: float) -> None:
        if what == "round 5":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(False, on_part=stop, rounds=50)


def test_evidence_gets_what_is_left_of_the_time(ask: Any) -> None:
    """Rounds that take minutes leave none, and not less."""
    found, given, _ = ask(False)
    # 7 rounds of 6 steps of 0.1 s, and 3 pairs of passes
    assert given == [pytest.approx(whole.TOTAL_SECONDS - 7 * 12 * 0.1, abs=1.0)]
    record = json.loads(json.dumps(record_of(found)))
    assert record["evidence"]["batches"]["batch x 4"]["measured"] == pytest.approx(0.5, abs=0.02)
    assert record["not_tried"]["threads"] == "this process may use one core only"
    assert ask(False, costs={"computing": 100.0}, rounds=None)[1] == [0.0]


def test_quick_diagnosis_gathers_none_and_ends_with_its_time(ask: Any) -> None:
    """Check also steps of 10 s in the 25 s of a quick diagnosis."""
    found, given, _ = ask(True)
    assert not given and record_of(found)["evidence"] == {} and not found.stopped
    found, _, world = ask(True, costs={"computing": 10.0}, rounds=None)
    record = record_of(found)
    assert world.now < 100 and record["outcome"] == "undetermined" and record["step_seconds"] > 9


@pytest.mark.parametrize(("quick", "fresh", "want"), [(True, False, False), (True, True, True), (False, False, False)])
def test_fresh_prices_are_measured_again(ask: Any, monkeypatch: Any, quick: bool, fresh: bool, want: bool) -> None:
    made: list[bool] = []
    monkeypatch.setattr(Prices, "here", lambda *, fresh, **_: made.append(fresh))
    ask(quick, fresh=fresh)
    assert made == [want]


def test_threads_that_are_slower_say_so_with_the_flag(imagine: Imagine) -> None:
    """Check a machine whose second core another program has: a step takes 52 times as long on both."""
    found = diagnosed(imagine(cores=2, crowding=104.0))
    assert found.warnings[-1].startswith("On 2 cores a step takes 5") and "as long as on 1 thread" in found.warnings[-1]
    assert "--train.threads 1" in found.warnings[-1] and "52 times as long" in on_terminal(short_report_of(found))


# --- decoding as a subject: steps that are the same work, alternatives, predictions, evidence

CHANGES = (*VARIANTS, "all_threads")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few steps be timed together."""
    monkeypatch.setattr(module, "TURN", 0.001)


@pytest.fixture(scope="module")
def decoding() -> DecodingSubject:
    """Return a subject of the small model that decodes 2 sequences after 64 tokens; every test leaves it as it was."""
    return decoding_subject(batch=2)


def point_of(subject: DecodingSubject) -> Point:
    return Point(batch=subject.batch, context=subject.context, tokens=subject.tokens, rows=subject.cache)


def rows(subject: DecodingSubject) -> list[Tensor]:
    return [store.data[:, : subject.context].clone() for store in subject.cache.stores]


def check_unchanged(subject: DecodingSubject, run: Any) -> None:
    """Check modules, weights, logits, cache and threads after a run."""

    def state() -> list[Tensor]:
        logits = subject.model(torch.arange(20).view(2, 10) % 256).detach()
        return [logits, subject.cache.lengths.clone(), *rows(subject)]

    before, modules, config = state(), list(subject.model.modules()), subject.config
    threads, form = torch.get_num_threads(), subject.cache.form
    run()
    assert all(map(torch.equal, state(), before)) and list(subject.model.modules()) == modules
    assert (torch.get_num_threads(), subject.cache.form) == (threads, form) and subject.config is config


# --- steps and alternatives


@pytest.mark.parametrize("name", ["plain", *CHANGES])
def test_arm_leaves_the_subject_as_it_is(decoding: DecodingSubject, name: str) -> None:
    def run() -> None:
        with arm_of(decoding, name).apply() as step:
            assert min(step(0.0) for _ in range(2)) > 0

    check_unchanged(decoding, run)


def test_variants_decode_the_rows_and_tokens_of_the_subject(decoding: DecodingSubject) -> None:
    """Check that a variant of the same weights chooses the experts that the subject's own step chooses."""
    own = decoding_step(decoding.model, decoding.cache, decoding.tokens)
    (want,), (got,) = own(), module.PLAIN.steps(decoding.model, point_of(decoding))()
    assert torch.equal(got.indices, want.indices) and torch.equal(got.weights, want.weights)


def test_variant_of_dense_layers_alone_has_no_prediction() -> None:
    model = Transformer(dataclasses.replace(MODEL, n_dense_layers=MODEL.n_layers + MODEL.n_mtp_layers))
    variant = module.with_bfloat16_weights(model)
    assert not len(variant.mtp) and variant.head.weight.dtype == torch.bfloat16


def test_text_is_what_was_read() -> None:
    """Check that each sequence has its own piece of the text, and that a short one is repeated."""
    model = Transformer(MODEL).eval()
    found = DecodingSubject(model, batch=2, context=6, trained=True, text=torch.arange(8))
    assert found.rows == [[0, 1, 2, 3, 4, 5], [6, 7, 0, 1, 2, 3]]
    cache = model.new_cache(2, 6)
    with torch.no_grad():
        model(torch.tensor(found.rows), cache=cache)
    for got, want in zip(rows(found), cache.stores, strict=True):
        torch.testing.assert_close(got, want.data)


def test_a_cache_larger_than_memory_is_refused() -> None:
    model = Transformer(dataclasses.replace(MODEL, max_seq_len=10**9))
    with pytest.raises(ValueError, match=r"^a cache of 1024 x 1000000000 tokens needs "):
        DecodingSubject(model, batch=1024, context=10**9 - 1)


def test_batches_to_try_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = DecodingSubject(Transformer(MODEL).eval(), batch=2)
    assert subject.batch_sizes() == [2, *(n for n in module.BATCHES if n != 2)]
    row = accounting.kv_bytes_per_token(MODEL, "float32") * subject.context
    monkeypatch.setattr(module, "memory_bytes", lambda _: 4 * row / module.MOST_MEMORY)
    assert subject.batch_sizes() == [2, 1]


def test_alternatives_decode_what_they_say(decoding: DecodingSubject) -> None:
    """Check the dtypes of each variant, and that the model keeps its own."""
    model = decoding.model
    made = {name: variant.change(model) for name, variant in VARIANTS.items()}
    assert made["free_cache"] is made["drafts"] is model
    assert made["bfloat16_weights"].embed.weight.dtype == torch.bfloat16
    assert torch.float8_e4m3fn in {t.dtype for t in made["fp8_weights"].layers.state_dict().values()}
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


REASONS = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["reasons"]


@pytest.mark.parametrize(("changes", "context", "name", "words"), REASONS)
def test_reasons_not_to_try_in_decoding(changes: dict[str, Any], context: int, name: str, words: str) -> None:
    subject = decoding_subject(context=context, **changes)
    vars(subject)["acceptance"] = None  # which takes seconds to measure
    with ops.use("eager"):
        why = arm_of(subject, name).why_not
    assert words in why if words and why else why is None and not words


# --- guesses


def test_model_of_one_token_accepts_all_guesses() -> None:
    """Check a head that always makes the same token: every guess is right, so that a step makes two tokens."""
    model = decoding_subject().model
    with torch.no_grad():
        model.head.weight.zero_()
    found = accepted_guesses(model, [[1, 2, 3], [4, 5]])
    assert found.accepted == found.drafted > 0 and found.tokens_per_step == 2.0
    for trained in (True, False):
        (finding,) = DecodingSubject(model, context=8, trained=trained).look()
        assert finding.value == 1.0 and "2.00" in finding.sentence and not finding.is_fault
        assert ("random" in finding.sentence) == (not trained)


def test_guessing_step_is_the_same_work_each_time(decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that cache and multi-token prediction begin each step where they began the first."""
    seen: list[Any] = []
    real = Drafter.guess

    def guess(self: Drafter, last: Any, live: Any, known: Any) -> Any:
        seen.append((self.cache.lengths.tolist(), self.mtp.lengths.tolist(), [t.tolist() for t in self.mtp.last]))
        return real(self, last, live, known)

    monkeypatch.setattr(Drafter, "guess", guess)
    run = guessing_steps(decoding.model, point_of(decoding))
    made: list[Any] = [run() for _ in range(3)]
    assert made[0] == made[1] == made[2] and [len(row) for row in made[0]]
    assert seen[0] == seen[1] == seen[2] and seen[0][:2] == ([64, 64], [64, 64])


def test_a_step_makes_all_guesses_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room in the cache none would be made, and a step be timed that checks nothing."""
    monkeypatch.setattr(module, "ROOM", 4)
    monkeypatch.setattr(module, "accept_greedy", lambda guesses, _: len(guesses))
    model = decoding_subject(n_mtp_layers=4).model
    assert guessing_steps(model, Point(batch=2, context=60))() == [4, 4]


def test_time_of_a_token_is_shared_by_accepted_guesses(decoding: DecodingSubject, monkeypatch: Any) -> None:
    found = Acceptance(drafted=10, accepted=6, tokens_per_step=1.6)
    monkeypatch.setitem(vars(decoding), "acceptance", found)
    assert arm_of(decoding, "drafts").tokens == 1.6 and arm_of(decoding, "free_cache").tokens == 1.0


# --- predictions


@pytest.mark.parametrize("prices", [InventedPrices(), Prices(roofs=invented_roofs())], ids=["invented", "timed"])
def test_every_arm_is_predicted(decoding: DecodingSubject, prices: Prices) -> None:
    """Make each call of each variant again, for real: a copied model must keep the shapes of its buffers."""
    found: dict[str, float] = {}
    check_unchanged(decoding, lambda: found.update(predict(decoding.arms(prices))))
    assert found.keys() == {"plain", *CHANGES} and min(found.values()) > 0


def test_every_arm_of_v4_is_predicted() -> None:
    """Its cache has rows of several kinds, and a table of experts is not a number to make up."""
    config = ModelConfig(**(SIZES | V4), n_hash_layers=1, hc_mult=2, hc_sinkhorn_iters=1, max_seq_len=128)
    subject = DecodingSubject(Transformer(config, compute_dtype=torch.float32).eval(), context=64)
    vars(subject)["acceptance"] = None  # which takes seconds to measure
    found = predict(subject.arms(InventedPrices()))
    assert found.keys() >= {"plain", "drafts", "bfloat16_weights"} and min(found.values()) > 0


def test_forecast_has_the_price_of_cached_tokens(decoding: DecodingSubject) -> None:
    """Check that attention costs less after one cached token, and other parts the same."""
    decoding.arms(InventedPrices())
    assert decoding.forecast() is decoding.forecast(batch=decoding.batch), "made once"
    many, one = decoding.forecast().by_class, decoding.forecast("free_cache").by_class
    assert one["attention step"] < many["attention step"]
    assert one["feed forward step"] == pytest.approx(many["feed forward step"], rel=0.05)


@pytest.mark.parametrize("slow", [True, False], ids=["by the token", "always"])
def test_slowed_cached_attention_is_found(clock: Clock, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """Check that steps which take longer for each cached token are named, and not those which always do."""
    monkeypatch.setattr(module, "watch", lambda *_: lambda: QUIET)
    real = Decoder.states

    def states(decoder: Decoder, tokens: Tensor, cache: Any, *more: Any) -> Any:
        clock.pay(2e-4 * int(cache.lengths.max()) if slow else 0.012)
        return real(decoder, tokens, cache, *more)

    monkeypatch.setattr(Decoder, "states", states)
    found = diagnose(decoding_subject(), Plan(rounds=8, seconds=math.inf, only=["free_cache"]), None)
    assert (found.gains["free_cache"].low > 0.5) == slow
    assert (found.verdict.outcome == "binds" and found.named == "Machine") == slow


# --- evidence


def test_evidence_of_decoding(decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check figures, finding and JSON, and that cache and threads are as before."""
    monkeypatch.setattr(evidence, "MOST_TURNS", 1)
    monkeypatch.setattr(module, "BATCHES", (1, 2, 4))
    decoding.arms(InventedPrices())
    arms = [Arm(name="plain", apply=decoding.plain)]
    found = Diagnosis(compared=Comparison(arms=arms, turns=Turns({"plain": [0.001]})), findings=[])
    check_unchanged(decoding, lambda: evidence.gather(found, decoding, 1e6))
    (section,), compared = found.sections, found.sweeps["batches"]
    assert section.finding.endswith(".") and section.plots[0].series
    assert set(compared.turns.seconds) == {arm.name for arm in compared.arms} == {"batch 2", "batch x 0.5", "batch x 2"}
    assert compared.predicted
    assert section.title in Report(title="A", sections=[section]).html()
