"""Tiles in short formats: bit for bit what a loop over the tiles gives, for any shape, tile, format and scale."""

from collections.abc import Iterator
from typing import Any

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
    quantize,
    quantize_tiles,
    round_tiles,
    tile_scales,
)
from dsmini.numerics.tiles import STRIP
from tests.helpers.configs import refusal
from tests.helpers.quantizer import (
    EVERY_FORMAT,
    NAMES,
    meant,
    quantized,
    quantized_groups,
    raw,
    same,
    stored,
    tiles,
)
from tests.helpers.tolerances import relative_error
from tests.helpers.watching import Operations

FORMAT, SCALE = st.sampled_from(NAMES), st.sampled_from(["ue8m0", "fp32"])
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FLOOR, SEED = st.sampled_from([AMAX_MIN, SMALLEST_AMAX, 0.3]), st.integers(0, 999)
TILES = [(1, 128), (128, 1), (128, 128), (7, 5), (16, 16), (1, 1)]
EVERY_SCALE = pytest.mark.parametrize("scale", ["ue8m0", "fp32"])


@pytest.fixture(autouse=True, scope="module")
def _reference_backend() -> Iterator[None]:
    """Plain PyTorch defines the bits; fast versions are compared with it elsewhere."""
    with ops.use("reference"):
        yield


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draw a tile and the shape of a matrix of up to 3 x 3 tiles, mostly ragged and sometimes empty."""
    tile = draw(st.sampled_from(TILES))
    shape = [draw(st.integers(0 if draw(st.integers(0, 9)) == 5 else 1, min(2 * side + 9, 290))) for side in tile]
    return (shape[0], shape[1]), tile


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


def numpy(x: Tensor) -> Any:
    return x.float().numpy()


def agrees(x: Tensor, tile: tuple[int, int], scale: Any, format: Any, amax_min: float) -> bool:
    """Return True if codes, scales and values of a matrix equal those of the loop."""
    codes, scales = quantize_tiles(x, tile, scale, format, amax_min)
    want_codes, want_scales, want = quantized(numpy(x), tile, scale, format, amax_min)
    assert (codes.dtype, scales.dtype) == (FORMATS[format].dtype, torch.float32)
    return (
        np.array_equal(raw(codes), stored(want_codes, format))
        and same(scales, want_scales)
        and same(tile_scales(x, tile, scale, format, amax_min), scales)
        and same(dequantize_tiles(codes, scales, tile, format, columns=x.shape[1]), want)
        and same(round_tiles(x, tile, scale, format, amax_min, torch.float32), want)
    )


@settings(max_examples=200)
@given(cuts(), SCALE, FORMAT, DTYPE, FLOOR, SEED)
def test_codes_scales_and_values_of_each_tile(
    cut: Any, scale: Any, format: Any, dtype: torch.dtype, amax_min: float, seed: int
) -> None:
    shape, tile = cut
    assert agrees(varied(shape, tile, seed, dtype), tile, scale, format, amax_min)


@EVERY_FORMAT
@EVERY_SCALE
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), pytest.param((7, 5), marks=pytest.mark.slow)])
def test_rows_and_columns_that_are_no_multiple_of_128(tile: Any, scale: Any, format: Any) -> None:
    """576 rows and 130 columns, as one of the released projections has rows, and enough numbers for rare roundings."""
    x = varied((576, 130), tile, 3)
    assert agrees(x, tile, scale, format, AMAX_MIN)
    assert agrees(x.mT, tile, scale, format, AMAX_MIN)  # no contiguous rows


@given(cuts(), st.lists(st.integers(1, 3), max_size=2), SCALE, FORMAT, SEED)
def test_leading_dimensions_are_independent(cut: Any, lead: list[int], scale: Any, format: Any, seed: int) -> None:
    shape, tile = cut
    x = varied((*lead, *shape), tile, seed)
    codes, scales = quantize_tiles(x, tile, scale, format, AMAX_MIN)
    back = dequantize_tiles(codes, scales, tile, format, columns=shape[1])
    rounded = round_tiles(x, tile, scale, format, AMAX_MIN, torch.float32)
    assert scales.shape == (*lead, -(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    assert codes.shape[:-1] == x.shape[:-1]
    for index in np.ndindex(*lead):
        want_codes, want_scales, want = quantized(numpy(x[index]), tile, scale, format, AMAX_MIN)
        assert np.array_equal(raw(codes[index]), stored(want_codes, format))
        assert same(scales[index], want_scales)
        assert same(back[index], want)
        assert same(rounded[index], want)


@given(cuts(), SCALE, FORMAT, st.sampled_from([torch.bfloat16, torch.float16]), SEED)
def test_values_are_rounded_once_to_the_dtype(cut: Any, scale: Any, format: Any, dtype: torch.dtype, seed: int) -> None:
    shape, tile = cut
    x = varied(shape, tile, seed)
    codes, scales = quantize_tiles(x, tile, scale, format, AMAX_MIN)
    want = torch.from_numpy(quantized(numpy(x), tile, scale, format, AMAX_MIN)[2]).to(dtype)
    for got in (
        dequantize_tiles(codes, scales, tile, format, dtype, shape[1]),
        round_tiles(x, tile, scale, format, AMAX_MIN, dtype),
    ):
        assert got.dtype == dtype
        assert same(got, want)
    if dtype == torch.bfloat16 and scale == "ue8m0":
        assert same(want, dequantize_tiles(codes, scales, tile, format, columns=shape[1]))


@given(st.sampled_from([(), (3,), (2, 2)]), st.integers(0, 9), st.integers(0, 300), SCALE, FORMAT, DTYPE, SEED)
def test_a_row_or_a_tensor_under_one_scale(
    lead: tuple[int, ...], r: int, c: int, scale: Any, format: Any, dtype: torch.dtype, seed: int
) -> None:
    x = varied((*lead, r, c), (3, 50), seed, dtype)
    rows = numpy(x).reshape(int(np.prod([*lead, r])), c)
    for tile, cut, shape in (("row", (1, max(1, c)), (*lead, r)), ("tensor", (max(1, len(rows)), max(1, c)), None)):
        q = quantize(x, tile, scale, format)  # pyright: ignore
        codes, scales, values = quantized(rows, cut, scale, format, AMAX_MIN)
        assert np.array_equal(
            raw(q.codes).reshape(len(rows), -(-c // 8) * 12 if format == "e5m6" else c), stored(codes, format)
        )
        assert same(q.scales.flatten(), scales.flatten())
        assert same(q.dequantize(), values.reshape(x.shape))
        if x.numel():
            assert q.scales.shape == ((1,) * x.dim() if shape is None else (*shape, 1))


@given(cuts(), st.integers(1, 3), st.integers(1, 2000), FORMAT, SEED)
def test_strips_change_nothing(cut: Any, lead: int, strip: int, format: Any, seed: int) -> None:
    shape, tile = cut
    x = varied((lead, *shape), tile, seed)
    codes, scales = quantize_tiles(x, tile, "fp32", format, AMAX_MIN)
    back = dequantize_tiles(codes, scales, tile, format, columns=shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsmini.numerics.tiles.STRIP", strip)
        assert torch.equal(
            quantize_tiles(x, tile, "fp32", format, AMAX_MIN)[0].view(torch.uint8), codes.view(torch.uint8)
        )
        assert same(dequantize_tiles(codes, scales, tile, format, columns=shape[1]), back)
        assert same(round_tiles(x, tile, "fp32", format, AMAX_MIN, torch.float32), back)


@pytest.mark.parametrize("shape", [(2048, 512), (4, 512, 512), (64, 32, 512)])
@pytest.mark.parametrize("tile", [(1, 128), (128, 128)])
def test_no_copy_of_a_whole_matrix_in_fp32(shape: tuple[int, ...], tile: Any) -> None:
    x = torch.randn(shape).bfloat16()
    assert x.numel() > STRIP
    strip = max(STRIP, tile[0] * x.numel() // shape[-2])  # one row of tiles at least
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


# Groups of rows, each with tiles of its own


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=6),
    st.integers(1, 140),
    st.sampled_from([(1, 128), (128, 1), (128, 128), (7, 5), (16, 1)]),
    SCALE,
    FORMAT,
    st.sampled_from([torch.float32, torch.bfloat16]),
    SEED,
)
def test_tiles_begin_anew_with_each_group(
    sizes: list[int], c: int, tile: Any, scale: Any, format: Any, dtype: torch.dtype, seed: int
) -> None:
    x = varied((sum(sizes), c), (3, 50), seed, dtype)
    ends = torch.tensor(sizes).cumsum(0)
    want = quantized_groups(numpy(x), ends.tolist(), tile, scale, format, AMAX_MIN)
    for out in (torch.float32, torch.bfloat16):
        for numbers in (ends, ends.int()):
            got = round_tiles(x, tile, scale, format, AMAX_MIN, out, numbers)
            assert got.dtype == out
            assert same(got, torch.from_numpy(want).to(out))
    alone = [
        round_tiles(x[b - n : b], tile, scale, format, AMAX_MIN, torch.float32)
        for n, b in zip(sizes, ends.tolist(), strict=True)
    ]
    assert same(torch.cat(alone), want)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_groups_without_elements(shape: tuple[int, int]) -> None:
    ends = torch.tensor([0, shape[0], shape[0]])
    got = round_tiles(torch.empty(shape), (4, 4), "fp32", "e5m6", AMAX_MIN, torch.bfloat16, ends)
    assert (got.shape, got.dtype) == (shape, torch.bfloat16)


# Magnitudes and floors


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
