"""The cache of decoding: for each layer, one row of numbers for each token that it has seen (layer_cache.py).

All memory is allocated when a cache is made, max_seq_len rows for each sequence. The rows of a batch may have different
valid lengths; dsmini/nn/positions.py says where the new tokens of a call go.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.nn.layer_cache import FP8IndexCache, FP8LatentCache, IndexCache, KeyValueCache, LatentCache, LayerCache
from dsmini.nn.positions import Window, last_valid, whole_numbers

CacheDtype = torch.dtype | Literal["fp8"]
Form = Literal["auto", "expanded", "absorbed"]


@dataclass(frozen=True, kw_only=True)
class Past:
    """One layer's part of a call with a cache."""

    store: LayerCache
    window: Window
    form: Form = "auto"
    """The way MLA attends to the store: auto counts the work of both forms."""

    @property
    def index(self) -> "Past":
        """The same call's part for the indexer's keys."""
        assert self.store.index is not None, "a cache of DSA has the indexer's keys"
        return Past(store=self.store.index, window=self.window)

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
            sizes = (config, batch_size, max_seq_len)
            if dtype == "fp8":
                rows, keys = FP8LatentCache(*sizes, device), FP8IndexCache
            else:
                rows = (LatentCache if config.is_mla else KeyValueCache)(*sizes, dtype, device)
                keys = partial(IndexCache, dtype=dtype)
            if config.attention == "dsa":
                rows.index = keys(*sizes, device=device)
            return rows

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

    @property
    def index_stores(self) -> list[LayerCache]:
        """Keys of each layer's indexer; empty without one."""
        return [store.index for store in self.stores if store.index is not None]

    @property
    def index_nbytes_per_token(self) -> float:
        """Bytes of those that are keys of indexers."""
        return sum(store.nbytes for store in self.index_stores) / (self.batch_size * self.max_seq_len)

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
