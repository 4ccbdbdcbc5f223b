"""Tiles in short formats: bit for bit what a loop over the tiles gives, for any shape, tile, format and scale."""

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
    dequantize_tiles,
    quantize,
    quantize_tiles,
    round_tiles,
)
from dsmini.numerics.tiles import STRIP
from tests.helpers.quantized import (
    DTYPE,
    EVERY_FORMAT,
    EVERY_SCALE,
    FLOOR,
    FORMAT,
    SCALE,
    SEED,
    agrees,
    cuts,
    numpy,
    varied,
)
from tests.helpers.quantizer import quantized, quantized_groups, raw, same, stored, tiles
from tests.helpers.tolerances import relative_error
from tests.helpers.watching import Operations

pytestmark = pytest.mark.usefixtures("reference_backend")


@settings(max_examples=200)
@given(cuts(), SCALE, FORMAT, DTYPE, FLOOR, SEED)
def test_codes_scales_and_values_of_each_tile(
    cut: Any, scale: Any, format: Any, dtype: torch.dtype, amax_min: float, seed: int
) -> None:
    shape, tile = cut
    assert agrees(varied(shape, tile, seed, dtype), tile, scale, format, amax_min)


@given(cuts(), SCALE, FORMAT, SEED)
def test_every_tile_is_close_to_what_it_was(cut: Any, scale: Any, format: Any, seed: int) -> None:
    shape, tile = cut
    x = varied(shape, tile, seed)
    back = round_tiles(x, tile, scale, format, SMALLEST_AMAX, torch.float32)
    spec = FORMATS[format]
    # below the floor a tile has the floor's scale, at most doubled to a power of two, and its numbers become subnormal
    step = 2 * SMALLEST_AMAX / spec.max * spec.min_subnormal
    for _, _, block in tiles(*x.shape, tile):
        if 0 < x[block].abs().max() < SMALLEST_AMAX:
            bound = torch.maximum(spec.unit * x[block].abs().double(), torch.tensor(step / 2).double())
            assert ((back[block].double() - x[block].double()).abs() <= bound).all()
        else:
            assert relative_error(back[block], x[block]) <= spec.unit


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


def test_a_matrix_of_many_strips() -> None:
    x = varied((1200, 576), (128, 128), 1)
    assert agrees(x, (128, 128), "fp32", "e4m3", AMAX_MIN)
    assert agrees(x, (1, 128), "ue8m0", "e5m6", AMAX_MIN)


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


def test_a_group_that_is_no_number_leaves_its_neighbours_alone() -> None:
    x = torch.randn(20, 130)
    ends = torch.tensor([0, 9, 9, 11, 20])
    x[10, 3] = torch.nan
    got = round_tiles(x, (128, 1), "ue8m0", "e4m3", AMAX_MIN, torch.float32, ends)
    assert got[9:11, 3].isnan().all()
    assert got.isnan().sum() == 2
    assert same(got, quantized_groups(numpy(x), ends.tolist(), (128, 1), "ue8m0", "e4m3", AMAX_MIN))


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_groups_without_elements(shape: tuple[int, int]) -> None:
    ends = torch.tensor([0, shape[0], shape[0]])
    got = round_tiles(torch.empty(shape), (4, 4), "fp32", "e5m6", AMAX_MIN, torch.bfloat16, ends)
    assert (got.shape, got.dtype) == (shape, torch.bfloat16)
