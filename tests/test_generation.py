"""Continuing a text: greedy and sampled, rows of unequal length, ends, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dsmini
from dsmini import Transformer
from dsmini.generation import Generation

Model = Callable[..., Transformer]


def greedy_by_hand(model: Transformer, prompt: list[int], n: int) -> list[int]:
    row = list(prompt)
    for _ in range(n):
        window = torch.tensor([row[-model.config.max_seq_len :]])
        row.append(int(model(window)[0, -1].argmax()))
    return row


def test_greedy_takes_the_likeliest_token_each_time(small_model: Model) -> None:
    model = small_model().eval()
    out = dsmini.generate(model, torch.tensor([[1, 2, 3]]), 12)
    assert out.tokens[0].tolist() == greedy_by_hand(model, [1, 2, 3], 12)
    assert out.stats.new_tokens == 12


def test_rows_of_unequal_length_do_not_disturb_each_other(small_model: Model) -> None:
    model = small_model().eval()
    prompts = [torch.tensor([5]), torch.tensor([7, 8, 9, 10, 11]), torch.tensor([1, 2])]
    out = dsmini.generate(model, prompts, 6)
    assert out.lengths.tolist() == [7, 11, 8]
    for row, length, prompt in zip(out.tokens, out.lengths, prompts, strict=True):
        assert row[: int(length)].tolist() == greedy_by_hand(model, prompt.tolist(), 6)
        assert row[int(length) :].sum() == 0


def test_a_row_that_fills_the_cache_goes_on_from_the_newer_half(small_model: Model) -> None:
    model = small_model(max_seq_len=8).eval()
    generation = Generation(model, [[3, 1, 4], [5]], 20, slide=True)
    for _ in generation:
        pass
    for prompt, row in zip(([3, 1, 4], [5]), generation.rows, strict=True):
        want, context = list(prompt), list(prompt)
        for _ in range(20):
            if len(context) > 8:
                context = context[-5:]  # four that are read anew, and the newest
            want.append(int(model(torch.tensor([context]))[0, -1].argmax()))
            context.append(want[-1])
        assert row == want


def test_a_row_ends_after_its_end_token(small_model: Model) -> None:
    model = small_model().eval()
    row = greedy_by_hand(model, [1, 2], 10)[2:]
    end = row[4]
    out = dsmini.generate(model, torch.tensor([[1, 2]]), 10, eos_token_id=end)
    stop = row.index(end) + 1
    assert out.tokens[0].tolist() == [1, 2, *row[:stop]]


def test_a_seed_repeats_a_sample_and_another_does_not(small_model: Model) -> None:
    model = small_model().eval()

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return dsmini.generate(model, torch.tensor([[1]]), 30, temperature=1.0, generator=generator).tokens

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([torch.tensor([], dtype=torch.int64)], {}, "prompt 0 is empty"),
        ([torch.tensor([1]), torch.tensor([61])], {}, "prompt 1 has token id 61, outside the vocabulary; want 0 to 60"),
        ([torch.tensor([-1])], {}, "token id -1"),
        ([torch.tensor([1])], {"temperature": -0.5}, "temperature=-0.5 is not 0 or more"),
        ([torch.tensor([1])], {"temperature": float("nan")}, "temperature=nan is not 0 or more"),
        ([torch.tensor([1])], {"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
        ([torch.tensor([1])], {"top_k": 0}, "top_k=0 is less than 1"),
        ([torch.tensor([1] * 33)], {}, "a prompt of 33 tokens is longer than the model's context of 32; shorten it"),
        ([torch.tensor([1] * 30)], {}, "30 tokens and 4 new ones are more than .* context of 32; use max_new_tokens=3"),
    ],
)
def test_bad_requests_are_refused(small_model: Model, prompts: list[Tensor], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsmini.generate(small_model(), prompts, **{"max_new_tokens": 4, **options})
