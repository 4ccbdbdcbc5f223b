"""What decoding keeps of the tokens it has seen.

MLA keeps one row [c_kv | k_rope] a token and layer, for all heads together: kv_lora_rank + qk_rope_head_dim numbers.
Its twins keep [k | v] of every key-value head. All rows are allocated at once, max_seq_len of them for each sequence,
and nothing grows behind anyone's back.

In FP8 a row of MLA's is a run of bytes, as DeepSeek-V3.2 has it: the latent in E4M3, an FP32 scale for each 128 of its
numbers, and the rotary key in BF16. At V3's sizes 512 + 4 * 4 + 2 * 64 = 656 bytes, for 1152 in BF16.

Sequences of a batch may have different lengths. A Window says where a call's new tokens go and what they may see.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.numerics import SMALLEST_AMAX, dequantize_tiles, quantize_tiles

CacheDtype = torch.dtype | Literal["fp8"]
Form = Literal["auto", "expanded", "absorbed"]
_LATENT_TILE = 128
ALIGN = 64
"""A CPU prepares a product in BF16 anew for each number of rows, so that number changes seldom (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where the s new tokens of a call go in each sequence, and what they may see."""

    positions: Int[Tensor, "#b s"]
    """Of the new tokens, on the device; one row if all sequences are equally long."""
    start: int | None
    """Where the new rows begin if all sequences are equally long and no token is padding."""
    fresh: bool
    """Whether all sequences begin with the new tokens: nothing older is there to see."""
    end: int
    """So many rows are read: those of the longest sequence with its new tokens, and up to ALIGN - 1 more."""
    real: Bool[Tensor, "b s"] | None
    """Which new tokens are no padding; None: all."""
    lengths: Int[Tensor, " b"]
    """Of the sequences with their new tokens, on the CPU."""

    @cached_property
    def hidden(self) -> Bool[Tensor, "#b s t"] | None:
        """The keys that a new token may not see, those after it; None if there are none."""
        if self.start is not None and self.start + 1 == self.end:
            return None
        keys = torch.arange(self.end, device=self.positions.device)
        return keys > self.positions[..., None]

    def shifted(self, depth: int) -> "Window":
        """The window of a multi-token prediction block of this depth, whose entry for a token lies `depth` positions
        before it. Tokens too near the beginning have none."""
        positions = self.positions - depth
        there = positions >= 0
        real = there if self.real is None else self.real & there
        start = None if self.start is None or self.start < depth else self.start - depth
        return Window(
            positions=positions.clamp(min=0),
            start=start,
            fresh=False,
            end=self.end,
            real=None if start is not None else real.expand(len(self.lengths), -1),
            lengths=(self.lengths - depth).clamp(min=0),
        )


class Store:
    """The rows of one layer, [b, max_seq_len, width], as numbers."""

    def __init__(self, batch_size: int, max_seq_len: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # zeros: a row that nobody wrote has weight 0 in the softmax, and 0 * NaN would be NaN
        self.data = torch.zeros(batch_size, max_seq_len, width, dtype=dtype, device=device)
        self._halves: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    def write(self, rows: Float[Tensor, "b s w"], window: Window) -> None:
        """Put the rows of new tokens in their places; those of padding nowhere."""
        encoded = self._encode(rows)
        if window.start is not None:
            self.data[:, window.start : window.start + rows.shape[1]] = encoded
            return
        assert window.real is not None
        sequence, column = window.real.nonzero(as_tuple=True)
        position = window.positions.expand(len(rows), -1)[sequence, column]
        self.data[sequence, position] = encoded[sequence, column]

    def read(self, end: int, dtype: torch.dtype) -> Float[Tensor, "b {end} w"]:
        """The first `end` rows of every sequence as numbers of dtype."""
        return self.data[:, :end].to(dtype)

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether rows of dtype are read as other numbers than they were written as."""
        return self.data.dtype != dtype

    def _encode(self, rows: Tensor) -> Tensor:
        return rows.to(self.data.dtype)

    def prepared(self, key: tuple[object, ...], make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `make` gives, made once and again whenever the key is another: MLA keeps the absorbed halves of wkv_b
        here, for they are of use only while something is decoded."""
        if self._halves is None or self._halves[0] != key:
            self._halves = (key, make())
        return self._halves[1]

    @property
    def nbytes(self) -> int:
        """Of the storage, whether used or not."""
        return self.data.untyped_storage().nbytes()


class FP8LatentStore(Store):
    """The rows [c_kv | k_rope] of one layer as bytes: E4M3 codes, FP32 scales, BF16 rotary key."""

    def __init__(self, batch_size: int, max_seq_len: int, c: int, r: int, device: torch.device) -> None:
        self.c, self.r, self.tiles = c, r, -(-c // _LATENT_TILE)
        super().__init__(batch_size, max_seq_len, c + 4 * self.tiles + 2 * r, torch.uint8, device)

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


class Lane:
    """What a multi-token prediction block keeps: its rows, and what the depth before it last gave each sequence."""

    def __init__(self, store: Store, hidden: Tensor) -> None:
        self.store = store
        self.before = hidden
        """[b, m]: from which, with the embedding of the next token, the block's next entry is made."""


class Cache:
    """All layers' stores and the length of every sequence. Made by Transformer.new_cache.

    Args:
        form: how MLA attends to what is kept: auto counts the work of both forms at each call.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_seq_len: int,
        dtype: CacheDtype,
        device: torch.device,
        *,
        lanes: int = 0,
        form: Form = "auto",
        hidden_dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(config, batch_size, max_seq_len, dtype, form)
        self.config, self.max_seq_len = config, max_seq_len
        self.form: Form = form

        def store() -> Store:
            if dtype == "fp8":
                return FP8LatentStore(batch_size, max_seq_len, config.kv_lora_rank, config.qk_rope_head_dim, device)
            return Store(batch_size, max_seq_len, row_width(config), dtype, device)

        self.stores = [store() for _ in range(config.n_layers)]
        hidden = torch.zeros(batch_size, config.dim, dtype=hidden_dtype, device=device)
        self.lanes = [Lane(store(), hidden.clone()) for _ in range(lanes)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        """[b], on the CPU: tokens of each sequence."""
        self.lane_lengths = self.lengths.clone()
        """[b]: tokens that the multi-token prediction blocks have taken in; they may lag behind."""

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' storage; multi-token prediction's is apart, in lane_nbytes."""
        return sum(store.nbytes for store in self.stores)

    @property
    def lane_nbytes(self) -> int:
        """Bytes of the storage of the multi-token prediction blocks."""
        return sum(lane.store.nbytes for lane in self.lanes)

    @property
    def nbytes_per_token(self) -> float:
        """Bytes a token takes in all layers, read off the storage."""
        return self.nbytes / (self.batch_size * self.max_seq_len)

    def window(self, s: int, new: Tensor | None = None, before: Tensor | None = None) -> Window:
        """The places of s new tokens in every sequence, or of `new` [b] tokens padded to s.

        Args:
            before: lengths to start from; left out: those of the layers.

        Raises: ValueError where they do not fit.
        """
        device = self.stores[0].data.device
        before = self.lengths if before is None else before
        if new is None:
            lengths = before + s
        else:
            new = torch.as_tensor(new).cpu().to(torch.int64)
            if new.shape != before.shape or int(new.min()) < 0 or int(new.max()) > s:
                raise ValueError(
                    f"lengths={new.tolist()} for {len(before)} sequences of {s} columns; want one of 0 to {s} each"
                )
            lengths = before + new
        if (most := int(lengths.max())) > self.max_seq_len:
            raise ValueError(
                f"the cache holds {self.max_seq_len} tokens a sequence, and this call would make {most}; "
                "make it with a larger max_seq_len, or truncate it"
            )
        columns = torch.arange(s)
        alike = bool((before == before[0]).all()) and (new is None or bool((new == s).all()))
        positions = (before[:1] if alike else before)[:, None] + columns
        real = None if alike or new is None else (columns < new[:, None]).to(device)
        if not alike and real is None:
            real = torch.ones(len(before), s, dtype=torch.bool, device=device)
        return Window(
            positions=positions.to(device),
            start=int(before[0]) if alike else None,
            fresh=not bool(before.any()),
            end=min(self.max_seq_len, -(-most // ALIGN) * ALIGN),
            real=real,
            lengths=lengths,
        )

    def truncate(self, lengths: Int[Tensor, " b"] | int) -> None:
        """Forget all but the first tokens of each sequence. What multi-token prediction has taken in must be no more.

        Raises: ValueError for a length that is negative or more than there is, and where multi-token prediction would
            have to forget: it can only begin anew, from 0.
        """
        wanted = torch.as_tensor(lengths, dtype=torch.int64).cpu()
        if wanted.dim() and wanted.shape != self.lengths.shape:
            raise ValueError(
                f"truncate to {wanted.tolist()}; want one length for all {self.batch_size} sequences or each"
            )
        wanted = wanted.expand(self.batch_size)
        if bool((wanted < 0).any()) or bool((wanted > self.lengths).any()):
            raise ValueError(f"truncate to {wanted.tolist()}, but the lengths are {self.lengths.tolist()}")
        if self.lanes:
            kept = torch.where(wanted == 0, 0, self.lane_lengths)
            if bool((kept > wanted).any()):
                raise ValueError(
                    f"multi-token prediction has taken in {self.lane_lengths.tolist()} tokens and cannot go back to "
                    f"{wanted.tolist()}; truncate to 0 and feed them again, or make the cache with mtp=False"
                )
            self.lane_lengths = kept
        self.lengths = wanted.clone()

    def select(self, rows: Int[Tensor, " n"] | list[int]) -> None:
        """Keep these sequences, in this order; one may be taken more than once."""
        given = torch.as_tensor(rows)
        index = given.to(torch.int64)
        if (
            given.dtype == torch.bool
            or index.dim() != 1
            or not len(index)
            or int(index.min()) < 0
            or int(index.max()) >= self.batch_size
        ):
            raise ValueError(f"select {given.tolist()} of {self.batch_size} sequences; want numbers of sequences")
        self.lengths, self.lane_lengths = self.lengths[index], self.lane_lengths[index]
        for store in [*self.stores, *(lane.store for lane in self.lanes)]:
            store.data = store.data[index.to(store.data.device)]
        for lane in self.lanes:
            lane.before = lane.before[index.to(lane.before.device)]


def row_width(config: ModelConfig) -> int:
    """Numbers that a layer keeps of a token."""
    if config.attention == "mla":
        return config.kv_lora_rank + config.qk_rope_head_dim
    return config.kv_heads * (config.qk_nope_head_dim + config.v_head_dim)


@dataclass(frozen=True, kw_only=True)
class Past:
    """One layer's part of a cached call."""

    store: Store
    window: Window
    form: Form = "auto"

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
    if dtype == "fp8" and config.attention != "mla":
        raise ValueError(f"dtype='fp8' is the layout of MLA's latent, not of attention={config.attention!r}; use BF16")
    if form not in ("auto", "expanded", "absorbed"):
        raise ValueError(f"form={form!r} is unknown; use auto, expanded or absorbed")
    if form == "absorbed" and (config.attention != "mla" or config.qk_norm):
        raise ValueError("form='absorbed' is MLA's without qk_norm; use expanded")
