"""Tiles in short formats: bit for bit what a loop over the tiles gives, for any shape, tile, format and scale."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmini import ops
from dsmini.numerics import (
    AMAX_MIN,
    FORMATS,
    SMALLEST_AMAX,
    dequantize_tiles,
    encode_tiles,
    quantize_tiles,
    round_tiles,
    tile_scales,
)
from dsmini.numerics.quantization import ELEMENTS_AT_A_TIME
from tests.helpers.configs import refusal
from tests.helpers.quantizer import EVERY_FORMAT, NAMES, UNIT, quantized, quantized_groups, raw, same, stored, tiles
from tests.helpers.tolerances import relative_error
from tests.helpers.watching import Operations

FORMAT, SCALE = st.sampled_from(NAMES), st.sampled_from(["ue8m0", "fp32"])
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TILES = [(1, 128), (128, 1), (128, 128), (7, 5), (16, 16), (1, 1)]
EVERY_SCALE = pytest.mark.parametrize("scale", ["ue8m0", "fp32"])


@pytest.fixture(autouse=True, scope="module")
def _reference_backend() -> Iterator[None]:
    """Plain PyTorch defines the bits; fast versions are compared with it elsewhere."""
    with ops.use("reference"):
        yield


def varied(shape: tuple[int, ...], tile: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return tiles of normal numbers whose magnitudes are log-normal (sigma 1.5) and powers of ten apart.

    A misplaced scale then shows. Some tiles are zero, some below every amax_min, and half of all numbers tie.
    """
    torch.manual_seed(seed)
    x = torch.randn(shape)
    for matrix in x.view(-1, *shape[-2:]) if x.numel() else ():
        for i, j, block in tiles(*matrix.shape, tile):
            kind = (5 * i + 3 * j + seed) % 11
            matrix[block] *= torch.randn(()).mul(1.5).exp() * {9: 0.0, 10: 1e-33}.get(kind, 10.0 ** (kind - 4))
    return torch.where(torch.rand(shape) < 0.5, x.bfloat16().float(), x).to(dtype)


class Case(NamedTuple):
    x: Tensor
    tile: tuple[int, int]
    scale: Any
    format: Any
    amax_min: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw matrices of up to 3 x 3 tiles, mostly ragged and sometimes empty, some with an infinity or NaN."""
    tile, lead = draw(st.sampled_from(TILES)), draw(st.sampled_from([(), (), (3,), (2, 2)]))
    r, c = (draw(st.integers(0 if draw(st.integers(0, 9)) == 5 else 1, min(2 * side + 9, 290))) for side in tile)
    x = varied((*lead, r, c), tile, draw(st.integers(0, 999)), draw(DTYPE))
    bad = draw(st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]))
    if bad is not None and x.numel():
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = bad
    return Case(x, tile, draw(SCALE), draw(FORMAT), draw(st.sampled_from([AMAX_MIN, SMALLEST_AMAX, 0.3])))


def assert_agrees(case: Case) -> None:
    """Check that codes, scales and values in any dtype equal those of the loop over each matrix and tile."""
    x, tile, _, format, _ = case
    codes, scales = quantize_tiles(*case)
    assert (codes.dtype, scales.dtype) == (FORMATS[format].dtype, torch.float32)
    assert same(tile_scales(*case), scales)
    back = dequantize_tiles(codes, scales, tile, format, columns=x.shape[-1])
    rounded = round_tiles(*case, torch.float32)
    of = (a.reshape(-1, *a.shape[-2:]) if a.numel() else () for a in (x, codes, scales, back, rounded))
    for matrix, code, s, *values in zip(*of, strict=True):
        want_codes, want_scales, want = quantized(matrix.float().numpy(), *case[1:])
        assert np.array_equal(raw(code), stored(want_codes, format)) and same(s, want_scales)
        assert all(same(value, want) for value in values)
    for dtype in (torch.bfloat16, torch.float16):
        for got in (dequantize_tiles(codes, scales, tile, format, dtype, x.shape[-1]), round_tiles(*case, dtype)):
            assert got.dtype == dtype and same(got, back.to(dtype))


@settings(max_examples=400)
@given(cases(), st.integers(1, 2000))
def test_codes_scales_and_values_of_each_tile(case: Case, strip: int) -> None:
    """Strips of any size change nothing; a tile that holds an infinity or NaN is NaN as a whole, and no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsmini.numerics.quantization.ELEMENTS_AT_A_TIME", strip)
        assert_agrees(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_SCALE
@EVERY_FORMAT
def test_any_magnitude(dtype: torch.dtype, scale: Any, format: Any) -> None:
    for magnitude in (0.0, 1e-45, 1e-44, 1e-38, 1e-20, 1.0, 1e30, 3e38, torch.inf):
        x = torch.full((3, 130), min(magnitude, torch.finfo(dtype).max), dtype=dtype)
        x[1] = 0
        for amax_min in (AMAX_MIN, SMALLEST_AMAX):
            assert_agrees(Case(x, (1, 128), scale, format, amax_min))
        back = round_tiles(x, (1, 128), scale, format, SMALLEST_AMAX, torch.float32)
        assert (back[1] == 0).all()
        if magnitude == 0 or 1e-30 < magnitude < 3e38:
            assert relative_error(back, x) <= UNIT[format]


@EVERY_SCALE
@EVERY_FORMAT
def test_scales_next_to_powers_of_two(scale: Any, format: Any) -> None:
    """A logarithm is wrong for magnitudes a few bits from the format's largest times a power of two."""
    powers = torch.arange(-60, 61, dtype=torch.float32).exp2() * FORMATS[format].max
    bits = powers.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    assert_agrees(Case(bits.view(torch.float32), (1, 1), scale, format, SMALLEST_AMAX))


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=6),
    st.integers(0, 140),
    st.sampled_from([(1, 128), (128, 1), (128, 128), (7, 5), (16, 1)]),
    *(SCALE, FORMAT, DTYPE, st.booleans()),
)
def test_tiles_begin_anew_with_each_group(
    sizes: list[int], c: int, tile: Any, scale: Any, format: Any, dtype: torch.dtype, bad: bool
) -> None:
    x = varied((sum(sizes), c), (3, 50), len(sizes), dtype)
    if bad and x.numel():
        x[len(x) // 2, c // 2] = torch.nan
    ends = torch.tensor(sizes).cumsum(0)
    want = quantized_groups(x.float().numpy(), ends.tolist(), tile, scale, format, AMAX_MIN)
    for out, numbers in ((torch.float32, ends), (torch.bfloat16, ends.int())):
        got = round_tiles(x, tile, scale, format, AMAX_MIN, out, numbers)
        assert got.dtype == out and same(got, torch.from_numpy(want).to(out))


@pytest.mark.parametrize("shape", [(2048, 512), (4, 512, 512), (64, 32, 512)])
@pytest.mark.parametrize("tile", [(1, 128), (128, 128)])
def test_no_copy_of_a_whole_matrix_in_fp32(shape: tuple[int, ...], tile: Any) -> None:
    x = torch.randn(shape).bfloat16()
    assert x.numel() > ELEMENTS_AT_A_TIME
    strip = max(ELEMENTS_AT_A_TIME, tile[0] * x.numel() // shape[-2])  # one row of tiles at least
    codes, scales = quantize_tiles(x, tile, "ue8m0", "e4m3", AMAX_MIN)
    for call in (
        lambda: quantize_tiles(x, tile, "ue8m0", "e4m3", AMAX_MIN),
        lambda: dequantize_tiles(codes, scales, tile, "e4m3", torch.bfloat16),
        lambda: round_tiles(x, tile, "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16),
    ):
        with Operations() as seen:
            call()
        largest = max(result.numel for result in seen.results if result.dtype == torch.float32)
        assert min(strip, x.numel()) // 2 <= largest <= strip


def test_codes_under_scales_that_are_too_small_are_the_largest() -> None:
    """No code is NaN for what does not fit."""
    for format in NAMES:
        codes = encode_tiles(torch.tensor([[1e30, -1e30, 3.0]]), torch.ones(1, 1), (1, 128), format)
        f = FORMATS[format]
        assert same(f.decode(codes, 3), [[f.max, -f.max, 3.0]])


def test_scales_that_are_not_one_a_tile() -> None:
    codes, scales = quantize_tiles(torch.ones(130, 128), (128, 128), "fp32", "e4m3", AMAX_MIN)
    want = "scales of shape [1, 1] do not fit [130, 128] in tiles of 128x128; want [2, 1]"
    assert refusal(dequantize_tiles, codes, scales[:1], (128, 128)) == want
    assert "want [2, 1]" in refusal(dequantize_tiles, codes, scales.mT, (128, 128))
    assert "want [1, 2, 1]" in refusal(dequantize_tiles, codes.unsqueeze(0), scales, (128, 128))
    assert "want [2, 1]" in refusal(encode_tiles, torch.ones(130, 128), scales[0], (128, 128))
