"""What quantisation means, a second time: in numpy, a tile after the other, from tables of exact fractions.

Nothing here is from dsmini, and nothing is computed as there: a code is searched between the midpoints of a format's
values (float64 holds them exactly), and a power of two is taken from frexp. numpy divides and multiplies FP32 as IEEE
says, so that all of it is bitwise.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLOAT, CODES = NDArray[np.float32], NDArray[np.int64]
# bits of exponent and fraction, the code of the largest value and that of NaN, both without sign
LAYOUT = {"e4m3": (4, 3, 0x7E, 0x7F), "e5m2": (5, 2, 0x7B, 0x7F), "e5m6": (5, 6, 0x7BF, 0x7FF)}
NAMES = tuple(LAYOUT)


@functools.cache
def table(format: str) -> tuple[Fraction, ...]:
    """The format's finite values from zero on; the place of one is its code without sign."""
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
    """Halfway between neighbours, exact in float64."""
    values = table(format)
    exact = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    out = np.array([float(m) for m in exact])
    assert [Fraction(m) for m in out] == exact
    return out


def nearest(x: FLOAT, format: str) -> CODES:
    """The code with sign of the nearest value: the even one of two, the last for all beyond it, one for all NaN."""
    exponent_bits, fraction_bits, _, nan = LAYOUT[format]
    with np.errstate(invalid="ignore"):  # numpy complains of signalling NaN
        between, size = midpoints(format), np.abs(x.astype(np.float64))
    code = np.searchsorted(between, size, side="left")
    tied = (code < len(between)) & (between[np.minimum(code, len(between) - 1)] == size)
    code = np.where(tied, code + code % 2, code) + (np.signbit(x).astype(np.int64) << (exponent_bits + fraction_bits))
    return np.where(np.isnan(x), nan, code)


@functools.cache
def decoded(format: str) -> FLOAT:
    """The value of each code with sign, NaN for those that `nearest` never gives."""
    half = np.full(1 << (LAYOUT[format][0] + LAYOUT[format][1]), np.nan, np.float32)
    half[: len(table(format))] = [float(v) for v in table(format)]
    return np.concatenate([half, -half])


def meant(codes: CODES, format: str) -> FLOAT:
    """The values of codes with sign."""
    return decoded(format)[codes]


def stored(codes: CODES, format: str) -> NDArray[np.uint8]:
    """The bytes of codes [..., c]: one each, or for 12 bits a little-endian number of three for two of them."""
    if format != "e5m6":
        return codes.astype(np.uint8)
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], -codes.shape[-1] % 8), np.int64)], axis=-1)
    pairs = (codes[..., 0::2] + 4096 * codes[..., 1::2]).astype("<u4")
    return pairs[..., None].view(np.uint8)[..., :3].reshape(*codes.shape[:-1], 3 * pairs.shape[-1])


def power_from(x: np.float32) -> np.float32:
    """The least power of two, 2^-126 or more, that is not below x."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.float32(1), max(int(exponent) - (1 if fraction == 0.5 else 0), -126))


def tiles(rows: int, columns: int, tile: tuple[int, int]) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Row and column of each tile, and its elements."""
    for i, row in enumerate(range(0, rows, tile[0])):
        for j, column in enumerate(range(0, columns, tile[1])):
            yield i, j, (slice(row, row + tile[0]), slice(column, column + tile[1]))


def quantized(x: FLOAT, tile: tuple[int, int], scale: str, format: str, amax_min: float) -> tuple[CODES, FLOAT, FLOAT]:
    """Codes with sign, scales and FP32 values of a matrix."""
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
        with np.errstate(over="ignore"):  # the largest tiles of all: rounded up, what FP32 held it does not
            values[block] = meant(codes[block], format) * s
    return codes, scales, values


def quantized_groups(
    x: FLOAT, ends: Sequence[int], tile: tuple[int, int], scale: str, format: str, amax_min: float
) -> FLOAT:
    """The values of a matrix whose groups of rows are quantised one by one; a group ends before its end."""
    groups = itertools.pairwise([0, *ends])
    return np.concatenate([quantized(x[a:b], tile, scale, format, amax_min)[2] for a, b in groups])


def raw(codes: Tensor) -> NDArray[np.uint8]:
    """Codes of any dtype as bytes."""
    return codes.detach().cpu().view(torch.uint8).numpy()


def same(got: Any, want: Any) -> bool:
    """Whether FP32, BF16 or FP16 numbers are the same in shape and every bit; one NaN is like another."""
    bits = []
    for x in (got, want):
        x = np.asarray(x.detach().cpu().float() if isinstance(x, Tensor) else x, np.float32)
        bits.append(np.where(np.isnan(x), np.float32(np.nan), x).view(np.int32))
    return np.array_equal(*bits)
