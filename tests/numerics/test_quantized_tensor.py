"""A tensor in a short format: its parts, its gradient, and the inputs that it refuses."""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad

from dsmini.numerics import FORMATS, fp8_matmul, quantize, quantize_tiles
from tests.helpers.configs import refusal
from tests.helpers.quantizer import EVERY_CUT, EVERY_FORMAT, UNIT, alike, same
from tests.helpers.tolerances import relative_error
from tests.helpers.watching import saved_for_backward


@EVERY_CUT
@EVERY_FORMAT
def test_parts_and_gradient_of_a_quantized_tensor(
    shape: tuple[int, ...], tile: Any, tiles: tuple[int, ...], format: Any
) -> None:
    x = torch.randn(shape).bfloat16()
    before = x.clone()
    q = quantize(x, tile, format=format)
    assert (q.shape, q.dtype, q.device, q.format, q.scale) == (x.shape, torch.bfloat16, x.device, format, "ue8m0")
    assert (q.codes.dtype, q.scales.dtype) == (FORMATS[format].dtype, torch.float32)
    assert q.codes.shape[:-1] == x.shape[:-1] and q.scales.shape == tiles and isinstance(q.tile, tuple)
    assert q.nbytes == q.codes.untyped_storage().nbytes() + q.scales.untyped_storage().nbytes()
    back = q.dequantize()
    assert (back.shape, back.dtype) == (x.shape, torch.float32)
    assert relative_error(back, x) < UNIT[format]
    assert same(q.dequantize(torch.bfloat16), back)  # powers of two far from the smallest: nothing is rounded
    back.zero_()
    assert torch.equal(x, before)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, grad = torch.randn(shape).mul(100).to(dtype).requires_grad_(), torch.randn(shape)
        (quantize(x, tile, format=format).dequantize() * grad).sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype  # in x's dtype, not in that of codes
        assert torch.equal(x.grad, grad.to(dtype))


def test_defaults_and_strides_of_quantize() -> None:
    x = torch.randn(5, 3, 130).transpose(0, 1)
    assert alike(quantize(x), quantize(x.contiguous(), (1, 128), "ue8m0", "e4m3", 1e-4))
    assert alike(quantize(x, (2, 64)), quantize(x.contiguous(), (2, 64)))
    _, scales = quantize_tiles(x, (3, 130), "fp32", "e5m2", 7.0)
    assert same(quantize(x, (3, 130), "fp32", "e5m2", 7.0).scales, scales)


def test_no_gradient_without_requires_grad() -> None:
    x = torch.randn(3, 130, requires_grad=True)
    with torch.no_grad():
        inside = quantize(x)
        assert not quantize(x.detach()).dequantize().requires_grad
    for q in (inside, quantize(x.detach())):
        assert q.source is None and not q.dequantize().requires_grad
    assert quantize(x).dequantize().requires_grad


def test_graph_holds_no_tensor_of_the_size_of_x() -> None:
    x = torch.randn(64, 256, requires_grad=True) * 1.0
    with saved_for_backward() as saved:
        q = quantize(x)
        back = q.dequantize()
    assert not saved
    assert q.source is not None and q.source.untyped_storage().nbytes() == x.element_size()
    del x
    back.sum().backward()


def test_repr() -> None:
    q = quantize(torch.randn(2, 130))
    assert repr(q) == "QuantizedTensor(e4m3 [2, 130], ue8m0 scales of 1x128, 276 bytes)"


def test_what_cannot_be_quantized_is_refused() -> None:
    x = torch.ones(3, 4)
    for dtype in (torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        want = f"x is {dtype}; want float32, bfloat16 or float16: use x.float()"
        assert refusal(quantize, x.to(dtype)) == want
    want = "x is a single number; want a dimension or more: use x[None]"
    assert refusal(quantize, torch.tensor(1.0)) == refusal(fp8_matmul, torch.tensor(1.0), x) == want
    for tile in ((0, 1), (1, -128), (1,), (1, 2, 3), "row", (1.5, 2), (True, 128), 128, None):
        want = f"tile={tile!r} is not a tile of [3, 4]; want rows and columns, such as (1, 128)"
        assert refusal(quantize, x, tile) == want
    assert "is not a tile of [300]" in refusal(quantize, torch.ones(300), (128, 1))
    for value in ("e4m3fn", "E4M3", None):
        assert refusal(quantize, x, format=value) == f"format={value!r} is unknown; use one of e4m3, e5m2, e5m6, e2m1"
        assert refusal(quantize, x, scale=value) == f"scale={value!r} is unknown; use one of ue8m0, fp32"
    for value in (0, -1.0, 2.0**-101, float("inf"), float("nan")):
        want = f"amax_min={value}; want a finite number, 2^-100 or more, such as 0.0001"
        assert refusal(quantize, x, amax_min=value) == want


def test_forward_mode_derivatives_are_refused() -> None:
    """Codes carry no tangent, so they would be zero."""
    x, w, tangent = torch.randn(3, 130), torch.randn(5, 130), torch.ones(3, 130)
    want = "x has a forward-mode tangent, as in torch.func.jvp; want reverse mode: use backward()"
    for call in (lambda x: quantize(x).dequantize(), lambda x: fp8_matmul(x, w)):
        assert refusal(torch.func.jvp, call, (x,), (tangent,)) == want
    assert refusal(torch.func.jvp, torch.func.vmap(lambda x: quantize(x).dequantize()), (x,), (tangent,)) == want
    with forward_ad.dual_level():
        assert refusal(quantize, forward_ad.make_dual(x, tangent)) == want
        assert alike(quantize(x), quantize(x)), "without a tangent it is served"
