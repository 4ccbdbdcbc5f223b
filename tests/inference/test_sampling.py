"""Drawing the next token: what each filter keeps, what is drawn and refused, and which guesses are accepted."""

import itertools
import math
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini.inference.sampling import Sampling, draw
from dsmini.inference.speculative import accept, accept_greedy
from tests.helpers.configs import refusal

# few levels, so that equal logits are common
LOGITS = st.lists(st.sampled_from([-8.0, -1.5, 0.0, 0.25, 1.0, 2.0, 7.0]), min_size=1, max_size=9)
SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-40, 0.3, 1.0, 5.0]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
)


def one(*logits: float) -> Tensor:
    return torch.tensor([logits])


def by_hand(sampling: Sampling, logits: list[float], seen: list[bool]) -> list[float]:
    """Compute the definition, one token at a time, the likeliest first and the lowest id among equals."""
    r, t = sampling.repetition_penalty, sampling.temperature
    logits = [(x / r if x > 0 else x * r) if s else x for x, s in zip(logits, seen, strict=True)]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = {i: math.exp((logits[i] - logits[order[0]]) / t) if t else float(i == order[0]) for i in order}
    kept = order[: sampling.top_k]
    if sampling.top_p is not None and sampling.top_p < 1:
        total = math.fsum(weights[i] for i in kept)
        need = next(n for n in itertools.count(1) if math.fsum(weights[i] for i in kept[:n]) / total >= sampling.top_p)
        kept = kept[:need]
    kept = [i for i in kept if weights[i] >= (sampling.min_p or 0)]
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@given(LOGITS, SAMPLING, st.integers(0, 511))
def test_the_distribution_is_the_definition_worked_by_hand(logits: list[float], sampling: Sampling, bits: int) -> None:
    seen = [bool(bits >> i & 1) for i in range(len(logits))]
    got = sampling.probabilities(torch.tensor([logits]), torch.tensor([seen]))
    assert got.dtype == torch.float32
    want = by_hand(sampling, logits, seen)
    # a sum that meets top_p exactly may fall on either side of it in floating point
    if sampling.top_p is None or not touches(sampling, logits, seen):
        assert got[0].tolist() == pytest.approx(want, rel=1e-5, abs=1e-12)


def touches(sampling: Sampling, logits: list[float], seen: list[bool]) -> bool:
    assert sampling.top_p is not None
    near = [p for d in (-1e-6, 1e-6) if 0 < (p := sampling.top_p + d) <= 1]
    names = ("temperature", "top_k", "min_p", "repetition_penalty")
    rest = {name: getattr(sampling, name) for name in names}
    return len({tuple(x > 0 for x in by_hand(Sampling(top_p=p, **rest), logits, seen)) for p in near}) > 1


@given(st.lists(LOGITS.filter(lambda row: len(row) >= 4), min_size=2, max_size=4), SAMPLING)
def test_rows_do_not_disturb_each_other(rows: list[list[float]], sampling: Sampling) -> None:
    logits = torch.tensor([row[:4] for row in rows])
    seen = logits > 0.5
    alone = [sampling.probabilities(logits[i : i + 1], seen[i : i + 1]) for i in range(len(rows))]
    assert torch.equal(sampling.probabilities(logits, seen), torch.cat(alone))


LOGITS_OF = {
    **{"level": torch.zeros(1, 1000), "many": torch.zeros(1, 200_003), "halves": one(0.5, 0.25, 0.125, 0.125).log()},
    **{"peak": torch.zeros(1, 1000).index_fill_(1, torch.tensor(700), 1.0), "tenths": one(0.4, 0.3, 0.2, 0.1).log()},
}
FILTERS = tomllib.loads(Path(__file__).with_name("filters.toml").read_text())


@pytest.mark.parametrize("case", FILTERS)
def test_filter_keeps(case: str) -> None:
    """Tokens that are kept have the same odds as before."""
    options, given = FILTERS[case]["options"], FILTERS[case]["logits"]
    logits = LOGITS_OF[given] if isinstance(given, str) else one(*given)
    got = Sampling(**({"temperature": 1.0} | options)).probabilities(logits)[0]
    want = FILTERS[case].get("want") or list(range(FILTERS[case]["first"]))
    assert got.nonzero().flatten().tolist() == want
    assert torch.allclose(got[want], logits[0, want].softmax(0), rtol=1e-4)


def test_a_draw_is_that_of_torch() -> None:
    """The same seed gives the tokens of torch.multinomial."""
    weights = torch.rand(5, 40) * (torch.rand(5, 40) < 0.5)
    weights[:, 7] += 0.1
    for seed in range(20):
        want = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
        assert torch.equal(draw(weights, torch.Generator().manual_seed(seed)), want)


def test_penalty_beyond_floats_is_as_strong_as_they_allow() -> None:
    logits, seen = one(0.0, -1.0, 2.0, 3.0), torch.tensor([[True, True, False, True]])
    for penalty, want in ((1e39, 2), (1e300, 2), (1e-39, 3), (1e-300, 3)):
        for temperature in (0.0, 1e-40, 1.0):
            got = Sampling(temperature=temperature, repetition_penalty=penalty).probabilities(logits, seen)
            assert got.argmax().item() == want and got.sum().item() == pytest.approx(1), (penalty, temperature)


def test_what_cannot_be_drawn_from_is_refused() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, bad, 3.0]])
        want = f"token 1 the logit {bad}, which is not finite; its weights are damaged, or too large"
        for call in (Sampling().probabilities, Sampling(temperature=1.0, top_k=2).probabilities, Sampling().likeliest):
            said = refusal(call, logits)
            assert said.startswith("row 1: ") and want in said
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(2)).top_k == 2  # pyright: ignore[reportArgumentType]
    for name, values, words in (
        ("temperature", (-0.5, math.nan, math.inf, "hot"), "is not 0 or more"),
        ("top_k", (0, 2.5, True), "is not a whole number"),
        ("top_p", (0.0, 1.5, math.nan), "is not above 0 and at most 1"),
        ("min_p", (-0.1, 2.0), "is not from 0 to 1"),
        ("repetition_penalty", (0.0, math.inf), "is not above 0"),
    ):
        for value in values:
            assert refusal(Sampling, **{name: value}).startswith(f"{name}={value} {words}")


# --- the acceptance rule of speculative decoding, against exact probabilities

# Frequencies of n draws with probability p have the standard deviation sqrt(n p (1 - p)). An acceptance that is wrong
# by 2 % moves a token of probability 0.9 by 0.018, which is 8 standard deviations at n = 20,000.
N = 20_000
SIGMAS = 4.5
"""Largest deviation in standard deviations; a right rule goes over it once in 150,000 comparisons."""
CASES = tomllib.loads(Path(__file__).with_name("acceptance.toml").read_text())


def check(got: int, n: int, p: float, case: str) -> None:
    deviation = abs(got - n * p)
    assert deviation <= SIGMAS * math.sqrt(n * p * (1 - p)) + 1e-9, f"{case}: {got / n:.4f}, want {p:.4f}"


@pytest.mark.parametrize("case", CASES)
def test_tokens_follow_the_model_and_guesses_are_kept_as_often_as_possible(case: str) -> None:
    p, q = (torch.tensor(CASES[case][name]) for name in "pq")
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
