"""The options that DeepSeek does not have and small models gain from: zero_init, embed_norm, qk_norm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmini import Transformer

Config = Callable[..., Any]


def test_with_zero_init_a_model_starts_undecided_and_can_learn(small_config: Config) -> None:
    model = Transformer(small_config(zero_init=True))
    tokens = torch.randint(0, 61, (2, 21))
    x = model.embed(tokens)
    for block in model.layers:
        y, _ = block(x)
        assert torch.equal(y, x)
    assert model(tokens).abs().max() == 0
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    assert losses.main.item() == pytest.approx(torch.tensor(61.0).log().item(), rel=1e-6)
    losses.total.backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.abs().max() > 0


def test_zero_init_zeroes_only_writers_to_the_residual_stream(small_config: Config) -> None:
    zero = {n for n, p in Transformer(small_config(zero_init=True)).named_parameters() if p.abs().max() == 0}
    ends = ("head.weight", "wo.weight", "w2.weight", "experts.w2")
    assert zero == {n for n, _ in Transformer(small_config()).named_parameters() if n.endswith(ends)}
    assert not {n for n, p in Transformer(small_config()).named_parameters() if p.abs().max() == 0}
