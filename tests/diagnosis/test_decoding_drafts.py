"""Guesses of multi-token prediction: how many are accepted, and the time of a step that makes them."""

import dataclasses
from typing import Any

import pytest
import torch

from dsmini import Transformer
from dsmini.diagnosis.decoding.alternatives import ALTERNATIVES, INTERVENTIONS, tokens_of
from dsmini.diagnosis.decoding.drafts import Acceptance, acceptance, acceptance_finding, guessing_steps
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.inference.speculative import Drafter
from tests.diagnosis.conftest import MODEL


def test_wilson_interval_holds_at_the_ends() -> None:
    """Compare with Brown, Cai and DasGupta 2001: 0 of 10 is below 0.2775, 10 of 10 above 0.7225."""
    none, all_of = (Acceptance(drafted=10, accepted=n, tokens_per_step=1.0) for n in (0, 10))
    assert none.interval == (0.0, pytest.approx(0.2775, abs=1e-3))
    assert all_of.interval == (pytest.approx(0.7225, abs=1e-3), 1.0)
    assert Acceptance(drafted=0, accepted=0, tokens_per_step=1.0).interval[0] == 0.0


def test_model_of_one_token_accepts_all_guesses() -> None:
    """Check a head that always makes the same token: every guess is right, so that a step makes two tokens."""
    model = Transformer(dataclasses.replace(MODEL, max_seq_len=160), compute_dtype=torch.float32).eval()
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
    made = [run() for _ in range(3)]
    assert made[0] == made[1] == made[2] and [len(row) for row in made[0]]  # pyright: ignore
    assert [each[:2] for each in seen] == [([64, 64], [64, 64])] * 3
    assert all(torch.equal(a, b) for each in seen for a, b in zip(each[2], seen[0][2], strict=True))


def test_time_of_a_token_is_shared_by_accepted_guesses(
    decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Acceptance(drafted=10, accepted=6, tokens_per_step=1.6)
    monkeypatch.setitem(vars(decoding), "acceptance", found)
    monkeypatch.setattr(decoding, "seconds", lambda arm: 0.013)
    drafts = next(each for each in INTERVENTIONS if each.name == "drafts")
    with drafts.apply(decoding) as step:
        assert step(0.010) == pytest.approx(0.013 / 1.6)
    assert tokens_of(decoding, "free_cache") == 1.0 and ALTERNATIVES["drafts"].of is None
