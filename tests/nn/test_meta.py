"""A model built on the meta device is filled by the usual loop over its modules, and gives shapes without memory."""

from typing import Any

import pytest
import torch
from torch import nn

from dsmini import Transformer
from tests.conftest import SMALL
from tests.helpers.configs import DSA

MODELS: dict[str, dict[str, Any]] = {
    "mla": {"embed_norm": True, "original_seq_len": 8},
    "without q_lora": {"q_lora_rank": None, "qk_norm": True},
    "gqa": {"attention": "gqa", "n_kv_heads": 1, "qk_norm": True},
    "fp8": {"precision": "fp8"},
    "dsa": DSA,
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_meta_model_is_filled_by_its_modules(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Transformer(**SMALL | changes)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    for module in model.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
    usual = Transformer(**SMALL | changes)
    want = usual.state_dict()
    assert model.state_dict().keys() == want.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == want[name].dtype and tensor.isfinite().all(), name
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            assert 0.5 < tensor.std() / usual.config.init_std < 1.5 or name.endswith(("wo.weight", "w2", "w2.weight"))


SLOW = {"fp8": pytest.mark.slow}  # torch loads its decompositions


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODELS])
def test_meta_model_gives_the_shapes_of_its_outputs(name: str) -> None:
    model, tokens = Transformer(**SMALL | MODELS[name]), torch.zeros(2, 13, dtype=torch.int64)
    want = model.run(tokens, mtp=True)
    model, tokens = model.to("meta"), tokens.to("meta")
    got = model.run(tokens, mtp=True)
    assert got.logits.is_meta and got.logits.shape == want.logits.shape
    assert [r.indices.shape for r in got.routing] == [r.indices.shape for r in want.routing]
    model.losses(tokens, tokens).total.backward()
    learnt = [p for name, p in model.named_parameters() if ".indexer." not in name]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in learnt)


def test_whole_model_resets_modules_of_other_classes() -> None:
    model = Transformer(**SMALL)
    model.layers[0].attn.wo = nn.Linear(15, 24, bias=False)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(torch.nan)
    model.reset_parameters(torch.Generator().manual_seed(3))
    assert all(tensor.isfinite().all() for tensor in model.parameters())
    again = Transformer(**SMALL)
    again.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(model.embed.weight, again.embed.weight)
