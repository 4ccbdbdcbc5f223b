"""Shapes, tiles and numbers for tests of quantization, and the comparison with a loop over tiles."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dsmini.numerics import (
    AMAX_MIN,
    FORMATS,
    SMALLEST_AMAX,
    QuantizedTensor,
    dequantize_tiles,
    quantize_tiles,
    round_tiles,
    tile_scales,
)
from tests.helpers.quantizer import NAMES, quantized, raw, same, stored, tiles

FORMAT, SCALE = st.sampled_from(NAMES), st.sampled_from(["ue8m0", "fp32"])
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FLOOR, SEED = st.sampled_from([AMAX_MIN, SMALLEST_AMAX, 0.3]), st.integers(0, 999)
TILES = [(1, 128), (128, 1), (128, 128), (7, 5), (16, 16), (1, 1)]
EVERY_FORMAT = pytest.mark.parametrize("format", NAMES)
EVERY_SCALE = pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
ANY = [  # shape, tile, shape of the scales
    ((300,), (1, 128), (3,)),
    ((300,), "row", (1,)),
    ((300,), "tensor", (1,)),
    ((7, 130), (1, 128), (7, 2)),
    ((130, 7), (128, 1), (2, 7)),
    ((130, 576), (128, 128), (2, 5)),
    ((7, 130), "row", (7, 1)),
    ((7, 130), "tensor", (1, 1)),
    ((2, 3, 130), [2, 64], (2, 2, 3)),
    ((2, 3, 130), "row", (2, 3, 1)),
    ((2, 3, 130), "tensor", (1, 1, 1)),
    ((0, 130), (1, 128), (0, 2)),
    ((0, 130), "tensor", (0, 1)),
    ((2, 0), "row", (2, 0)),
    ((1, 1, 5), (4, 4), (1, 1, 2)),
]
EVERY_CUT = pytest.mark.parametrize(("shape", "tile", "tiles"), ANY, ids=lambda case: str(case).replace(" ", ""))


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


def alike(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Return True if two quantized tensors are equal in every field and bit."""
    fields = [(q.shape, q.tile, q.scale, q.format, q.dtype, q.codes.dtype, q.codes.shape) for q in (a, b)]
    return fields[0] == fields[1] and raw(a.codes).tobytes() == raw(b.codes).tobytes() and same(a.scales, b.scales)
