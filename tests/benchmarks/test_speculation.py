"""What guessing ahead gains, by counted agreement and in turns."""

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.questions import mtp
from benchmarks.questions.mtp import expected_acceptance, in_turns, tokens_per_step
from dsmini import Transformer
from tests.conftest import randomise
from tests.helpers.questions import TINY


def test_tokens_of_a_step() -> None:
    assert tokens_per_step([]) == 1
    assert tokens_per_step([0.8]) == 1.8
    assert tokens_per_step([0.5, 0.5, 0.5]) == 1.875
    assert tokens_per_step([0.0, 1.0]) == 1


def test_expected_acceptance_of_guesses_that_are_the_trunks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A depth that knows what the trunk will say of the token is always kept; one that is late is not."""
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=2)))
    tokens = torch.randint(0, 256, (2, 32))
    out = model.run(tokens, mtp=True)
    right = [out.logits[:, 1:], out.logits[:, 1:-1]]  # the second is a token late
    monkeypatch.setattr(model, "run", lambda *_, **__: out._replace(mtp_logits=right))
    for temperature in (0.0, 0.8):
        first, second = expected_acceptance(model, tokens, temperature)
        assert first == pytest.approx(1)
        assert second < 0.9


def test_an_unequal_continuation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1))).eval()
    generate = mtp.generate

    def wrong(*args: Any, speculative: bool, **more: Any) -> Any:
        done = generate(*args, speculative=speculative, **more)
        return done._replace(tokens=done.tokens + speculative)

    in_turns(model, [torch.tensor([1, 2])], 0.0, 3)
    monkeypatch.setattr(mtp, "generate", wrong)
    with pytest.raises(AssertionError, match="changed the greedy continuation"):
        in_turns(model, [torch.tensor([1, 2])], 0.0, 3)
