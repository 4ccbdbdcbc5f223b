"""Tools for nn.Linear find the layers that hold numbers, and no layer that holds FP8 codes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dsmini
from dsmini import Transformer
from dsmini.nn import FP8Linear, QuantizedLinear
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.layers import is_plain
from tests.helpers.tolerances import relative_error

Build = Callable[..., Transformer]


def test_linear_is_torchs_and_layers_in_fp8_are_not() -> None:
    linear = dsmini.Linear(5, 3)
    assert isinstance(linear, nn.Linear) and linear.bias is None and [*linear.state_dict()] == ["weight"]
    assert not isinstance(FP8Linear(5, 3), nn.Linear) and not isinstance(QuantizedLinear(5, 3), nn.Linear)
    assert all(map(is_plain, (linear, FP8Linear(5, 3), QuantizedLinear(5, 3))))
    (held,) = hold_all_fp8(nn.Sequential(linear))
    assert not isinstance(held, nn.Linear) and isinstance(held, QuantizedLinear) and held.holds_fp8


def test_lora_by_peft_trains_adapters_and_merges(small_model: Build) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft library")
    model, tokens = small_model(), torch.randint(0, 61, (2, 12))
    want = model(tokens)
    names = ["wq_b", "wkv_a", "wkv_b", "wo", "w1", "w2", "w3"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=True))
    assert relative_error(adapted(tokens), want) < 1e-6
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    first = adapted.losses(tokens[:, :-1], tokens[:, 1:]).total
    for _ in range(5):
        optimizer.zero_grad()
        adapted.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
        optimizer.step()
    trained = adapted(tokens)
    assert adapted.losses(tokens[:, :-1], tokens[:, 1:]).total < first
    merged = adapted.merge_and_unload()
    assert type(merged) is Transformer and relative_error(merged(tokens), trained) < 1e-5


def test_peft_refuses_layers_in_fp8(small_model: Build) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft library")
    with pytest.raises(ValueError, match=r"FP8Linear.*is not supported"):
        peft.get_peft_model(small_model(precision="fp8"), peft.LoraConfig(target_modules=["wkv_b"]))
