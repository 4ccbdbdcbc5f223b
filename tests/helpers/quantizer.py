"""Quantize a second time, in numpy, one tile after the other, from tables of exact fractions.

Nothing of it comes from dsmini or is computed in the same way. A code is found between the midpoints of a format's
values, which float64 holds exactly, and a power of two comes from frexp. numpy divides and multiplies FP32 by the rules
of IEEE, so all results are bitwise.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsmini.numerics import QuantizedTensor

FLOAT, CODES = NDArray[np.float32], NDArray[np.int64]
# bits of exponent and fraction, codes of the largest value and of NaN, both without sign
LAYOUT = {"e4m3": (4, 3, 0x7E, 0x7F), "e5m2": (5, 2, 0x7B, 0x7F), "e5m6": (5, 6, 0x7BF, 0x7FF)}
NAMES = tuple(LAYOUT)
UNIT = {name: 2.0 ** -(bits + 1) for name, (_, bits, *_) in LAYOUT.items()}
"""Largest relative error of rounding a normal number."""


@functools.cache
def table(format: str) -> tuple[Fraction, ...]:
    """Return the format's finite values from zero on; the index of a value is its code without sign."""
    exponent_bits, fraction_bits, largest, _ = LAYOUT[format]
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(largest + 1):
        exponent, fraction = code >> fraction_bits, Fraction(code & (2**fraction_bits - 1), 2**fraction_bits)
        values.append(
            Fraction(2) ** (exponent - bias) * (1 + fraction) if exponent else Fraction(2) ** (1 - bias) * fraction
        )
    return tuple(values)


@functools.cache
def midpoints(format: str) -> NDArray[np.float64]:
    """Return the midpoints between neighbours, exact in float64."""
    values = table(format)
    exact = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    out = np.array([float(m) for m in exact])
    assert [Fraction(m) for m in out] == exact
    return out


def nearest(x: FLOAT, format: str) -> CODES:
    """Return the code with sign of the nearest value: the even one of a tie, the largest beyond the range, or NaN's."""
    exponent_bits, fraction_bits, _, nan = LAYOUT[format]
    with np.errstate(invalid="ignore"):  # numpy warns about signalling NaN
        between, size = midpoints(format), np.abs(x.astype(np.float64))
    code = np.searchsorted(between, size, side="left")
    tied = (code < len(between)) & (between[np.minimum(code, len(between) - 1)] == size)
    code = np.where(tied, code + code % 2, code) + (np.signbit(x).astype(np.int64) << (exponent_bits + fraction_bits))
    return np.where(np.isnan(x), nan, code)


@functools.cache
def meanings(format: str) -> FLOAT:
    """Return the value of each code with sign, NaN for codes that `nearest` never returns."""
    half = np.full(1 << sum(LAYOUT[format][:2]), np.nan, np.float32)
    half[: len(table(format))] = [float(v) for v in table(format)]
    return np.concatenate([half, -half])


def meant(codes: CODES, format: str) -> FLOAT:
    return meanings(format)[codes]


def stored(codes: CODES, format: str) -> NDArray[np.uint8]:
    """Return the bytes of codes [..., c]: one each, or three little-endian bytes for two codes of 12 bits."""
    if format != "e5m6":
        return codes.astype(np.uint8)
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], -codes.shape[-1] % 8), np.int64)], axis=-1)
    pairs = (codes[..., 0::2] + 4096 * codes[..., 1::2]).astype("<u4")
    return pairs[..., None].view(np.uint8)[..., :3].reshape(*codes.shape[:-1], 3 * pairs.shape[-1])


def power_from(x: np.float32) -> np.float32:
    """Return the least power of two, at least 2^-126, that is not below x."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.float32(1), max(int(exponent) - (1 if fraction == 0.5 else 0), -126))


def tiles(rows: int, columns: int, tile: tuple[int, int]) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Yield row, column and elements of each tile."""
    for i, row in enumerate(range(0, rows, tile[0])):
        for j, column in enumerate(range(0, columns, tile[1])):
            yield i, j, (slice(row, row + tile[0]), slice(column, column + tile[1]))


def quantized(x: FLOAT, tile: tuple[int, int], scale: str, format: str, amax_min: float) -> tuple[CODES, FLOAT, FLOAT]:
    """Return codes with sign, scales and FP32 values of a matrix."""
    codes, values = np.full(x.shape, -1), np.full(x.shape, np.nan, np.float32)
    scales = np.full([-(-n // side) for n, side in zip(x.shape, tile, strict=True)], np.nan, np.float32)
    for i, j, block in tiles(*x.shape, tile):
        if not np.isfinite(x[block]).all():
            codes[block] = LAYOUT[format][3]
            continue
        amax = max(np.abs(x[block]).max(), np.float32(amax_min))
        s = amax / np.float32(float(table(format)[-1]))
        s = power_from(s) if scale == "ue8m0" else s
        scales[i, j] = s
        codes[block] = nearest(x[block] / s, format)
        with np.errstate(over="ignore"):  # the largest tiles: FP32 cannot hold the rounded-up value
            values[block] = meant(codes[block], format) * s
    return codes, scales, values


def quantized_groups(
    x: FLOAT, ends: Sequence[int], tile: tuple[int, int], scale: str, format: str, amax_min: float
) -> FLOAT:
    """Return the values of a matrix whose groups of rows are quantized one by one; `ends` are exclusive."""
    groups = itertools.pairwise([0, *ends])
    return np.concatenate([quantized(x[a:b], tile, scale, format, amax_min)[2] for a, b in groups])


def raw(codes: Tensor) -> NDArray[np.uint8]:
    """Return codes of any dtype as bytes."""
    return codes.detach().cpu().view(torch.uint8).numpy()


def same(got: Any, want: Any) -> bool:
    """Return True if FP32, BF16 or FP16 numbers have equal shapes and bits; any NaN equals any other."""
    bits = []
    for x in (got, want):
        x = np.asarray(x.detach().cpu().float() if isinstance(x, Tensor) else x, np.float32)
        bits.append(np.where(np.isnan(x), np.float32(np.nan), x).view(np.int32))
    return np.array_equal(*bits)


def alike(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Return True if two quantized tensors are equal in every field and bit."""
    fields = [(q.shape, q.tile, q.scale, q.format, q.dtype, q.codes.dtype, q.codes.shape) for q in (a, b)]
    return fields[0] == fields[1] and raw(a.codes).tobytes() == raw(b.codes).tobytes() and same(a.scales, b.scales)


EVERY_FORMAT = pytest.mark.parametrize("format", NAMES)
ANY = [  # shape, tile, shape of the scales
    ((300,), (1, 128), (3,)),
    ((7, 130), (1, 128), (7, 2)),
    ((130, 7), (128, 1), (2, 7)),
    ((130, 576), (128, 128), (2, 5)),
    ((2, 3, 130), [2, 64], (2, 2, 3)),
    ((0, 130), (1, 128), (0, 2)),
    ((1, 1, 5), (4, 4), (1, 1, 2)),
]
EVERY_CUT = pytest.mark.parametrize(("shape", "tile", "tiles"), ANY, ids=lambda case: str(case).replace(" ", ""))
