"""Magnitudes, floors, numbers that are not finite, and other tiles of the same codes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmini.numerics import (
    AMAX_MIN,
    FORMATS,
    SMALLEST_AMAX,
    UE8M0,
    dequantize_tiles,
    encode_tiles,
    quantize_tiles,
    round_tiles,
    tile_scales,
)
from tests.helpers.configs import refusal
from tests.helpers.quantized import (
    DTYPE,
    EVERY_FORMAT,
    EVERY_SCALE,
    FORMAT,
    SCALE,
    SEED,
    agrees,
    cuts,
    numpy,
    varied,
)
from tests.helpers.quantizer import NAMES, meant, quantized, same
from tests.helpers.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-44, 1e-38, 1e-20, 1.0, 1e30, 3e38, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_SCALE
@EVERY_FORMAT
def test_any_magnitude(magnitude: float, dtype: torch.dtype, scale: Any, format: Any) -> None:
    x = torch.full((3, 130), min(magnitude, torch.finfo(dtype).max), dtype=dtype)
    x[1] = 0
    for amax_min in (AMAX_MIN, SMALLEST_AMAX):
        assert agrees(x, (1, 128), scale, format, amax_min)
    codes, scales = quantize_tiles(x, (1, 128), scale, format, SMALLEST_AMAX)
    back = dequantize_tiles(codes, scales, (1, 128), format, columns=130)
    assert scales.isfinite().all() and (scales > 0).all()
    assert (back[1] == 0).all()
    if magnitude == 0 or 1e-30 < magnitude < 3e38:
        assert relative_error(back, x) <= FORMATS[format].unit


@EVERY_SCALE
@EVERY_FORMAT
def test_scales_next_to_powers_of_two(scale: Any, format: Any) -> None:
    """A logarithm is wrong for magnitudes a few bits from the format's largest times a power of two."""
    powers = torch.arange(-60, 61, dtype=torch.float32).exp2() * FORMATS[format].max
    bits = powers.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    assert agrees(bits.view(torch.float32), (1, 1), scale, format, SMALLEST_AMAX)


# NaN and infinities


@settings(max_examples=200)
@given(cuts(), SCALE, FORMAT, DTYPE, st.sampled_from([torch.nan, torch.inf, -torch.inf]), SEED)
def test_a_tile_with_what_is_no_number_is_none_as_a_whole(
    cut: Any, scale: Any, format: Any, dtype: torch.dtype, bad: float, seed: int
) -> None:
    (r, c), tile = cut
    x = varied((r, c), tile, seed).clamp(-6e4, 6e4).to(dtype)
    if not x.numel():
        return
    at = divmod(seed * 7919 % (r * c), c)
    clean = round_tiles(x, tile, scale, format, AMAX_MIN, torch.float32)
    x[at] = bad
    assert agrees(x, tile, scale, format, AMAX_MIN)
    got = round_tiles(x, tile, scale, format, AMAX_MIN, torch.float32)
    inside = torch.zeros(r, c, dtype=torch.bool)
    first = [place // side * side for place, side in zip(at, tile, strict=True)]
    inside[first[0] : first[0] + tile[0], first[1] : first[1] + tile[1]] = True
    assert torch.equal(got.isnan(), inside)
    assert same(got[~inside], clean[~inside])


# One tile after another


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["e4m3", "e5m6"]), SEED)
def test_other_tiles_of_the_same_codes_are_exact(r: int, c: int, format: Any, seed: int) -> None:
    """1x128 codes re-tiled into 128x1, as the weight's gradient wants an input that is saved as codes."""
    torch.manual_seed(seed)
    f = FORMATS[format]
    x = torch.randn(r, c) * torch.randn(r, 1).mul(1.5).exp()
    once = round_tiles(x, (1, 128), "ue8m0", format, AMAX_MIN, torch.float32)
    again = round_tiles(once, (128, 1), "ue8m0", format, AMAX_MIN, torch.float32)
    scales = tile_scales(once, (128, 1), "ue8m0", format, AMAX_MIN).repeat_interleave(128, 0)[:r]
    normal = once.abs() >= f.min_normal * scales
    assert same(again[normal], once[normal])
    assert ((again - once).abs() <= f.min_subnormal / 2 * scales)[~normal].all()
    assert normal.float().mean() > 0.9 or r * c < 2000


@EVERY_FORMAT
def test_scales_rounded_after_the_codes_are_seen(format: Any) -> None:
    """Codes belong to one scale: those of an FP32 scale mean other numbers under its power of two."""
    x = varied((64, 512), (1, 128), 2)
    codes, scales = quantize_tiles(x, (1, 128), "fp32", format, SMALLEST_AMAX)
    up = UE8M0.round_up(scales)
    wrong = dequantize_tiles(codes, up, (1, 128), format, columns=512)
    right = dequantize_tiles(encode_tiles(x, up, (1, 128), format), up, (1, 128), format, columns=512)
    assert relative_error(wrong, x) > 0.1
    assert relative_error(right, x) < FORMATS[format].unit
    assert same(right, quantized(numpy(x), (1, 128), "ue8m0", format, SMALLEST_AMAX)[2])


def test_codes_under_scales_that_are_too_small_are_the_largest() -> None:
    """No code is NaN for what does not fit."""
    for format in NAMES:
        x = torch.tensor([[1e30, -1e30, 3.0]])
        codes = encode_tiles(x, torch.ones(1, 1), (1, 128), format)
        f = FORMATS[format]
        assert same(f.decode(codes, 3), [[f.max, -f.max, 3.0]])
        assert same(meant(np.array([f.nan]), format), [torch.nan])


def test_scales_that_are_not_one_a_tile() -> None:
    codes, scales = quantize_tiles(torch.ones(130, 128), (128, 128), "fp32", "e4m3", AMAX_MIN)
    want = "scales of shape [1, 1] do not fit [130, 128] in tiles of 128x128; want [2, 1]"
    assert refusal(dequantize_tiles, codes, scales[:1], (128, 128)) == want
    assert "want [2, 1]" in refusal(dequantize_tiles, codes, scales.mT, (128, 128))
    assert "want [1, 2, 1]" in refusal(dequantize_tiles, codes.unsqueeze(0), scales, (128, 128))
    assert "want [2, 1]" in refusal(encode_tiles, torch.ones(130, 128), scales[0], (128, 128))
