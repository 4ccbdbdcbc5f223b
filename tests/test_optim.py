"""Which parameters an optimizer moves, and how."""

from collections.abc import Callable

import pytest
from torch import Tensor

from dsmini import TrainConfig, Transformer
from dsmini.optim import optimizers


def by_name(model: Transformer, params: list[Tensor]) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in params}  # a buffer, such as the routing bias, would have no name here


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_decay_and_norms_gates_and_biases_do_not(
    small_model: Callable[..., Transformer], optimizer: str
) -> None:
    model = small_model()
    groups = [g for o in optimizers(model, TrainConfig(optimizer=optimizer)) for g in o.param_groups]  # pyright: ignore[reportArgumentType]
    members = [by_name(model, g["params"]) for g in groups]
    assert sorted(name for group in members for name in group) == sorted(name for name, _ in model.named_parameters())
    for group, names in zip(groups, members, strict=True):
        for name in names:
            assert (group["weight_decay"] > 0) == ("norm" not in name and "gate" not in name), name


def test_muon_moves_the_matrices_between_hidden_states(small_model: Callable[..., Transformer]) -> None:
    model = small_model()
    muon, adamw = optimizers(model, TrainConfig(optimizer="muon"))
    by_muon = by_name(model, [p for g in muon.param_groups for p in g["params"]])
    by_adamw = by_name(model, [p for g in adamw.param_groups for p in g["params"]])
    assert not by_muon & by_adamw
    assert all("norm" in n or "gate" in n or n in ("embed.weight", "head.weight") for n in by_adamw)
    assert {"layers.1.ffn.experts.w1", "layers.0.attn.wkv_b.weight", "mtp.0.eh_proj.weight"} <= by_muon
