"""Bytes of weights in FP8, and errors of the products of a step."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.questions.fp8 import Gemm, errors_of, operand_error, product_error, record
from dsmini import Transformer, accounting
from dsmini.nn.fp8 import fp8_weights, hold_all_fp8
from dsmini.numerics import E4M3, E5M2, fp8_matmul, round_tiles
from tests.conftest import randomise
from tests.helpers.questions import TINY
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding
from tests.helpers.watching import storage_bytes


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 0}, {"n_mtp_layers": 1, "dim": 200}]
)
def test_bytes_of_weights_are_those_of_the_storages(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    model = Transformer(config).to(torch.bfloat16).eval()
    native, eight = (accounting.weight_bytes(config, dtype).total for dtype in ("bfloat16", "fp8"))
    for held, want in ((model, native), (hold_all_fp8(copy.deepcopy(model)), eight)):
        assert sum(storage_bytes([*held.parameters(), *held.buffers()])) == want <= native
    assert eight < 0.8 * native


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_expected_error_is_that_of_rounding(format: Any) -> None:
    x = torch.randn(1024, 256) * torch.rand(1024, 1).mul(4).exp()  # fractions spread over many powers of two
    rounded = round_tiles(x, (1, 128), "ue8m0", format.name, 1e-4, torch.float32)
    assert abs(relative_error(rounded, x) / operand_error(format) - 1) < 0.03
    for k in (130, 1000):  # of a product it does not depend on the length
        x, w = torch.randn(300, k), torch.randn(200, k)
        assert abs(relative_error(fp8_matmul(x, w), x @ w.T) / product_error(E4M3, E4M3) - 1) < 0.05


def test_recorded_products_make_the_gradients() -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1)))
    tokens, targets = torch.randint(0, 256, (2, 2, 32)).unbind()
    gemms = record(model, tokens, targets)
    assert all(p.grad is None for p in model.parameters())
    model.losses(tokens, targets).total.backward()
    assert {g.name for g in gemms} == set(fp8_weights(model))
    for name in fp8_weights(model):
        grad = model.get_parameter(name).grad
        assert grad is not None
        mine = [g.exact()[2] for g in gemms if g.name == name]
        chosen = grad if grad.dim() == 2 else grad[[bool(g.any()) for g in grad]]
        got = torch.stack(sorted(mine, key=torch.norm))  # backward has an order of its own
        want = torch.stack(sorted(chosen.view(-1, *grad.shape[-2:]), key=torch.norm))
        assert relative_error(got, want) < rounding(FP32_UNIT, terms=64, chained=8), name


def test_errors_are_those_of_the_shipped_products() -> None:
    gemms = [Gemm("layers.0.attn.wo.weight", torch.randn(63, 130), torch.randn(200, 130), torch.randn(63, 200))] * 2
    found, expected = errors_of(gemms), product_error(E4M3, E4M3)
    for product in ("fprop", "dgrad", "wgrad"):
        assert abs(found["tiles", gemms[0].name, product] / expected - 1) < 0.2
        assert found["e5m2 gradients", gemms[0].name, product] > (1.3 if product != "fprop" else 0.9) * expected
