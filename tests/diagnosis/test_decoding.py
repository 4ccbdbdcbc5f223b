"""Decoding as a subject: steps that are the same work, alternatives that do what they say, predictions, evidence."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, ops
from dsmini.config import ModelConfig
from dsmini.diagnosis import scaling
from dsmini.diagnosis.decoding import predictions
from dsmini.diagnosis.decoding import steps as stepping
from dsmini.diagnosis.decoding.alternatives import (
    ALTERNATIVES,
    BFLOAT16,
    EXPANDED,
    FP8,
    INTERVENTIONS,
    MHA,
    tokens_of,
)
from dsmini.diagnosis.decoding.arm import PLAIN, Arm, Narrow
from dsmini.diagnosis.decoding.drafts import Acceptance, acceptance, acceptance_finding, guessing_steps
from dsmini.diagnosis.decoding.evidence import batches, context_slope
from dsmini.diagnosis.decoding.evidence.every import DECODING_EVIDENCE
from dsmini.diagnosis.decoding.predictions import Prices, predict, scaled
from dsmini.diagnosis.decoding.steps import Point, filled_cache
from dsmini.diagnosis.decoding.subject import DecodedModel, DecodingSubject, checked_context
from dsmini.diagnosis.decoding.work import DECODING
from dsmini.diagnosis.diagnosis import LookPlan, diagnose
from dsmini.diagnosis.evidence import evidence
from dsmini.diagnosis.record import record_of
from dsmini.diagnosis.verdict import Outcome
from dsmini.inference.fused.decoder import Decoder
from dsmini.inference.speculative import Drafter
from dsmini.nn import MLA, Cache, FeedForward, MoE, mla
from dsmini.report import Report, pick, values
from tests.conftest import Clock
from tests.diagnosis.conftest import MODEL, decoding_subject
from tests.helpers.configs import released
from tests.helpers.questions import invented_rates

LONG = dataclasses.replace(MODEL, max_seq_len=160)
BY_NAME = {each.name: each for each in INTERVENTIONS}


def logits(subject: DecodingSubject) -> Tensor:
    """Return the logits of a fixed text, without a cache."""
    return subject.model(torch.arange(20).view(2, 10) % 256).detach()


def rows(subject: DecodingSubject) -> list[Tensor]:
    return [store.data[:, : subject.context].clone() for store in subject.cache.stores]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few steps be timed together, and two threads have twice the products and 1.25 times the memory of one."""
    monkeypatch.setattr(stepping, "TURN", 0.001)
    monkeypatch.setattr(predictions, "TURNS", 1)
    monkeypatch.setattr(predictions, "MOST_TURNS", 1)
    monkeypatch.setattr(scaling, "matmul_rate", lambda *_: 1e9 * torch.get_num_threads())
    monkeypatch.setattr(scaling, "read_bandwidth", lambda *_: 1e9 * (3 + torch.get_num_threads()))


@pytest.fixture
def paid(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], None]:
    """Return what lets the clock move by the decoding steps alone, each by its number of cached tokens."""

    def pay(seconds: Callable[[int], float]) -> None:
        real = Decoder.states

        def states(decoder: Decoder, tokens: Tensor, cache: Cache, lengths: Tensor | None = None) -> Any:
            clock.pay(seconds(int(cache.lengths.max())))
            return real(decoder, tokens, cache, lengths)

        monkeypatch.setattr(Decoder, "states", states)

    return pay


# --- steps


def test_cache_is_the_same_after_a_step(decoding: DecodingSubject) -> None:
    before, lengths = rows(decoding), decoding.cache.lengths.clone()
    for _ in range(3):
        assert decoding.step().seconds > 0
    assert torch.equal(decoding.cache.lengths, lengths) and lengths.tolist() == [64, 64]
    assert all(map(torch.equal, rows(decoding), before))


def test_text_is_what_was_read() -> None:
    """Check that each sequence has its own piece of the text, and that a short one is repeated."""
    model = Transformer(LONG).eval()
    text = torch.arange(10)
    found = DecodingSubject(DecodedModel(model=model, trained=True, text=text, source=""), batch=2, context=8)
    assert found.rows == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 1, 2, 3, 4, 5]]
    cache = model.new_cache(2, 8)
    with torch.no_grad():
        model(torch.tensor(found.rows), cache=cache)
    for got, want in zip(rows(found), cache.stores, strict=True):
        torch.testing.assert_close(got, want.data)


def test_point_has_random_rows_where_none_fit(decoding: DecodingSubject) -> None:
    longer = filled_cache(decoding.model, decoding.point.at(100))
    same = filled_cache(decoding.model, decoding.point)
    assert longer.lengths.tolist() == [100, 100] and longer.stores[0].data[:, :100].std() > 0.5
    assert torch.equal(same.stores[0].data[:, :64], decoding.cache.stores[0].data[:, :64])
    assert filled_cache(decoding.model, Point(batch=3, context=5)).batch_size == 3


def test_context_leaves_room_for_a_token() -> None:
    config = dataclasses.replace(MODEL, max_seq_len=256)
    assert checked_context(config, None) == 192 and checked_context(config, 255) == 255
    assert checked_context(dataclasses.replace(MODEL, max_seq_len=100_000), None) == 4096
    for context in (0, 256):
        with pytest.raises(ValueError, match=f"--context {context} is not from 1 to 255"):
            checked_context(config, context)


# --- alternatives


@pytest.mark.parametrize("name", BY_NAME)
def test_alternative_leaves_the_subject_as_it_is(decoding: DecodingSubject, name: str) -> None:
    """Check modules, weights, logits, cache and threads."""
    before, modules, kept = logits(decoding), list(decoding.model.modules()), rows(decoding)
    threads, config = torch.get_num_threads(), decoding.config
    with BY_NAME[name].apply(decoding) as step:
        step(0.0)
    assert torch.equal(logits(decoding), before) and list(decoding.model.modules()) == modules
    assert torch.get_num_threads() == threads and decoding.config is config
    assert decoding.cache.lengths.tolist() == [64, 64] and decoding.cache.form == "auto"
    assert all(map(torch.equal, rows(decoding), kept))


def test_alternatives_decode_what_they_say(decoding: DecodingSubject) -> None:
    """Check the kinds of layers and the dtypes of each variant, and that the rest is shared."""
    model = decoding.model
    mha, dense = MHA.change(model), ALTERNATIVES["dense_active"].instead.change(model)
    heads = MODEL.n_heads * (MODEL.qk_nope_head_dim + MODEL.v_head_dim)
    assert filled_cache(mha, decoding.point).stores[0].data.shape[2] == heads
    assert mha.embed is model.embed and mha.layers[1].ffn is model.layers[1].ffn
    assert isinstance(model.layers[1].ffn, MoE) and isinstance(model.layers[0].attn, MLA)
    assert isinstance(dense.layers[1].ffn, FeedForward) and dense.layers[1].ffn.w1.weight.shape == (3 * 16, 32)
    assert dense.layers[0].ffn is model.layers[0].ffn
    assert BFLOAT16.change(model).embed.weight.dtype == torch.bfloat16
    assert torch.float8_e4m3fn in {t.dtype for t in FP8.change(model).layers.state_dict().values()}
    assert torch.float8_e4m3fn not in {t.dtype for t in model.state_dict().values()}
    assert model.get_parameter("layers.0.attn.wo.weight").dtype == torch.float32 == model.embed.weight.dtype
    free = ALTERNATIVES["free_cache"].instead.point(decoding.point)
    assert (free.context, free.batch) == (1, 2)
    uniform, tokens = ALTERNATIVES["uniform_routing"].instead.change(model), torch.arange(8).view(2, 4)
    with torch.no_grad():
        found, own = (each.states(tokens).routing[0].counts.tolist() for each in (uniform, model))
    assert found == [2] * 8 and own != [2] * 8


@pytest.mark.parametrize(("arm", "form"), [(EXPANDED, "expanded"), (ALTERNATIVES["expanded_mla"].of, "absorbed")])
def test_forms_are_those_asked_for(
    decoding: DecodingSubject, arm: Arm, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the forms of both layers, and that the token is the subject's: rows and tokens are shared."""
    seen: list[str] = []
    real = mla.form_of

    def form_of(layer: MLA, queries: int, cache: Any) -> Any:
        seen.append(real(layer, queries, cache))
        return seen[-1]

    run, want = arm.steps(decoding.model, decoding.point), decoding._run()
    monkeypatch.setattr(mla, "form_of", form_of)
    got: Any = run()
    assert seen == [form] * 2 and isinstance(want, Tensor) and torch.equal(got, want)


def test_plain_step_changes_by_the_ratio_of_two_arms() -> None:
    now, then = Arm(), Arm(dtype="fp8")
    seconds = {now: 3.0, then: 5.0}
    pair = dataclasses.replace(ALTERNATIVES["expanded_mla"], instead=then, of=now)
    assert pair.seconds(0.6, seconds.__getitem__) == pytest.approx(1.0)
    assert dataclasses.replace(pair, of=None).seconds(1.0, seconds.__getitem__, tokens=2.0) == 2.5


# changes of the model, sequences, cached tokens; words of the reason why an alternative is not tried, "" for none
BASELINE: dict[str, Any] = {"attention": "mha", "n_dense_layers": 2, "n_mtp_layers": 0}
REASONS: list[tuple[dict[str, Any], int, int, str, str]] = [
    ({}, 1, 64, "uniform_routing", "try --batch 8"),
    ({}, 2, 64, "uniform_routing", ""),
    ({"max_seq_len": 65}, 1, 64, "drafts", "no room for a guess"),
    ({"max_seq_len": 8}, 1, 1, "free_cache", "only 1 cached token"),
    (BASELINE, 1, 64, "expanded_mla", "only MLA has two forms"),
    (BASELINE, 1, 64, "mha_baseline", "already"),
    (BASELINE, 1, 64, "dense_active", "no routed experts"),
    (BASELINE, 1, 64, "uniform_routing", "no routed experts"),
    (BASELINE, 1, 64, "drafts", "no multi-token prediction"),
    ({}, 1, 64, "fp8_weights", "no kernels serve"),
]


@pytest.mark.parametrize(("changes", "batch", "context", "name", "words"), REASONS)
def test_reasons_not_to_try(changes: dict[str, Any], batch: int, context: int, name: str, words: str) -> None:
    subject = decoding_subject(dataclasses.replace(LONG, **changes), batch, context)
    with ops.use("eager"):
        why = BY_NAME[name].why_not(subject)
    assert words in why if words and why else why is None and not words


# --- guesses


def test_wilson_interval_holds_at_the_ends() -> None:
    """Compare with Brown, Cai and DasGupta 2001: 0 of 10 is below 0.2775, 10 of 10 above 0.7225."""
    none, all_of = (Acceptance(drafted=10, accepted=n, tokens_per_step=1.0) for n in (0, 10))
    assert none.interval == (0.0, pytest.approx(0.2775, abs=1e-3))
    assert all_of.interval == (pytest.approx(0.7225, abs=1e-3), 1.0)
    assert Acceptance(drafted=0, accepted=0, tokens_per_step=1.0).interval[0] == 0.0


def test_model_of_one_token_accepts_all_guesses() -> None:
    """Check a head that always makes the same token: every guess is right, so that a step makes two tokens."""
    model = Transformer(LONG, compute_dtype=torch.float32).eval()
    with torch.no_grad():
        model.head.weight.zero_()
    found = acceptance(model, [[1, 2, 3], [4, 5]])
    assert found.accepted == found.drafted > 0 and found.tokens_per_step == 2.0
    finding = acceptance_finding(found, trained=True)
    assert finding.value == 1.0 and "2.00" in finding.sentence and "random" not in finding.sentence
    assert "random" in acceptance_finding(found, trained=False).sentence and not finding.is_fault


def test_guessing_step_is_the_same_work_each_time(decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that cache and multi-token prediction begin each step where they began the first."""
    seen: list[Any] = []
    real = Drafter.guess

    def guess(self: Drafter, last: Any, live: Any, known: Any) -> Any:
        seen.append((self.cache.lengths.tolist(), self.mtp.lengths.tolist(), [t.clone() for t in self.mtp.last]))
        return real(self, last, live, known)

    monkeypatch.setattr(Drafter, "guess", guess)
    run = guessing_steps(decoding.model, decoding.point)
    made: list[Any] = [run() for _ in range(3)]
    assert made[0] == made[1] == made[2] and [len(row) for row in made[0]]
    assert [each[:2] for each in seen] == [([64, 64], [64, 64])] * 3
    assert all(torch.equal(a, b) for each in seen for a, b in zip(each[2], seen[0][2], strict=True))


def test_time_of_a_token_is_shared_by_accepted_guesses(
    decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Acceptance(drafted=10, accepted=6, tokens_per_step=1.6)
    monkeypatch.setitem(vars(decoding), "acceptance", found)
    monkeypatch.setattr(decoding, "seconds", lambda arm: 0.013)
    with BY_NAME["drafts"].apply(decoding) as step:
        assert step(0.010) == pytest.approx(0.013 / 1.6)
    assert tokens_of(decoding, "free_cache") == 1.0 and ALTERNATIVES["drafts"].of is None


# --- predictions


def test_free_cache_is_predicted_to_gain_on_a_long_context_alone() -> None:
    """Check the prediction on 8,000 cached tokens and on 2, where a narrow model took 0.1 us a token."""
    config = dataclasses.replace(MODEL, max_seq_len=8192)
    gains = {}
    for context in (2, 8000):
        subject = decoding_subject(config, context=2)
        subject.context, subject.narrow[PLAIN, 1] = context, Narrow(beyond=0.0, slope=1e-7)
        found = predict(subject, ["free_cache"], invented_rates())
        gains[context] = found.gain("free_cache") or 0.0
    assert abs(gains[2]) < 0.02 and gains[8000] > 0.3, gains


def test_every_alternative_is_predicted(decoding: DecodingSubject) -> None:
    """Check that each has a prediction, and that nothing of the model changes."""
    before = logits(decoding)
    found = predict(decoding, [*ALTERNATIVES, "all_threads"], invented_rates())
    assert found.free.keys() == {*ALTERNATIVES, "all_threads"} and min(found.free.values()) > 0
    assert found.forecast.seconds == found.plain and torch.equal(logits(decoding), before)


def test_threads_scale_products_and_memory_apart() -> None:
    classes = {"linear": 4.0, "experts": 2.0, "calls": 1.0, "move": 0.5}
    cold = {"linear": 0.0, "experts": 1.0}
    assert scaled(classes, cold, (10.0, 4.0), (20.0, 5.0)) == pytest.approx(2.0 + 2.0 * 4 / 5 + 1.0 + 0.5)


def test_narrow_model_tells_seconds_of_a_cached_token(decoding: DecodingSubject, paid: Any) -> None:
    """Check a slope of 0.1 ms a token, and that it stands in the forecast."""
    paid(lambda cached: 1e-4 * cached)
    prices = Prices(decoding, invented_rates())
    found = prices.forecast(PLAIN)
    assert decoding.narrow[PLAIN, 2].slope == pytest.approx(1e-4)
    assert found.by_class["cached tokens"] == pytest.approx(1e-4 * (64 - prices.low))
    assert found.seconds > 64e-4


@pytest.mark.parametrize("slow", [True, False], ids=["by the token", "always"])
def test_slowed_cached_attention_is_found(paid: Any, slow: bool) -> None:
    """Check that steps which take longer for each cached token are named, and not those which always do."""
    paid(lambda cached: 2e-4 * cached if slow else 0.012)
    plan = LookPlan(rounds=8, least=8, interventions=[BY_NAME["free_cache"]])
    found = diagnose(decoding_subject(LONG), plan, None, work=DECODING)
    assert (found.gains["free_cache"].low > 0.5) == slow
    assert (found.verdict.outcome is Outcome.BINDS and found.named == "Machine") == slow
    assert found.not_tried["replay"].startswith("decoding waits for no data")
    assert record_of(found)["gains"]["free_cache"]["axis"] == "Machine"


# --- evidence


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MOST_TURNS", 1)
    monkeypatch.setattr(evidence, "LEAST_TURNS", 1)
    monkeypatch.setattr(batches, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(context_slope, "SHARES", (0.25, 1.0))


SECTIONS: list[Any] = [pytest.param(each, True, id=each.name) for each in DECODING_EVIDENCE]
SECTIONS += [pytest.param(e, False, id=f"{e.name} without rates") for e in DECODING_EVIDENCE if not e.needs_rates]


@pytest.mark.parametrize(("each", "with_rates"), SECTIONS)
def test_section_of_each(decoding: DecodingSubject, quick: None, each: evidence.Evidence, with_rates: bool) -> None:
    """Check figures, finding and JSON, and that cache and threads are as before."""
    threads, lengths = torch.get_num_threads(), decoding.cache.lengths.tolist()
    if (why := each.why_not(decoding)) and each.name != "threads":
        pytest.skip(why)
    section = each.run(decoding, invented_rates() if with_rates else None, 0.0)
    assert section.name == each.name and section.finding.endswith(".") and section.figures and section.plots[0].series
    assert any(f.predicted is not None for f in section.figures) == with_rates
    assert all(json.loads(line) for line in Report(title="A", sections=[section]).json_lines())
    assert torch.get_num_threads() == threads and decoding.cache.lengths.tolist() == lengths


def test_slopes_of_all_forms(decoding: DecodingSubject, quick: None) -> None:
    slopes = {"absorbed": 1e-7, "expanded": 2e-6, "MHA": 3e-7}
    for arm, slope in zip((PLAIN, EXPANDED, MHA), slopes.values(), strict=True):
        decoding.narrow[arm, decoding.batch] = Narrow(beyond=0.0, slope=slope)
    section = context_slope.run(decoding, invented_rates(), 0.0)
    predicted = {f.case["form"]: f.predicted or 0.0 for f in pick(section.figures, "seconds_per_cached_token")}
    assert predicted == pytest.approx(slopes) and [*predicted] == [*slopes]
    assert len(values(section.figures, "step")) == 6
    points = [10, 100, 1000]
    assert context_slope.slope_of(points, [0.2 + 3e-4 * n for n in points]) == pytest.approx(3e-4)


@pytest.mark.parametrize(("form", "pair"), [("absorbed", 512 + 64 + 512), ("expanded", 512 * 256 + 128 + 64 + 128)])
def test_least_seconds_of_v3_are_its_published_bytes(form: Any, pair: int) -> None:
    """Check 70,272 bytes a token (DeepSeek-V2 report's table 1 at V3's sizes) at a gigabyte a second."""
    config: ModelConfig = released("deepseek-v3")
    roofs = dataclasses.replace(invented_rates().roofs, bandwidth=1e9, peak={"bfloat16": 1e12})
    memory, arithmetic = context_slope.least_seconds(config, form, 1, "bfloat16", roofs)
    assert arithmetic == pytest.approx(61 * 2 * 128 * pair * 1e-12)
    if form == "absorbed":
        assert memory == pytest.approx(70_272e-9)


def test_ridge_is_where_a_weight_has_enough_rows() -> None:
    rates = invented_rates()
    rates = dataclasses.replace(rates, roofs=dataclasses.replace(rates.roofs, bandwidth=1e10, peak={"bfloat16": 1e11}))
    assert batches.ridge_batch(2, rates, "bfloat16") == 10.0


def test_batches_end_where_memory_does(decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "memory_bytes", lambda _: 1 << 40)
    assert batches.batches_of(decoding) == [1, 2, 4, 8, 16, 32]
    monkeypatch.setattr(batches, "memory_bytes", lambda _: 1)
    assert batches.batches_of(decoding) == [1, 2], "the subject's own stays"
