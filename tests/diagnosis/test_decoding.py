"""Decoding as a subject: steps that are the same work, alternatives that do what they say, predictions, evidence."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, accounting, ops
from dsmini.diagnosis import decoding as module
from dsmini.diagnosis import evidence
from dsmini.diagnosis.arms import Arm, Comparison, predict
from dsmini.diagnosis.decoding import (
    PLAIN,
    VARIANTS,
    Acceptance,
    DecodingSubject,
    Point,
    accepted_guesses,
    guessing_steps,
)
from dsmini.diagnosis.diagnosis import Plan, diagnose
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.inference.fused import Decoder
from dsmini.inference.speculative import Drafter
from dsmini.measure.price import Prices
from dsmini.measure.turns import Turns
from dsmini.measure.workloads import decoding_step
from dsmini.report import Report
from tests.conftest import Clock
from tests.diagnosis.conftest import MODEL, QUIET, SIZES, arm_of, decoding_subject
from tests.helpers.configs import V4
from tests.helpers.questions import InventedPrices, invented_roofs

NAMES = (*VARIANTS, "all_threads")


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


@pytest.mark.parametrize("name", ["plain", *NAMES])
def test_arm_leaves_the_subject_as_it_is(decoding: DecodingSubject, name: str) -> None:
    def run() -> None:
        with arm_of(decoding, name).apply() as step:
            assert min(step(0.0) for _ in range(2)) > 0

    check_unchanged(decoding, run)


def test_variants_decode_the_rows_and_tokens_of_the_subject(decoding: DecodingSubject) -> None:
    """Check that a variant of the same weights chooses the experts that the subject's own step chooses."""
    own = decoding_step(decoding.model, decoding.cache, decoding.tokens)
    (want,), (got,) = own(), PLAIN.steps(decoding.model, point_of(decoding))()
    assert torch.equal(got.indices, want.indices) and torch.equal(got.weights, want.weights)


def test_variant_of_dense_layers_alone_has_no_prediction() -> None:
    model = Transformer(replace(MODEL, n_dense_layers=MODEL.n_layers + MODEL.n_mtp_layers))
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
    model = Transformer(replace(MODEL, max_seq_len=10**9))
    with pytest.raises(ValueError, match=r"^a cache of 1024 x 1000000000 tokens needs "):
        DecodingSubject(model, batch=1024, context=10**9 - 1)


def test_batches_to_try_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = DecodingSubject(Transformer(MODEL).eval(), batch=2)
    assert subject.batch_sizes() == [2, *(n for n in module.BATCHES if n != 2)]
    row = accounting.kv_bytes_per_token(MODEL, 4) * subject.context
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
def test_reasons_not_to_try(changes: dict[str, Any], context: int, name: str, words: str) -> None:
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
    assert found.keys() == {"plain", *NAMES} and min(found.values()) > 0


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
