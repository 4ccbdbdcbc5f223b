"""The same code on every device: an accelerator gives the CPU's answers. Skipped, with the reason, where none is."""

from collections.abc import Callable

import pytest
import torch

import dsmini
from dsmini import Transformer
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding

HAVE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(not there, reason=f"this machine has no {name} device"),
            *([pytest.mark.gpu] if name == "cuda" else []),
        ],
    )
    for name, there in HAVE.items()
]
Model = Callable[..., Transformer]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_the_cpus(small_model: Model, device: str, dtype: torch.dtype) -> None:
    model = small_model(dim=64, moe_inter_dim=32)
    tokens = torch.randint(0, 61, (2, 18))
    want = model.losses(tokens[:, :-1], tokens[:, 1:])
    want.total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.to(device).compute_dtype = dtype
    there = tokens.to(device)
    got = model.losses(there[:, :-1], there[:, 1:])
    got.total.backward()
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    assert relative_error(got.main.cpu(), want.main) < rounding(unit, terms=64, chained=30)
    if dtype == torch.float32:  # in bf16 a near tie may choose another expert, and so another gradient
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert relative_error(p.grad.cpu(), grads[name]) < 1e-4, name


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_text_is_the_cpus(small_model: Model, device: str) -> None:
    model = small_model().eval()
    want = dsmini.generate(model, torch.tensor([[1, 2, 3]]), 10).tokens
    assert torch.equal(dsmini.generate(model.to(device), torch.tensor([[1, 2, 3]]), 10).tokens, want)
