"""Continuing a text: greedy and sampled, rows of unequal length, ends, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dsmini
from dsmini import Transformer
from dsmini.generation import sample

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


def test_the_context_slides_past_its_end(small_model: Model) -> None:
    model = small_model(max_seq_len=8).eval()
    out = dsmini.generate(model, torch.tensor([[3, 1, 4]]), 20)
    assert out.tokens[0].tolist() == greedy_by_hand(model, [3, 1, 4], 20)


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


def test_sampling_follows_the_softmax_at_its_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    n = 20000
    drawn = sample(logits.expand(n, 3), 2.0, None, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / n
    want = (logits / 2).softmax(0)
    assert (share - want).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard deviations of a share


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 90.0, 3.0]])
    assert sample(logits, 1e-45, None, torch.Generator().manual_seed(0)).tolist() == [1]


def test_top_k_draws_only_from_the_k_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.9]]).expand(500, 4)
    drawn = sample(logits, 5.0, 2, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}


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
    ],
)
def test_bad_requests_are_refused(small_model: Model, prompts: list[Tensor], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsmini.generate(small_model(), prompts, **{"max_new_tokens": 4, **options})
