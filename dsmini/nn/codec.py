"""The formats of a cache's rows: numbers as they are, or a run of bytes.

In FP8 a row is, as in DeepSeek-V3.2 and V4, the numbers without position in E4M3, a scale for each tile of them, and
the rotated numbers in BF16:

                    numbers in E4M3   scales                       rotated, BF16   bytes        in BF16
    V3's latent     512               4 in FP32, one for each 128  64              656          1152
    V3.2's index    128               1 in FP32, a power of two    none            132          256
    V4's key        448               7 in E8M0, one for each 64   64              583 + 1 = 584   1024

V4's indexer has 128 numbers in FP4 with a scale for each 32: 64 + 4 = 68 bytes.

A format has the number of `numbers` in a row, the `width` and `dtype` of what is stored of them, and the functions
`encode` and `decode` between the two.

Source: DeepSeek-V3.2's and V4's released code; FlashMLA for the bytes. V4's order within a row is its own.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dsmini.numerics import AMAX_MIN, FORMATS, FP4_BLOCK, SMALLEST_AMAX, dequantize_tiles, quantize_tiles
from dsmini.numerics.fp4 import FP4_AMAX_MIN
from dsmini.numerics.quantization import FormatName, Scale

BLOCK_FP8 = 64
"""Numbers of V4's key that share a scale in FP8."""
V4_SCALES: Any = MappingProxyType({"scale": "ue8m0", "stored": torch.float8_e8m0fnu})
"""Scales of V4's rows."""


@dataclass(frozen=True)
class Numbers:
    """Numbers as they are, in a dtype."""

    numbers: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.numbers

    def encode(self, rows: Float[Tensor, "*n numbers"]) -> Float[Tensor, "*n width"]:
        return rows.to(self.dtype)

    def decode(self, stored: Float[Tensor, "*n width"], dtype: torch.dtype) -> Float[Tensor, "*n numbers"]:
        return stored.to(dtype)


@dataclass(frozen=True, kw_only=True)
class ByteRow:
    """Codes of numbers, a scale for each tile of them, rotated numbers in BF16, and zeros up to a multiple of bytes."""

    unrotated: int
    rotated: int = 0
    tile: int = 128
    scale: Scale = "fp32"
    format: FormatName = "e4m3"
    amax_min: float = SMALLEST_AMAX
    stored: torch.dtype = torch.float32
    """Dtype of a stored scale."""
    multiple: int = 1
    """Number of bytes of which a row is a multiple."""
    dtype: torch.dtype = torch.uint8

    @property
    def numbers(self) -> int:
        return self.unrotated + self.rotated

    @property
    def widths(self) -> list[int]:
        """Bytes of codes, scales, rotated numbers and zeros."""
        codes = FORMATS[self.format].width(self.unrotated)
        widths = [codes, -(-self.unrotated // self.tile) * self.stored.itemsize, 2 * self.rotated]
        return [*widths, -sum(widths) % self.multiple]

    @property
    def width(self) -> int:
        return sum(self.widths)

    def stored_in(self, dtype: torch.dtype | str) -> "Codec":
        """Return the format of the same numbers in the dtype of a cache: this one in "fp8"."""
        return Numbers(self.numbers, dtype) if isinstance(dtype, torch.dtype) else self

    def encode(self, rows: Float[Tensor, "*n numbers"]) -> UInt8[Tensor, "*n width"]:
        unrotated, rotated = rows.split((self.unrotated, self.rotated), -1)
        codes, scales = quantize_tiles(unrotated.float(), (1, self.tile), self.scale, self.format, self.amax_min)
        parts = (codes, scales.to(self.stored).contiguous(), rotated.to(torch.bfloat16).contiguous())
        return torch.nn.functional.pad(torch.cat([part.view(torch.uint8) for part in parts], -1), (0, self.widths[3]))

    def decode(self, stored: UInt8[Tensor, "*n width"], dtype: torch.dtype) -> Float[Tensor, "*n numbers"]:
        # copies: a view as wider numbers needs an aligned start
        codes, scales, rotated, _ = (
            part.clone(memory_format=torch.contiguous_format) for part in stored.split(self.widths, -1)
        )
        codes, scales = codes.view(FORMATS[self.format].dtype), scales.view(self.stored).float()
        numbers = dequantize_tiles(codes, scales, (1, self.tile), self.format, dtype, self.unrotated)
        return torch.cat((numbers, rotated.view(torch.bfloat16).to(dtype)), -1) if self.rotated else numbers


Codec = Numbers | ByteRow
"""The format of a row."""


def latent_row(c: int, r: int) -> ByteRow:
    """Return V3.2's format of an MLA layer's latent and rotary key."""
    return ByteRow(unrotated=c, rotated=r)


def index_row(d: int) -> ByteRow:
    """Return V3.2's format of an indexer's key."""
    return ByteRow(unrotated=d, scale="ue8m0", amax_min=AMAX_MIN)


def key_row(c: int, r: int) -> ByteRow:
    """Return V4's format of a key that is its own value."""
    return ByteRow(unrotated=c, rotated=r, tile=BLOCK_FP8, amax_min=AMAX_MIN, multiple=8, **V4_SCALES)


def index_entry_row(d: int) -> ByteRow:
    """Return V4's format of an indexer's key: FP4, two numbers a byte."""
    return ByteRow(unrotated=d, tile=min(FP4_BLOCK, d), format="e2m1", amax_min=FP4_AMAX_MIN, **V4_SCALES)
