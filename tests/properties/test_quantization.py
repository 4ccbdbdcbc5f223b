"""Tiles of E4M3: against a loop over the tiles, for any shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini.numerics import dequantize_tiles, quantize_tiles
from tests.configs import refusal
from tests.folders import blocks_of
from tests.tolerances import relative_error

E4M3_UNIT = 2.0**-4
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 70))
TILES = st.sampled_from([(16, 16), (1, 16), (16, 1), (128, 128), (7, 5)])


def varied(shape: tuple[int, ...], seed: int, tile: tuple[int, int]) -> Tensor:
    """A matrix whose tiles differ in magnitude by powers of ten, so that a scale in the wrong place is seen."""
    torch.manual_seed(seed)
    x = torch.randn(shape)
    for i, j, block in blocks_of(x, tile):
        x[block] *= 10.0 ** ((5 * i + 3 * j) % 7 - 3)
    return x


@given(SHAPES, TILES, st.integers(0, 99))
def test_codes_and_scales_of_each_tile(shape: tuple[int, int], tile: tuple[int, int], seed: int) -> None:
    x = varied(shape, seed, tile)
    codes, scales = quantize_tiles(x, tile)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert scales.shape == (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    back = dequantize_tiles(codes, scales, tile)
    for i, j, block in blocks_of(x, tile):
        scale = x[block].abs().max() / 448
        assert scales[i, j] == scale
        assert torch.equal(codes[block].float(), (x[block] / scale).to(codes.dtype).float())
        assert torch.equal(back[block], codes[block].float() * scale)
        assert relative_error(back[block], x[block]) < E4M3_UNIT
    assert torch.equal(dequantize_tiles(codes, scales, tile, torch.bfloat16), back.bfloat16())


@given(SHAPES, TILES, st.integers(1, 3), st.integers(0, 99))
def test_leading_dimensions_are_independent(
    shape: tuple[int, int], tile: tuple[int, int], batch: int, seed: int
) -> None:
    x = torch.stack([varied(shape, seed + i, tile) for i in range(batch)]).unsqueeze(1)
    codes, scales = quantize_tiles(x, tile)
    back = dequantize_tiles(codes, scales, tile)
    for i in range(batch):
        alone = quantize_tiles(x[i, 0], tile)
        assert torch.equal(codes[i, 0].float(), alone[0].float())
        assert torch.equal(scales[i, 0], alone[1])
        assert torch.equal(back[i, 0], dequantize_tiles(*alone, tile))


def test_a_large_matrix_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    x = varied((576, 300), 1, (128, 128))
    whole = quantize_tiles(x)
    want = dequantize_tiles(*whole)
    monkeypatch.setattr("dsmini.numerics.quantization.STRIP", 1)
    assert torch.equal(quantize_tiles(x)[0].float(), whole[0].float())
    assert torch.equal(dequantize_tiles(*whole), want)


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-38, 1e-20, 1.0, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_magnitude(magnitude: float, dtype: torch.dtype) -> None:
    x = torch.full((3, 130), magnitude, dtype=dtype)
    x[1] = 0
    codes, scales = quantize_tiles(x)
    back = dequantize_tiles(codes, scales)
    assert torch.isfinite(back).all()
    assert (back[1] == 0).all()
    if magnitude == 0 or magnitude > 1e-30:
        assert relative_error(back, x) < 1e-6


def test_what_cannot_be_quantised() -> None:
    assert "infinities or NaN" in refusal(quantize_tiles, torch.tensor([[1.0, torch.inf]]))
    codes, scales = quantize_tiles(torch.ones(130, 128))
    assert "want [2, 1]" in refusal(dequantize_tiles, codes, scales[:1])
    assert "want [2, 1]" in refusal(dequantize_tiles, codes, scales.mT)
