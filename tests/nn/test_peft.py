"""Tools for nn.Linear find the layers that hold numbers, and no layer that holds FP8 codes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dsmini
from dsmini import Transformer
from dsmini.nn import FP8Linear, QuantizedLinear
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.layers import is_plain
from tests.helpers.configs import DSA, V4_MODEL
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


ATTENTION = r".*\.attn\.w\w+"
"""The recipe of docs/pytorch-habits.md: matrices of attention itself, not of an indexer or a compressor in it."""


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"attention": "gqa", "n_kv_heads": 1}, DSA, V4_MODEL],
    ids=["mla", "direct query", "gqa", "dsa", "V4"],
)
def test_one_recipe_of_lora_fits_every_attention(small_model: Build, changes: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft library")
    model, tokens = small_model(**changes).eval(), torch.randint(0, 61, (2, 12))
    want = [name for name, _ in model.named_modules() if re.fullmatch(ATTENTION, name)]
    attentions = [*model.layers, *(depth.block for depth in model.mtp)]
    assert len(want) == sum(isinstance(part, nn.Linear) for block in attentions for part in block.attn.children())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
    adapted.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(grads) == 2 * len(want) and all(grad is not None and grad.any() for grad in grads)
    trained, rows = adapted(tokens), dsmini.generate(model, tokens, 6).tokens
    merged = adapted.merge_and_unload()
    assert relative_error(merged(tokens), trained) < 1e-5 and torch.equal(
        dsmini.generate(merged, tokens, 6).tokens, rows
    )


def test_peft_refuses_layers_in_fp8(small_model: Build) -> None:
    peft = pytest.importorskip("peft", reason="needs the peft library")
    with pytest.raises(ValueError, match=r"FP8Linear.*is not supported"):
        peft.get_peft_model(small_model(precision="fp8"), peft.LoraConfig(target_modules=["wkv_b"]))
