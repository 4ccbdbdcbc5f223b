"""The product with a weight: what it refuses, on every backend."""

import pytest
import torch

from dsmini import ops, quantize
from dsmini.functional.linear import linear
from tests.helpers.configs import refusal


@pytest.mark.parametrize("backend", [None, "eager", "reference"])
def test_a_native_linear_refuses_codes(backend: str | None) -> None:
    x, w = torch.randn(2, 128), torch.randn(8, 128)
    with ops.use(backend):
        assert "multiply codes by nn.FP8Linear" in refusal(linear, quantize(x), w)
        codes = quantize(w, (128, 128))
        want = "weight is a QuantizedTensor, want a tensor; multiply codes by nn.FP8Linear, or weight.dequantize()"
        assert refusal(linear, x, codes) == want
