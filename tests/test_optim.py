"""Which parameters decay, and the learning rate over a run."""

from collections.abc import Callable

import pytest

from dsmini import TrainConfig, Transformer
from dsmini.optim import adamw, learning_rate, parameter_groups


def test_matrices_decay_and_norms_gates_and_biases_do_not(small_model: Callable[..., Transformer]) -> None:
    model = small_model()
    decayed, rest = ([id(p) for p in group["params"]] for group in parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(decayed + rest) == sorted(names)
    assert {names[i].rsplit(".", 2)[-2] for i in rest} == {
        *("attn_norm", "ffn_norm", "q_norm", "kv_norm", "norm", "enorm", "hnorm", "gate"),
    }
    assert "layers.1.ffn.experts.w2" in {names[i] for i in decayed}
    assert not {id(b) for b in model.buffers()} & set(decayed + rest)
    assert [group["weight_decay"] for group in adamw(model, TrainConfig()).param_groups] == [0.1, 0.0]


def test_the_learning_rate_rises_to_the_peak_and_falls_to_its_final_share() -> None:
    train = TrainConfig(steps=101, warmup=0.1, lr=2.0, lr_final=0.1)
    by_hand = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 55: 1.1, 100: 0.2}
    for step, want in by_hand.items():
        assert learning_rate(step, train) == pytest.approx(want), step
    rates = [learning_rate(step, train) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(steps: int) -> None:
    rates = [learning_rate(step, TrainConfig(steps=steps, lr=1.0)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
