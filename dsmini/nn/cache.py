"""The cache of decoding: for each layer, one row of numbers for each token that it has seen.

MLA stores one row [c_kv | k_rope] for all heads together: kv_lora_rank + qk_rope_head_dim numbers a token and layer.
Its baselines MHA, GQA and MQA store [k | v] of every key-value head.

In FP8 a row of MLA is a run of bytes, as in DeepSeek-V3.2: the latent in E4M3, an FP32 scale for each 128 of its
numbers, and the rotary key in BF16. At V3's sizes that is 512 + 4 * 4 + 2 * 64 = 656 bytes, compared with 1152 in BF16.

All memory is allocated when a cache is made, max_seq_len rows for each sequence. The rows of a batch may have different
valid lengths; dsmini/nn/positions.py says where the new tokens of a call go.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.nn.positions import Window, last_valid, whole_numbers
from dsmini.numerics import SMALLEST_AMAX, dequantize_tiles, quantize_tiles

CacheDtype = torch.dtype | Literal["fp8"]
Form = Literal["auto", "expanded", "absorbed"]
_LATENT_TILE = 128


class LayerCache:
    """The stored rows of one layer, [b, max_seq_len, width]. A subclass says what is in a row."""

    def __init__(self, batch_size: int, max_seq_len: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # zeros: a row that nobody wrote has weight 0 in the softmax, and 0 * NaN would be NaN
        self.data = torch.zeros(batch_size, max_seq_len, width, dtype=dtype, device=device)
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

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, used or not."""
        return self.data.untyped_storage().nbytes()


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


class FP8LatentCache(LayerCache):
    """The rows [c_kv | k_rope] of one layer of MLA, as bytes: E4M3 codes, FP32 scales, BF16 rotary key."""

    def __init__(self, config: ModelConfig, batch_size: int, max_seq_len: int, device: torch.device) -> None:
        self.c, self.r = config.kv_lora_rank, config.qk_rope_head_dim
        self.tiles = -(-self.c // _LATENT_TILE)
        super().__init__(batch_size, max_seq_len, self.c + 4 * self.tiles + 2 * self.r, torch.uint8, device)

    def _encode(self, rows: Tensor) -> Tensor:
        latent, k_rope = rows.split((self.c, self.r), -1)
        codes, scales = quantize_tiles(latent.float(), (1, _LATENT_TILE), "fp32", "e4m3", SMALLEST_AMAX)
        parts = (codes, scales.contiguous(), k_rope.to(torch.bfloat16).contiguous())
        return torch.cat([part.view(torch.uint8) for part in parts], -1)

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        # copies: a view as wider numbers needs an aligned start
        codes, scales, k_rope = (
            part.clone(memory_format=torch.contiguous_format)
            for part in self.data[:, :end].split((self.c, 4 * self.tiles, 2 * self.r), -1)
        )
        codes, scales = codes.view(torch.float8_e4m3fn), scales.view(torch.float32)
        latent = dequantize_tiles(codes, scales, (1, _LATENT_TILE), "e4m3", dtype)
        return torch.cat((latent, k_rope.view(torch.bfloat16).to(dtype)), -1)


@dataclass(frozen=True, kw_only=True)
class Past:
    """One layer's part of a call with a cache."""

    store: LayerCache
    window: Window
    form: Form = "auto"
    """The way MLA attends to the store: auto counts the work of both forms."""

    def append(self, parts: tuple[Tensor, ...]) -> None:
        """Write the rows of the new tokens, whose parts [b, s, ...] lie side by side."""
        self.store.write(torch.cat(parts, -1), self.window)

    def extend(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Append, and return the parts of all rows to attend to: those of a fresh cache as they came."""
        self.append(parts)
        if self.window.fresh and not self.store.rounds(dtype):
            return parts
        rows = self.store.read(parts[0].shape[1] if self.window.fresh else self.window.end, dtype)
        return rows.split([part.shape[-1] for part in parts], -1)


class MTPCache:
    """The cache of the multi-token prediction blocks, which may have fewer tokens than the layers' cache."""

    def __init__(self, stores: list[LayerCache], hidden: Float[Tensor, "b m"], form: Form) -> None:
        self.form: Form = form
        self.stores = stores
        """One layer cache for each depth."""
        self.last = [hidden.clone() for _ in stores]
        """[b, m] for each depth: the hidden state at each row's last token, as the depth before made it."""
        self.lengths = torch.zeros(len(hidden), dtype=torch.int64)
        """[b], on the CPU: number of tokens of each row that the blocks have seen."""

    def window(self, s: int, new: Tensor | None = None, ahead: int = 0) -> Window:
        """Return the place of s new tokens, or of `new` [b] tokens padded to s, `ahead` tokens after the last."""
        data = self.stores[0].data
        return Window.after(self.lengths + ahead, s, new, data.shape[1], data.device)

    def shift(
        self, k: int, hidden: Float[Tensor, "b s m"], lengths: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b s m"]:
        """Return the hidden state before each new token from the states at the new tokens, and store the last one."""
        before = torch.cat((self.last[k][:, None].to(hidden.dtype), hidden[:, :-1]), 1)
        self.last[k] = last_valid(hidden, lengths, self.last[k])
        return before

    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order."""
        self.lengths = self.lengths[index]
        for store in self.stores:
            store.select(index)
        self.last = [hidden[index.to(hidden.device)] for hidden in self.last]


class Cache:
    """The caches of all layers, and the valid length of every row. Made by Transformer.new_cache.

    Args:
        mtp: also make a cache for the multi-token prediction blocks.
        form: how MLA attends to what is stored: auto counts the work of both forms at each call.
        hidden_dtype: dtype of the hidden states between the multi-token prediction blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_seq_len: int,
        dtype: CacheDtype,
        device: torch.device,
        *,
        mtp: bool = False,
        form: Form = "auto",
        hidden_dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(config, batch_size, max_seq_len, dtype, form)
        self.config, self.max_seq_len = config, max_seq_len
        self.form: Form = form

        def store() -> LayerCache:
            if dtype == "fp8":
                return FP8LatentCache(config, batch_size, max_seq_len, device)
            kind = LatentCache if config.is_mla else KeyValueCache
            return kind(config, batch_size, max_seq_len, dtype, device)

        self.stores = [store() for _ in range(config.n_layers)]
        """One layer cache for each layer."""
        self.mtp: MTPCache | None = None
        if mtp:
            hidden = torch.zeros(batch_size, config.dim, dtype=hidden_dtype, device=device)
            self.mtp = MTPCache([store() for _ in range(config.n_mtp_layers)], hidden, form)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        """[b], on the CPU: valid length of each row, in tokens."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' storage; that of multi-token prediction is apart, in mtp_nbytes."""
        return sum(store.nbytes for store in self.stores)

    @property
    def mtp_nbytes(self) -> int:
        """Bytes of the storage of the multi-token prediction blocks."""
        return 0 if self.mtp is None else sum(store.nbytes for store in self.mtp.stores)

    @property
    def nbytes_per_token(self) -> float:
        """Bytes of a token in all layers, measured from the storage."""
        return self.nbytes / (self.batch_size * self.max_seq_len)

    def window(self, s: int, new: Tensor | None = None) -> Window:
        """Return the place of s new tokens in every row, or of `new` [b] tokens padded to s.

        Raises: ValueError if they do not fit.
        """
        return Window.after(self.lengths, s, new, self.max_seq_len, self.stores[0].data.device)

    def place(self, config: ModelConfig, tokens: Int[Tensor, "b s"], new: Tensor | None = None) -> Window:
        """Return the place of a model's new tokens.

        Raises: ValueError if the cache is of another model or number of rows, or if they do not fit.
        """
        if self.config is not config and self.config != config:
            raise ValueError("the cache was made by a model of another config; use this model's new_cache")
        if len(tokens) != self.batch_size:
            raise ValueError(f"{len(tokens)} rows of tokens for a cache of {self.batch_size} sequences; want as many")
        return self.window(tokens.shape[1], new)

    def pasts(self, window: Window) -> list[Past]:
        """Return each layer's part of a call."""
        return [Past(store=store, window=window, form=self.form) for store in self.stores]

    def truncate(self, lengths: Int[Tensor, " b"] | int) -> None:
        """Forget all but the first tokens of each row. Multi-token prediction must not have seen more.

        Raises: ValueError for a length that is negative or longer than the row, and where multi-token prediction would
            have to forget: it can only begin again, from 0.
        """
        wanted = whole_numbers(lengths, "truncate to")
        if wanted.dim() and wanted.shape != self.lengths.shape:
            raise ValueError(
                f"truncate to {wanted.tolist()}; want one length for all {self.batch_size} sequences or each"
            )
        wanted = wanted.expand(self.batch_size)
        if bool((wanted < 0).any()) or bool((wanted > self.lengths).any()):
            raise ValueError(f"truncate to {wanted.tolist()}, but the lengths are {self.lengths.tolist()}")
        if self.mtp is not None:
            kept = torch.where(wanted == 0, 0, self.mtp.lengths)
            if bool((kept > wanted).any()):
                raise ValueError(
                    f"multi-token prediction has taken in {self.mtp.lengths.tolist()} tokens and cannot go back to "
                    f"{wanted.tolist()}; truncate to 0 and feed them again, or make the cache with mtp=False"
                )
            self.mtp.lengths = kept
        self.lengths = wanted.clone()

    def select(self, rows: Int[Tensor, " n"] | list[int]) -> None:
        """Keep these rows, in this order. A row may be taken more than once."""
        index = whole_numbers(rows, "select")
        if index.dim() != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= self.batch_size:
            raise ValueError(f"select {index.tolist()} of {self.batch_size} sequences; want numbers of sequences")
        self.lengths = self.lengths[index]
        for store in self.stores:
            store.select(index)
        if self.mtp is not None:
            self.mtp.select(index)

    def checked_mtp(self) -> MTPCache:
        """Return the cache of multi-token prediction.

        Raises: ValueError if there is none, or if it has fewer tokens than the layers' cache.
        """
        if self.mtp is None:
            raise ValueError("mtp=True needs a cache for multi-token prediction; use new_cache(mtp=True)")
        if not torch.equal(self.mtp.lengths, self.lengths):
            raise ValueError(
                f"multi-token prediction has taken in {self.mtp.lengths.tolist()} tokens of {self.lengths.tolist()}; "
                "use mtp=True in every call from the first on"
            )
        return self.mtp


def _check(config: ModelConfig, batch_size: int, max_seq_len: int, dtype: CacheDtype, form: str) -> None:
    if batch_size < 1 or max_seq_len < 1:
        raise ValueError(f"a cache of {batch_size} sequences of {max_seq_len} tokens; want 1 or more of each")
    if max_seq_len > config.max_seq_len:
        raise ValueError(
            f"a cache of {max_seq_len} tokens a sequence is longer than the model's max_seq_len={config.max_seq_len}; "
            "shorten it, or build the model with a longer context"
        )
    if dtype not in ("fp8", torch.bfloat16, torch.float32, torch.float64, torch.float16):
        raise ValueError(f"a cache of dtype {dtype!r}; want torch.bfloat16, torch.float32 or 'fp8'")
    if dtype == "fp8" and not config.is_mla:
        raise ValueError(f"dtype='fp8' is the layout of MLA's latent, not of attention={config.attention!r}; use BF16")
    if form not in ("auto", "expanded", "absorbed"):
        raise ValueError(f"form={form!r} is unknown; use auto, expanded or absorbed")
    if form == "absorbed" and (not config.is_mla or config.qk_norm):
        raise ValueError("form='absorbed' is MLA's without qk_norm; use expanded")
