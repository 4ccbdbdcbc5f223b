"""Decoding as a subject: steps that are the same work, alternatives that do what they say, predictions, a verdict."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.diagnosis.decoding import steps as stepping
from dsmini.diagnosis.decoding.alternatives import ALTERNATIVES, BFLOAT16, EXPANDED, FP8, INTERVENTIONS, MHA
from dsmini.diagnosis.decoding.arm import PLAIN, Arm, Narrow
from dsmini.diagnosis.decoding.predictions import Prices, predict, scaled
from dsmini.diagnosis.decoding.steps import Point, filled_cache
from dsmini.diagnosis.decoding.subject import DecodedModel, DecodingSubject, checked_context
from dsmini.diagnosis.decoding.work import DECODING
from dsmini.diagnosis.diagnosis import LookPlan, diagnose
from dsmini.diagnosis.record import record_of
from dsmini.diagnosis.verdict import Outcome
from dsmini.inference.decoding import Decoder
from dsmini.nn import MLA, Cache, FeedForward, MoE
from tests.diagnosis.conftest import MODEL
from tests.helpers.questions import invented_rates

BY_NAME = {each.name: each for each in INTERVENTIONS}


def subject_of(config: ModelConfig, batch: int = 1, context: int = 64) -> DecodingSubject:
    torch.manual_seed(0)
    model = Transformer(config, compute_dtype=torch.float32).eval()
    return DecodingSubject(DecodedModel(model=model, trained=False, text=None, source=""), batch, context)


def logits(subject: DecodingSubject) -> Tensor:
    """Return the logits of a fixed text, without a cache."""
    return subject.model(torch.arange(20).view(2, 10) % 256).detach()


def rows(subject: DecodingSubject) -> list[Tensor]:
    return [store.data[:, : subject.context].clone() for store in subject.cache.stores]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few steps be timed together."""
    monkeypatch.setattr(stepping, "TURN", 0.002)


def test_cache_is_the_same_after_a_step(decoding: DecodingSubject) -> None:
    before, lengths = rows(decoding), decoding.cache.lengths.clone()
    for _ in range(3):
        assert decoding.step().seconds > 0
    assert torch.equal(decoding.cache.lengths, lengths) and lengths.tolist() == [64, 64]
    for got, want in zip(rows(decoding), before, strict=True):
        assert torch.equal(got, want)


def test_text_is_what_was_read() -> None:
    """Check that each sequence has its own piece of the text, and that a short one is repeated."""
    model = Transformer(dataclasses.replace(MODEL, max_seq_len=160)).eval()
    text = torch.arange(10)
    found = DecodingSubject(DecodedModel(model=model, trained=True, text=text, source=""), batch=2, context=8)
    assert found.rows == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 1, 2, 3, 4, 5]]
    cache = model.new_cache(2, 8)
    with torch.no_grad():
        model(torch.tensor(found.rows), cache=cache)
    for got, want in zip(rows(found), cache.stores, strict=True):
        torch.testing.assert_close(got, want.data)


@pytest.mark.parametrize("name", BY_NAME)
def test_intervention_leaves_the_subject_as_it_is(decoding: DecodingSubject, short: None, name: str) -> None:
    """Check modules, weights, logits, cache and threads."""
    before, modules, kept = logits(decoding), list(decoding.model.modules()), rows(decoding)
    threads, config = torch.get_num_threads(), decoding.config
    with BY_NAME[name].apply(decoding) as step:
        step(0.0)
        step(0.0)
    assert torch.equal(logits(decoding), before) and list(decoding.model.modules()) == modules
    assert torch.get_num_threads() == threads and decoding.config is config
    assert decoding.cache.lengths.tolist() == [64, 64] and decoding.cache.form == "auto"
    for got, want in zip(rows(decoding), kept, strict=True):
        assert torch.equal(got, want)


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


def test_uniform_routing_visits_experts_in_turn(decoding: DecodingSubject) -> None:
    variant = ALTERNATIVES["uniform_routing"].instead.change(decoding.model)
    with torch.no_grad():
        found = variant.states(torch.arange(8).view(2, 4)).routing[0]
        own = decoding.model.states(torch.arange(8).view(2, 4)).routing[0]
    assert found.counts.tolist() == [2] * 8 and own.counts.tolist() != [2] * 8


@pytest.mark.parametrize(("arm", "form"), [(EXPANDED, "expanded"), (ALTERNATIVES["expanded_mla"].of, "absorbed")])
def test_forms_are_those_asked_for(
    decoding: DecodingSubject, arm: Arm, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = MLA.form_for

    def form_for(self: MLA, queries: int, past: Any) -> Any:
        seen.append(real(self, queries, past))
        return seen[-1]

    run = arm.steps(decoding.model, decoding.point)
    monkeypatch.setattr(MLA, "form_for", form_for)
    run()
    assert seen == [form] * 2


def test_all_arms_choose_the_same_token(decoding: DecodingSubject) -> None:
    """Check that arms which only compute in another way decode what the subject does: rows and tokens are shared."""
    want = decoding._run()
    assert isinstance(want, Tensor)
    for arm in (PLAIN, EXPANDED, ALTERNATIVES["expanded_mla"].of):
        assert arm is not None
        got: Any = arm.steps(decoding.model, decoding.point)()
        assert torch.equal(got, want)


def test_plain_step_changes_by_the_ratio_of_two_arms() -> None:
    now, then = Arm(), Arm(dtype="fp8")
    seconds = {now: 3.0, then: 5.0}
    pair = dataclasses.replace(ALTERNATIVES["expanded_mla"], instead=then, of=now)
    assert pair.seconds(0.6, seconds.__getitem__) == pytest.approx(1.0)
    assert dataclasses.replace(pair, of=None).seconds(1.0, seconds.__getitem__, tokens=2.0) == 2.5


def test_free_cache_is_predicted_to_gain_on_a_long_context_alone() -> None:
    """Check the prediction on 8,000 cached tokens and on 2, where a narrow model took 0.1 us a token."""
    config = dataclasses.replace(MODEL, max_seq_len=8192)
    gains = {}
    for context in (2, 8000):
        subject = subject_of(config, context=2)
        subject.context, subject.narrow[PLAIN, 1] = context, Narrow(beyond=0.0, slope=1e-7)
        found = predict(subject, ["free_cache"], invented_rates())
        gains[context] = found.gain("free_cache") or 0.0
    assert abs(gains[2]) < 0.02 and gains[8000] > 0.3, gains


def test_every_alternative_is_predicted(decoding: DecodingSubject) -> None:
    """Check that each has a prediction, that a fast machine is not asked, and that nothing of the model changes."""
    before = logits(decoding)
    found = predict(decoding, [*ALTERNATIVES, "all_threads"], invented_rates())
    assert found.free.keys() == {*ALTERNATIVES, "all_threads"} and min(found.free.values()) > 0
    assert found.forecast.seconds == found.plain and torch.equal(logits(decoding), before)


def test_threads_scale_products_and_memory_apart() -> None:
    classes = {"linear": 4.0, "experts": 2.0, "calls": 1.0, "move": 0.5}
    cold = {"linear": 0.0, "experts": 1.0}
    assert scaled(classes, cold, (10.0, 4.0), (20.0, 5.0)) == pytest.approx(2.0 + 2.0 * 4 / 5 + 1.0 + 0.5)


def sleeping(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
    """Let every decoding step sleep by the number of cached tokens."""
    real = Decoder.states

    def states(self: Decoder, tokens: Tensor, cache: Cache, lengths: Tensor | None = None) -> Any:
        time.sleep(seconds(int(cache.lengths.max())))
        return real(self, tokens, cache, lengths)

    monkeypatch.setattr(Decoder, "states", states)


def test_narrow_model_tells_seconds_of_a_cached_token(
    decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    """Check a slope of 0.1 ms a token, of which sleep may take more, and that it stands in the forecast."""
    sleeping(monkeypatch, lambda cached: 1e-4 * cached)
    prices = Prices(decoding, invented_rates())
    found = prices.forecast(PLAIN)
    assert 0.9e-4 < decoding.narrow[PLAIN, 2].slope < 1.5e-4
    assert found.seconds > 64e-4 and found.by_class["cached tokens"] == pytest.approx(
        decoding.narrow[PLAIN, 2].slope * (64 - prices.low)
    )


@pytest.mark.parametrize("slow", [True, False], ids=["by the token", "always"])
def test_slowed_cached_attention_is_found(monkeypatch: pytest.MonkeyPatch, short: None, slow: bool) -> None:
    """Check that steps which sleep for each cached token are named, and not those which always sleep as long."""
    sleeping(monkeypatch, lambda cached: 2e-4 * cached if slow else 0.012)
    subject = subject_of(dataclasses.replace(MODEL, max_seq_len=160))
    plan = LookPlan(rounds=8, least=8, interventions=[BY_NAME["free_cache"]])
    found = diagnose(subject, plan, None, work=DECODING)
    assert (found.gains["free_cache"].low > 0.5) == slow
    assert (found.verdict.outcome is Outcome.BINDS and found.named == "Machine") == slow
    assert found.not_tried["replay"].startswith("decoding waits for no data")
    assert record_of(found)["gains"]["free_cache"]["axis"] == "Machine"


def test_reasons_not_to_try(decoding: DecodingSubject) -> None:
    one = subject_of(dataclasses.replace(MODEL, max_seq_len=160))
    assert "try --batch 8" in (BY_NAME["uniform_routing"].why_not(one) or "")
    assert BY_NAME["uniform_routing"].why_not(decoding) is None
    full = subject_of(dataclasses.replace(MODEL, max_seq_len=65))
    assert "no room for a guess" in (BY_NAME["drafts"].why_not(full) or "")
    assert "only 1 cached token" in (BY_NAME["free_cache"].why_not(subject_of(MODEL, context=1)) or "")
    plain = dataclasses.replace(MODEL, max_seq_len=160, attention="mha", n_dense_layers=2, n_mtp_layers=0)
    mha = subject_of(plain)
    for name, words in (
        ("expanded_mla", "only MLA has two forms"),
        ("mha_baseline", "already"),
        ("dense_active", "no routed experts"),
        ("uniform_routing", "no routed experts"),
        ("drafts", "no multi-token prediction"),
    ):
        assert words in (BY_NAME[name].why_not(mha) or ""), name
    with ops.use("eager"):
        assert "no kernels serve" in (BY_NAME["fp8_weights"].why_not(one) or "")
    assert BFLOAT16.change(one.model).embed.weight.dtype == torch.bfloat16


def test_context_leaves_room_for_a_token() -> None:
    config = dataclasses.replace(MODEL, max_seq_len=256)
    assert checked_context(config, None) == 192 and checked_context(config, 255) == 255
    assert checked_context(dataclasses.replace(MODEL, max_seq_len=100_000), None) == 4096
    for context in (0, 256):
        with pytest.raises(ValueError, match=f"--context {context} is not from 1 to 255"):
            checked_context(config, context)


def test_point_has_random_rows_where_none_fit(decoding: DecodingSubject) -> None:
    longer = filled_cache(decoding.model, decoding.point.at(100))
    same = filled_cache(decoding.model, decoding.point)
    assert longer.lengths.tolist() == [100, 100] and longer.stores[0].data[:, :100].std() > 0.5
    assert torch.equal(same.stores[0].data[:, :64], decoding.cache.stores[0].data[:, :64])
    assert filled_cache(decoding.model, Point(batch=3, context=5)).batch_size == 3
