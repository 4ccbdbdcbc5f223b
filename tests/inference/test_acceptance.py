"""The acceptance rule of speculative decoding, against exact probabilities, finely enough to notice an error of 2 %.

Frequencies of n draws with probability p have the standard deviation sqrt(n p (1 - p)). An acceptance that is wrong by
2 % moves a token of probability 0.9 by 0.018, which is 8 standard deviations at n = 20,000.
"""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from dsmini.inference.sampling import draw
from dsmini.inference.speculative import accept, accept_greedy

N = 20_000
SIGMAS = 4.5
"""Largest deviation in standard deviations; a right rule goes over it once in 150,000 comparisons."""
# p of the model after no, one and two guesses, and q of the two guesses
CASES = {
    "q above p": ([[0.9, 0.1], [0.85, 0.15], [0.5, 0.5]], [[0.99, 0.01], [0.95, 0.05]]),
    "q below p": ([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]),
    "four tokens": (
        [[0.05, 0.8, 0.1, 0.05], [0.4, 0.3, 0.2, 0.1], [0.25] * 4],
        [[0.1, 0.88, 0.02, 0.0], [0.1, 0.1, 0.1, 0.7]],
    ),
}


def check(got: int, n: int, p: float, case: str) -> None:
    deviation = abs(got - n * p)
    assert deviation <= SIGMAS * math.sqrt(n * p * (1 - p)) + 1e-9, f"{case}: {got / n:.4f}, want {p:.4f}"


@pytest.mark.parametrize("case", CASES)
def test_tokens_follow_the_model_and_guesses_are_kept_as_often_as_possible(case: str) -> None:
    p, q = (torch.tensor(rows) for rows in CASES[case])
    generator = torch.Generator().manual_seed(0)
    guesses = torch.stack([draw(row.expand(N, -1), generator) for row in q], 1).tolist()
    rows: list[Tensor] = list(q)
    accepted = [accept(guess, rows, p, generator) for guess in guesses]
    at_depth = [[row for row in accepted if len(row) > i] for i in range(3)]
    # 1. each token is distributed as the model's, whatever was guessed
    for i, reached in enumerate(at_depth):
        counts = Counter(row[i] for row in reached)
        for token, probability in enumerate(p[i].tolist()):
            check(counts[token], len(reached), probability, f"token {token} at {i}")
    # 2. a guess is accepted with probability sum(min(p, q)), the most that is possible
    for i in range(2):
        rate = torch.minimum(p[i], q[i]).sum().item()
        check(len(at_depth[i + 1]), len(at_depth[i]), rate, f"acceptance at {i}")


@pytest.mark.parametrize(
    ("guesses", "likeliest", "want"),
    [([], [4], [4]), ([4], [4, 7], [4, 7]), ([5], [4, 7], [4]), ([4, 6, 9], [4, 7, 9, 1], [4, 7])],
)
def test_greedy_takes_guesses_up_to_the_first_other(guesses: list[int], likeliest: list[int], want: list[int]) -> None:
    assert accept_greedy(guesses, likeliest) == want
