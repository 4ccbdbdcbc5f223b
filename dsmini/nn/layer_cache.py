"""The rows that one layer caches, one of each token: numbers, or bytes in FP8.

MLA stores one row [c_kv | k_rope] for all heads together: kv_lora_rank + qk_rope_head_dim numbers a token and layer.
Its baselines MHA, GQA and MQA store [k | v] of every key-value head. DSA stores MLA's row, and the indexer's key in a
LayerCache of its own.

In FP8 a row of MLA is a run of bytes, as in DeepSeek-V3.2: the latent in E4M3, an FP32 scale for each 128 of its
numbers, and the rotary key in BF16. At V3's sizes that is 512 + 4 * 4 + 2 * 64 = 656 bytes, compared with 1152 in BF16.
The indexer's key is 128 codes and a scale, a power of two: 132 bytes, compared with 256.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.nn.positions import Window
from dsmini.numerics import AMAX_MIN, SMALLEST_AMAX, dequantize_tiles, quantize_tiles
from dsmini.numerics.tiles import Scale

_TILE = 128


class LayerCache:
    """The stored rows of one layer, [b, max_seq_len, width]. A subclass says what is in a row."""

    def __init__(self, batch_size: int, max_seq_len: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # zeros: a row that nobody wrote has weight 0 in the softmax, and 0 * NaN would be NaN
        self.data = torch.zeros(batch_size, max_seq_len, width, dtype=dtype, device=device)
        self.index: LayerCache | None = None
        """The indexer's keys, which have the same places; None without an indexer."""
        self._prepared: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    def write(self, rows: Float[Tensor, "b s w"], window: Window) -> None:
        """Store the rows of new tokens in their places, and those of padding nowhere."""
        encoded = self._encode(rows)
        if window.start is not None:
            self.data[:, window.start : window.start + rows.shape[1]] = encoded
            return
        assert window.real is not None, "rows of different lengths say which columns are valid"
        sequence, column = window.real.nonzero(as_tuple=True)
        position = window.positions.expand(len(rows), -1)[sequence, column]
        self.data[sequence, position] = encoded[sequence, column]

    def read(self, end: int, dtype: torch.dtype) -> Float[Tensor, "b {end} w"]:
        """Return the first `end` rows of every sequence as numbers of dtype."""
        return self.data[:, :end].to(dtype)

    def rounds(self, dtype: torch.dtype) -> bool:
        """Return True if rows of dtype are read as other numbers than were written."""
        return self.data.dtype != dtype

    def _encode(self, rows: Tensor) -> Tensor:
        return rows.to(self.data.dtype)

    def prepared(self, key: tuple[object, ...], make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return make(), called once and again when the key changes.

        MLA stores the absorbed halves of wkv_b here: they are of use only while something is decoded.
        """
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = (key, make())
        return self._prepared[1]

    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep the rows of these sequences, in this order."""
        self.data = self.data[index.to(self.data.device)]
        if self.index is not None:
            self.index.select(index)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, used or not, with that of the indexer's keys."""
        return self.data.untyped_storage().nbytes() + (0 if self.index is None else self.index.nbytes)


class KeyValueCache(LayerCache):
    """The rows [k | v] of all key-value heads, of one layer of MHA, GQA or MQA."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.kv_heads * (config.qk_nope_head_dim + config.v_head_dim)
        super().__init__(batch_size, max_seq_len, width, dtype, device)


class LatentCache(LayerCache):
    """The rows [c_kv | k_rope] of one layer of MLA, as numbers."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        super().__init__(batch_size, max_seq_len, width, dtype, device)


class IndexCache(LayerCache):
    """The keys of one layer's indexer, as numbers."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert config.index_head_dim is not None
        super().__init__(batch_size, max_seq_len, config.index_head_dim, dtype, device)


class FP8Cache(LayerCache):
    """Rows as bytes: c numbers as E4M3 codes with an FP32 scale for each 128, then r numbers in BF16."""

    scale: Scale = "fp32"
    amax_min = SMALLEST_AMAX

    def __init__(self, c: int, r: int, batch_size: int, max_seq_len: int, device: torch.device) -> None:
        self.c, self.r = c, r
        self.tiles = -(-self.c // _TILE)
        super().__init__(batch_size, max_seq_len, self.c + 4 * self.tiles + 2 * self.r, torch.uint8, device)

    def _encode(self, rows: Tensor) -> Tensor:
        latent, k_rope = rows.split((self.c, self.r), -1)
        codes, scales = quantize_tiles(latent.float(), (1, _TILE), self.scale, "e4m3", self.amax_min)
        parts = (codes, scales.contiguous(), k_rope.to(torch.bfloat16).contiguous())
        return torch.cat([part.view(torch.uint8) for part in parts], -1)

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        # copies: a view as wider numbers needs an aligned start
        codes, scales, k_rope = (
            part.clone(memory_format=torch.contiguous_format)
            for part in self.data[:, :end].split((self.c, 4 * self.tiles, 2 * self.r), -1)
        )
        codes, scales = codes.view(torch.float8_e4m3fn), scales.view(torch.float32)
        latent = dequantize_tiles(codes, scales, (1, _TILE), "e4m3", dtype)
        return torch.cat((latent, k_rope.view(torch.bfloat16).to(dtype)), -1) if self.r else latent


class FP8LatentCache(FP8Cache):
    """The rows [c_kv | k_rope] of one layer of MLA, as bytes: E4M3 codes, FP32 scales, BF16 rotary key."""

    def __init__(self, config: ModelConfig, batch_size: int, max_seq_len: int, device: torch.device) -> None:
        super().__init__(config.kv_lora_rank, config.qk_rope_head_dim, batch_size, max_seq_len, device)


class FP8IndexCache(FP8Cache):
    """The keys of one layer's indexer, as bytes: E4M3 codes, and scales that are powers of two."""

    scale = "ue8m0"
    amax_min = AMAX_MIN

    def __init__(self, config: ModelConfig, batch_size: int, max_seq_len: int, device: torch.device) -> None:
        assert config.index_head_dim is not None
        super().__init__(config.index_head_dim, 0, batch_size, max_seq_len, device)
