"""Continuing a text: greedy and sampled, rows of unequal length, ends, and what is refused."""

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsmini
from dsmini import Transformer
from dsmini.inference.generation import Generation, Stats
from dsmini.inference.sampling import Sampling
from dsmini.inference.writer import figures_in_words
from tests.helpers.configs import DSA, GLM, V4_MODEL, refusal

Model = Callable[..., Transformer]
PROMPTS = [[5], [7, 8, 9, 10, 11], [1, 2]]


def greedy_by_hand(model: Transformer, prompt: list[int], n: int) -> list[int]:
    row = list(prompt)
    for _ in range(n):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row


def finished(model: Transformer, prompts: list[list[int]], n: int, **options: Any) -> Generation:
    """Return a generation that has run to its end."""
    generation = Generation(model, prompts, n, **options)
    for _ in generation:
        pass
    return generation


@pytest.mark.parametrize(
    "changes",
    [{}, DSA, GLM, {"swiglu_limit": 0.1}, {"n_hash_layers": 2, "n_dense_layers": 0}, {"hc_mult": 2}],
    ids=["mla", "dsa", "glm", "clamped", "table", "streams"],
)
def test_each_row_takes_its_likeliest_tokens_up_to_an_end(small_model: Model, changes: dict[str, Any]) -> None:
    model = small_model(**changes).eval()
    out = dsmini.generate(model, [torch.tensor(prompt) for prompt in PROMPTS], 10)
    assert out.lengths.tolist() == [11, 15, 12] and out.stats.new_tokens == 30
    rows = [greedy_by_hand(model, prompt, 10) for prompt in PROMPTS]
    assert [row[:n] for row, n in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)] == rows
    assert out.tokens[0, 11:].sum() == 0
    end = rows[2][6]
    (cut,) = dsmini.generate(model, torch.tensor([[1, 2]]), 10, eos_token_id=end).tokens.tolist()
    assert cut == rows[2][: rows[2].index(end, 2) + 1]


@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_decoding_draws_no_random_number(small_model: Model, speculative: bool) -> None:
    model, before = small_model().eval(), torch.get_rng_state()
    for penalty in (1.0, 1.3):
        dsmini.generate(model, PROMPTS, 4, repetition_penalty=penalty, speculative=speculative)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_draws_as_a_generator_of_that_seed(small_model: Model) -> None:
    model = small_model().eval()
    seeded = [dsmini.generate(model, PROMPTS, 9, temperature=1.0, seed=seed).tokens for seed in (5, 5, 6)]
    want = dsmini.generate(model, PROMPTS, 9, temperature=1.0, generator=torch.Generator().manual_seed(5)).tokens
    assert torch.equal(seeded[0], want) and torch.equal(seeded[1], want) and not torch.equal(seeded[2], want)


@pytest.mark.parametrize("changes", [{}, V4_MODEL], ids=["mla", "V4"])
def test_lengths_stay_in_main_memory_whatever_the_default_device(small_model: Model, changes: dict[str, Any]) -> None:
    """After torch.set_default_device("cuda") they would be there, next to others that are not. Meta has no numbers."""
    model = small_model(**changes, max_seq_len=16).eval()
    options: dict[str, Any] = {"speculative": True, "slide": True, "sampling": Sampling(repetition_penalty=1.2)}
    want = finished(model, PROMPTS, 20, **options).rows
    with torch.device("meta"):
        assert finished(model, PROMPTS, 20, **options).rows == want


def test_a_long_prompt_is_read_in_parts(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().eval()
    prompts = [torch.randint(0, 61, (n,)) for n in (20, 3, 11)]
    want = dsmini.generate(model, prompts, 8, speculative=True)
    monkeypatch.setattr("dsmini.inference.generation.PREFILL", 4)
    assert torch.equal(dsmini.generate(model, prompts, 8, speculative=True).tokens, want.tokens)
    read: list[tuple[int, int]] = []
    finished(model, [row.tolist() for row in prompts], 2, watch=lambda *done: read.append(done))
    assert read == [(done, 34) for done in (4 + 3 + 4, 8 + 3 + 8, 12 + 3 + 11, 16 + 3 + 11, 34)]


def test_a_row_ends_where_the_caller_says(small_model: Model) -> None:
    generation = Generation(small_model().eval(), PROMPTS, 20)
    steps = [next(generation) for _ in range(3)]
    generation.end(1)
    steps += list(generation)
    assert [len(row) - len(prompt) for row, prompt in zip(generation.rows, PROMPTS, strict=True)] == [20, 3, 20]
    assert all(step[1] == [] for step in steps[3:])


# log-probabilities


def forward_logprobs(model: Transformer, row: list[int]) -> Tensor:
    """Return the log-probability of each token of a row but the first, of one forward."""
    logprobs = model(torch.tensor([row[:-1]]))[0].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(row[1:])[:, None])[:, 0]


LOGPROBS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.4},
    "sampled": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    "ends": {"temperature": 1.5, "eos_token_id": list(range(0, 61, 7))},
}


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "speculative"])
@pytest.mark.parametrize("case", LOGPROBS)
@pytest.mark.parametrize("changes", [{}, DSA, V4_MODEL], ids=["mla", "dsa", "V4"])
def test_logprobs_are_those_of_a_forward(
    small_model: Model, case: str, changes: dict[str, Any], speculative: bool
) -> None:
    """Before temperature, filters and penalties, in rows of unequal length that end at different steps."""
    model = small_model(**changes, max_seq_len=64, n_mtp_layers=2).eval()
    make_guesses_good(model)
    options = LOGPROBS[case] | {"generator": torch.Generator().manual_seed(3), "speculative": speculative}
    out = dsmini.generate(model, PROMPTS, 30, **options)
    assert not speculative or out.stats.accepted > 0
    new = out.lengths - torch.tensor([len(prompt) for prompt in PROMPTS])
    assert out.logprobs.dtype == torch.float32 and out.logprobs.shape == (3, int(new.max()))
    assert len({*new.tolist()}) > 1 or case != "ends"
    rows = zip(out.tokens.tolist(), out.lengths.tolist(), out.logprobs, new.tolist(), strict=True)
    for tokens, length, got, n in rows:
        torch.testing.assert_close(got[:n], forward_logprobs(model, tokens[:length])[-n:], rtol=1e-5, atol=1e-5)
        assert not got[n:].any(), "padding adds nothing to a sum"


@pytest.mark.parametrize("speculative", [False, True])
def test_row_that_fills_the_cache_continues_from_its_newer_half(small_model: Model, speculative: bool) -> None:
    """It takes the likeliest token of what it still reads, whose log-probability it is."""
    model, room = small_model(max_seq_len=8).eval(), 8
    prompts = [[3, 1, 4], [5]]
    found = finished(model, prompts, 20, slide=True, speculative=speculative, record_logprobs=True)
    for prompt, tokens, logprobs in zip(prompts, found.rows, found.logprobs, strict=True):
        context = list(prompt)
        for token, got in zip(tokens[len(prompt) :], logprobs, strict=True):
            if len(context) > room:
                context = context[-1 - room // 2 :]  # four that are read again, and the newest
            logprob, likeliest = model(torch.tensor([context]))[0, -1].log_softmax(-1).max(-1)
            assert token == likeliest and got == pytest.approx(logprob.item(), abs=1e-5)
            context.append(token)


def test_no_new_tokens_have_no_logprobs(small_model: Model) -> None:
    assert dsmini.generate(small_model().eval(), PROMPTS, 0).logprobs.shape == (3, 0)


# with guesses


def make_guesses_good(model: Transformer) -> None:
    """Make the guesses of multi-token prediction agree with the model.

    All blocks add little to the token's own embedding, so that the next token depends on the last one alone. The
    multi-token prediction block passes that embedding on.
    """
    with torch.no_grad():
        for block in [*model.layers, *(mtp.block for mtp in model.mtp)]:
            (block.attn.wo_b if hasattr(block.attn, "wo_b") else block.attn.wo).weight.mul_(0.005)
            for name, p in block.ffn.named_parameters():
                if name.endswith(("w2.weight", "w2")):
                    p *= 0.005
        m = model.config.dim
        for mtp in model.mtp:
            mtp.enorm.weight.fill_(1)
            if hasattr(mtp, "eh_proj"):
                mtp.eh_proj.weight.copy_(torch.cat((torch.eye(m), torch.zeros(m, m)), 1))
            else:
                mtp.e_proj.weight.copy_(torch.eye(m))
                mtp.h_proj.weight.zero_()
            mtp.norm.weight.copy_(model.norm.weight)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"mtp_input": "pre_norm"}, DSA, GLM, pytest.param(V4_MODEL, marks=pytest.mark.slow)],
    ids=["mla", "pre_norm", "dsa", "glm", "V4"],
)
def test_greedy_tokens_are_the_same_with_guesses(small_model: Model, depth: int, changes: dict[str, Any]) -> None:
    """Random models agree with few guesses, so another model's are made to agree. Rows end and outgrow the cache."""
    model, ends = small_model(n_mtp_layers=depth, max_seq_len=64, **changes).eval(), set()
    small = small_model(n_mtp_layers=depth, max_seq_len=16, **changes).eval()
    for sharing in (False, True):
        if sharing:
            make_guesses_good(model)
            make_guesses_good(small)
        plain, guessed = (finished(model, PROMPTS, 40, speculative=s, eos_token_id=[3, 17]) for s in (False, True))
        assert guessed.rows == plain.rows
        assert guessed.stats.new_tokens == plain.stats.new_tokens and plain.stats.drafted == 0
        ends |= {len(row) for row in plain.rows}
        if sharing:
            assert guessed.stats.acceptance_rate > 0.3
            assert guessed.stats.tokens_per_step > 1.2 * plain.stats.tokens_per_step == pytest.approx(1.2)
        plain, guessed = (finished(small, PROMPTS, 40, speculative=s, slide=True).rows for s in (False, True))
        assert guessed == plain
    assert len(ends) > 1, "rows should end at different steps"


def test_rows_that_end_at_different_steps_are_guessed_to_their_ends(small_model: Model) -> None:
    model, prompts = small_model(n_mtp_layers=2, max_seq_len=64).eval(), [[i] for i in range(1, 8)]
    make_guesses_good(model)
    stats = finished(model, prompts, 40, speculative=True, sampling=Sampling(temperature=1.0)).stats
    assert stats.acceptance_rate > 0.1 and stats.drafted == 2 * stats.steps


def test_a_guess_is_what_the_uncached_model_predicts(small_model: Model) -> None:
    model = small_model(n_mtp_layers=3).eval()
    generation = Generation(model, [[4, 9, 2, 6]], 24, speculative=True)
    next(generation)
    seen: list[list[int]] = []
    drafter: Any = generation.drafter
    real = drafter.guess

    def guess(*inputs: Any) -> tuple[Tensor, list[Tensor]]:
        guesses, q = real(*inputs)
        seen.append(guesses[0].tolist())
        return guesses, q

    drafter.guess = guess
    for _ in range(12):
        known, want = list(generation.rows[0]), []
        next(generation)
        for k in (1, 2, 3):
            tokens = torch.tensor([known + want])
            want.append(int(model.run(tokens, mtp=True).mtp_logits[k - 1][0, -1].argmax()))
        assert seen.pop() == want


def test_sampled_rows_are_distributed_as_without_guesses(small_model: Model) -> None:
    """Compare the joint frequencies of three tokens after a prompt with the exact probabilities, by chi-square.

    This shows that p, q and guesses belong together; test_sampling.py tests the rule itself, far more finely.
    """
    model, n = small_model(vocab_size=5, n_mtp_layers=1).eval(), 6000
    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
        p = model(torch.cat((torch.tensor([[1, 2]]).expand(25, 2), pairs), 1)).softmax(-1)
    p1, p2, p3 = p[0, 1], p[::5, 2], p[:, 3].view(5, 5, 5)
    want = (p1[:, None, None] * p2[:, :, None] * p3).flatten()
    prompts, options = torch.tensor([[1, 2]]).expand(n, 2), {"generator": torch.Generator().manual_seed(0)}
    out = dsmini.generate(model, prompts, 3, temperature=1.0, speculative=True, **options)
    assert 0.1 < out.stats.acceptance_rate < 0.95
    drawn = out.tokens[:, 2] * 25 + out.tokens[:, 3] * 5 + out.tokens[:, 4]
    got = torch.bincount(drawn, minlength=125)
    chi2 = ((got - n * want) ** 2 / (n * want)).sum().item()
    assert chi2 < 124 + 5 * (2 * 124) ** 0.5  # mean and five standard deviations of chi-square with 124 degrees


def test_a_penalty_counts_the_guesses_before_a_token_too(small_model: Model) -> None:
    model = small_model(n_mtp_layers=2, max_seq_len=64).eval()
    make_guesses_good(model)
    plain, guessed = (
        dsmini.generate(model, torch.tensor([[1, 2]]), 40, repetition_penalty=1.5, speculative=s) for s in (False, True)
    )
    assert torch.equal(plain.tokens, guessed.tokens)
    assert not torch.equal(plain.tokens, dsmini.generate(model, torch.tensor([[1, 2]]), 40).tokens)


BAD = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text())["call"]


def test_bad_request_raises(small_model: Model) -> None:
    model, generate = small_model(n_mtp_layers=0), getattr(dsmini.generate, "__wrapped__", dsmini.generate)
    for case in BAD:
        options = {"max_new_tokens": 4, **case.get("options", {})}
        assert case["said"] in refusal(generate, model, case.get("prompts", [[1]]), **options)
    both = refusal(generate, model, [[1]], 4, seed=0, generator=torch.Generator())
    assert "seed=0 and a generator: the draws have one" in both
    assert "seed=9223372036854775808 is not a whole number" in refusal(generate, model, [[1]], 4, seed=1 << 63)
    want = "a cache of 33 tokens is longer than the model's context of 32; use 32"
    assert refusal(Generation, model, [[1]], 40, max_seq_len=33) == want


def test_figures_fit_80_columns_and_end_with_the_rate_of_tokens() -> None:
    sizes: Any = {"prompt_tokens": 123456, "rows": 16, "cache_bytes": 10**12, "cache_bytes_per_token": 1234567.0}
    counts: Any = {"new_tokens": 10**7, "steps": 10**7, "drafted": 10**7, "accepted": 10**7 - 1}
    fast = Stats(**sizes, **counts, prefill_seconds=12345.67, seconds=1e5, draft_seconds=4e4)
    lines = figures_in_words(fast, True).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 4
    assert lines[2] == "guessing took 40% of the time: at most 0.60 times as fast as without"
    one = dataclasses.replace(fast, new_tokens=1001, rows=1, seconds=10.0, cache_bytes=73728)
    assert figures_in_words(one, False).splitlines()[-1] == "1001 new tokens, 100 tokens/s"
    for new in (0, 1):  # the first token belongs to the prefill
        none = dataclasses.replace(fast, new_tokens=new, rows=1, seconds=1e-6, drafted=0)
        assert figures_in_words(none, True).splitlines()[-1] == f"{new} new tokens"
