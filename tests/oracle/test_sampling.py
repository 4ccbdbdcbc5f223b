"""Distributions equal those of transformers' logits processors."""

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsmini.inference.sampling import Sampling

# in the order in which transformers applies them
THEIRS: dict[str, Any] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.4},
        {"temperature": 1.0, "repetition_penalty": 0.7, "top_k": 300},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_distributions(options: dict[str, Any]) -> None:
    logits = 3 * torch.randn(16, 129)
    tokens = torch.randint(0, 129, (16, 30))
    seen = torch.zeros(16, 129, dtype=torch.bool).scatter_(1, tokens, True)
    theirs = LogitsProcessorList([kind(options[name]) for name, kind in THEIRS.items() if name in options])
    want = theirs(tokens, logits.clone()).softmax(-1)  # pyright: ignore[reportArgumentType]
    got = Sampling(**options).probabilities(logits, seen)
    assert torch.equal(got > 0, want > 0)
    assert torch.allclose(got, want, rtol=1e-5, atol=0)
