"""What FP8 takes: bytes and errors of weights that are held in it, errors of a step's products."""

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.fp8_products import (
    PRODUCTS,
    WAYS,
    Gemm,
    capture,
    exact_products,
    operand_error,
    product_error,
    rounded_products,
)
from benchmarks.questions.fp8 import hold_in_fp8
from dsmini import Transformer, accounting
from dsmini.measure.memory import storage_bytes
from dsmini.numerics import E4M3, E5M2, fp8_matmul, round_tiles
from tests.conftest import randomise
from tests.helpers.questions import TINY
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 0}, {"n_mtp_layers": 1, "dim": 200}]
)
def test_bytes_of_weights_are_those_of_the_storages(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    model = Transformer(config).to(torch.bfloat16).eval()
    held, error = hold_in_fp8(model)
    native, eight = (accounting.weight_bytes(config, dtype).total for dtype in ("bfloat16", "fp8"))
    assert storage_bytes(model) == native
    assert storage_bytes(held) == eight < 0.8 * native
    assert abs(error / operand_error(E4M3) - 1) < 0.05


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_expected_error_is_that_of_rounding(format: Any) -> None:
    x = torch.randn(1024, 256) * torch.rand(1024, 1).mul(4).exp()  # all fractions, whatever the power of two
    rounded = round_tiles(x, (1, 128), "ue8m0", format.name, 1e-4, torch.float32)
    assert abs(relative_error(rounded, x) / operand_error(format) - 1) < 0.03


@pytest.mark.parametrize("k", [130, 1000])
def test_expected_error_does_not_depend_on_product_length(k: int) -> None:
    x, w = torch.randn(300, k), torch.randn(200, k)
    expected = product_error(E4M3, E4M3)
    assert abs(relative_error(fp8_matmul(x, w), x @ w.T) / expected - 1) < 0.05


@pytest.mark.parametrize("saved_format", ["e4m3", "e5m6"])
@pytest.mark.parametrize("way", ["tiles", "e5m2 gradients", "fp32 scales"])
def test_rounded_products_are_those_that_training_makes(way: str, saved_format: Any) -> None:
    x, w, dy = torch.randn(63, 130, requires_grad=True), torch.randn(200, 130, requires_grad=True), torch.randn(63, 200)
    how = WAYS[way]
    y = fp8_matmul(x, w, scale=how.scale, grad_format=how.grad_format, saved_format=saved_format)  # pyright: ignore
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    gemm = Gemm(block="", linear="", x=x.detach(), w=w.detach(), dy=dy, saved_format=saved_format)
    got = rounded_products(gemm, how)
    for product, want in zip(PRODUCTS, (y, dx, dw), strict=True):
        assert relative_error(got[product], want.detach()) < rounding(FP32_UNIT, terms=200), product


def test_captured_matrices_make_the_gradients() -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1)))
    tokens, targets = torch.randint(0, 256, (2, 2, 32)).unbind()
    gemms = capture(model, tokens, targets)
    assert all(p.grad is None for p in model.parameters())
    model.losses(tokens, targets).total.backward()
    assert {g.block for g in gemms} == {"block 0", "block 1", "MTP 1"}
    blocks = {"block 0": model.layers[0], "block 1": model.layers[1], "MTP 1": model.mtp[0].block}
    for g in gemms:
        if not g.linear.startswith("experts"):
            place, name = (blocks[g.block].attn, g.linear) if g.linear.startswith(("wq", "wk", "wo")) else (
                blocks[g.block].ffn, g.linear.replace("shared", "shared_experts"),
            )  # fmt: skip
            want = place.get_submodule(name).weight.grad
            assert relative_error(exact_products(g)["wgrad"], want) < rounding(FP32_UNIT, terms=64, chained=8)
    for block in ("block 1", "MTP 1"):
        for name in ("w1", "w2", "w3"):
            experts = [g for g in gemms if g.block == block and g.linear == f"experts.{name}"]
            grad = getattr(blocks[block].ffn.experts, name).grad
            visited = [j for j in range(8) if grad[j].any()]
            got = torch.stack([exact_products(g)["wgrad"] for g in experts])
            assert relative_error(got, grad[visited]) < rounding(FP32_UNIT, terms=64, chained=8)
