"""The cache of compressed attention: the window's rows, the entries, and the rows of which the next entry is made.

A layer of DeepSeek-V4 stores three kinds of rows, and its indexer the last two again:

    window     the key-value row of the latest tokens               a ring: position p is in place p mod its size
    entries    one row for each whole block of m tokens             entry i is in place i
    raw        FP32 rows [C | Z] of the latest tokens               a ring, as long as an entry is made of

The two rings have SLACK places more, so that the last tokens may be taken back: their rows are written again. Nothing
is moved when an entry is complete or a token is taken back, and rows of unequal length need no care: a place follows
from a position alone, and what lies in places that do not count is hidden from every query.

In FP8 a row is a run of bytes as in DeepSeek-V4: the numbers without position in E4M3, the rotated ones in BF16, then a
power of two as scale for each 64 of the former, and zeros up to a multiple of 8. At V4's sizes that is 448 + 2 * 64 + 7
+ 1 = 584 bytes. The indexer's entry is FP4 with a scale for each 32 numbers: 64 + 4 = 68 bytes.

Source: DeepSeek-V4 report (arXiv 2606.19348), section 2.3; FlashMLA for the bytes, whose order within a row is its own.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsmini.config.model import SLACK
from dsmini.nn.cache import CachePositions, LayerCache, LayerCacheView
from dsmini.numerics import AMAX_MIN, dequantize_tiles, quantize_tiles
from dsmini.numerics.fp4 import dequantize_fp4, quantize_fp4

BLOCK_FP8 = 64
"""Numbers of a row that share a scale in FP8."""
BLOCK_FP4 = 32
"""The same in FP4."""


class Rows(LayerCache):
    """Stored rows, [b, size, width], as numbers. The row of position p is in place p mod size."""

    def write(self, rows: Float[Tensor, "b s w"], positions: CachePositions) -> None:
        """Store the rows of new tokens in their places, the last of those that share one, and padding nowhere."""
        self._store(self._encode(rows), positions)

    def extend(
        self, rows: Float[Tensor, "b s w"], at: CachePositions, n: int, dtype: torch.dtype
    ) -> Float[Tensor, "b t w"]:
        """Write, and return the n rows before the new ones and these, as they are stored; of a fresh cache these alone.

        Rows before position 0 are any numbers.
        """
        encoded, n = self._encode(rows), 0 if at.all_new else n
        columns = torch.arange(-n, 0, device=self.data.device)
        before = self.read_at((at.positions[:, :1] + columns) % self.data.shape[1], dtype)
        self._store(encoded, at)
        return torch.cat((before.expand(len(rows), -1, -1), self._decode(encoded, dtype)), 1)

    def read(self, end: int, dtype: torch.dtype) -> Float[Tensor, "b {end} w"]:
        return self._decode(self.data[:, :end], dtype)

    def read_at(self, places: Int[Tensor, "#b *n"], dtype: torch.dtype) -> Float[Tensor, "b *n w"]:
        """Return the rows in these places."""
        sequence = torch.arange(len(self.data), device=self.data.device)
        return self._decode(self.data[sequence.view(-1, *[1] * (places.dim() - 1)), places], dtype)

    def _store(self, encoded: Tensor, at: CachePositions) -> None:
        size = self.data.shape[1]
        if at.is_token is None:
            self.data[:, at.positions[0, -size:] % size] = encoded[:, -size:]
            return
        sequence, column, position = at.places(size)
        self.data[sequence, position % size] = encoded[sequence, column]

    def _decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)


class FP8Rows(Rows):
    """Rows as bytes: c numbers in E4M3, r numbers in BF16, the scales of the former."""

    def __init__(self, batch_size: int, size: int, c: int, r: int, device: torch.device) -> None:
        scales = -(-c // BLOCK_FP8)
        used = c + 2 * r + scales
        self.widths: list[int] = [c, 2 * r, scales, -used % 8]
        self.numbers: int = c + r
        super().__init__(batch_size, size, sum(self.widths), torch.uint8, device)

    def _encode(self, rows: Tensor) -> Tensor:
        c, r = self.widths[0], self.widths[1] // 2
        nope, rope = rows.split((c, r), -1)
        codes, scales = quantize_tiles(nope.float(), (1, BLOCK_FP8), "ue8m0", "e4m3", AMAX_MIN)
        parts = codes, rope.to(torch.bfloat16).contiguous(), scales.to(torch.float8_e8m0fnu)
        encoded = [part.view(torch.uint8) for part in parts]
        return torch.cat((*encoded, encoded[0].new_zeros(*rows.shape[:-1], self.widths[3])), -1)

    def _decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        codes, rope, scales, _ = (part.contiguous() for part in stored.split(self.widths, -1))
        exponents = scales.view(torch.float8_e8m0fnu).float()
        nope = dequantize_tiles(codes.view(torch.float8_e4m3fn), exponents, (1, BLOCK_FP8), "e4m3", dtype)
        # a copy: a view as wider numbers needs an aligned start
        return torch.cat((nope, rope.clone().view(torch.bfloat16).to(dtype)), -1)


class FP4Rows(Rows):
    """Rows as bytes: d numbers in FP4, two a byte, and their scales."""

    def __init__(self, batch_size: int, size: int, d: int, device: torch.device) -> None:
        self.block: int = min(BLOCK_FP4, d)
        self.widths: list[int] = [d // 2, d // self.block]
        self.numbers: int = d
        super().__init__(batch_size, size, sum(self.widths), torch.uint8, device)

    def _encode(self, rows: Tensor) -> Tensor:
        return torch.cat(quantize_fp4(rows.float(), self.block), -1)

    def _decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        packed, scales = stored.split(self.widths, -1)
        return dequantize_fp4(packed, scales, dtype)


class CompressedCache(LayerCache):
    """The rows of a layer, of which a layer with the window alone has no entries, and an indexer no window."""

    slack: int | None = SLACK

    window: Any
    entries: Any
    raw: Any

    def __init__(self, window: Rows | None, entries: Rows | None = None, raw: Rows | None = None) -> None:
        self.window, self.entries, self.raw = window, entries, raw
        self.index: LayerCache | None = None
        self.halves: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    @property
    def parts(self) -> list[LayerCache]:
        """All rows."""
        return [part for part in (self.window, self.entries, self.raw, self.index) if part is not None]

    def select(self, index: Int[Tensor, " n"]) -> None:
        for part in self.parts:
            part.select(index)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def stored(cache: LayerCacheView) -> CompressedCache:
    """Return what a layer or its indexer stores."""
    assert isinstance(cache.store, CompressedCache), "a cache is made by the new_cache of its model"
    return cache.store
