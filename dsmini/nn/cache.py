"""The cache of decoding: for each layer, one row of numbers for each token that it has seen.

MLA stores one row [c_kv | k_rope] for all heads together: kv_lora_rank + qk_rope_head_dim numbers a token and layer.
Its baselines MHA, GQA and MQA store [k | v] of every key-value head. DSA stores MLA's row, and the indexer's key in a
LayerCache of its own. V4's compressed attention stores other rows (CompressedAttention.new_cache).

A row is stored in a format (codec.py): as numbers, or in FP8 as a run of bytes, at V3's sizes 656 compared with 1152.

Each attention makes its own store of Rows (`new_cache`), and alone knows what is in it. `Cache` knows how many tokens
each sequence has. All memory is allocated when a cache is made, max_seq_len rows for each sequence. The rows of a batch
may have different valid lengths. `CachePositions` says where the new tokens of a call go, `LayerCacheView` is what a
layer gets of it.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.config.model import SLACK
from dsmini.nn.codec import Codec, Numbers

CacheDtype = torch.dtype | Literal["fp8"]
ChosenForm = Literal["expanded", "absorbed"]
"""A way in which MLA attends to a cache (mla.py)."""
Form = Literal["auto"] | ChosenForm
"""The same; auto is whichever is less work."""

KEY_STEP = 64
"""Step in which the number of keys grows that attention reads."""


class Rows:
    """Stored rows of one layer, [b, size, width], in a format. The row of position p is in place p mod size.

    Args:
        tokens: number of tokens that a row stands for; None: rows of the latest tokens, however long a sequence is.
    """

    index: Any = None
    """The store of an indexer's keys, whose rows have the same places; None without an indexer."""

    def __init__(self, batch_size: int, size: int, codec: Codec, device: torch.device, tokens: int | None = 1) -> None:
        # zeros: a row that was never written has weight 0 in the softmax, and 0 * NaN would be NaN
        self.data: Tensor = torch.zeros(batch_size, size, codec.width, dtype=codec.dtype, device=device)
        self.codec: Codec = codec
        self.tokens: int | None = tokens

    @property
    def parts(self) -> "list[Rows]":
        """All rows of a layer: these, and those of its indexer."""
        return [self] if self.index is None else [self, *self.index.parts]

    def write(self, rows: Float[Tensor, "b s w"], at: "CachePositions") -> None:
        """Store the rows of new tokens in their places, the last of those that share one, and padding nowhere."""
        self._store(self.codec.encode(rows), at)

    def read(self, end: int, dtype: torch.dtype) -> Float[Tensor, "b {end} w"]:
        """Return the first `end` rows of every sequence as numbers of dtype."""
        return self.codec.decode(self.data[:, :end], dtype)

    def read_at(self, places: Int[Tensor, "#b *n"], dtype: torch.dtype) -> Float[Tensor, "b *n w"]:
        """Return the rows in these places."""
        sequence = torch.arange(len(self.data), device=self.data.device)
        return self.codec.decode(self.data[sequence.view(-1, *[1] * (places.dim() - 1)), places], dtype)

    def extend(
        self, rows: Float[Tensor, "b s w"], at: "CachePositions", n: int, dtype: torch.dtype
    ) -> Float[Tensor, "b t w"]:
        """Write, and return the n rows before the new ones and these, as they are stored; of a fresh cache these alone.

        Rows before position 0 are any numbers.
        """
        encoded, n = self.codec.encode(rows), 0 if at.all_new else n
        columns = torch.arange(-n, 0, device=self.data.device)
        before = self.read_at((at.positions[:, :1] + columns) % self.data.shape[1], dtype)
        self._store(encoded, at)
        return torch.cat((before.expand(len(rows), -1, -1), self.codec.decode(encoded, dtype)), 1)

    def _store(self, encoded: Tensor, at: "CachePositions") -> None:
        (_, size, _), s = self.data.shape, encoded.shape[1]
        if at.shared_start is None:
            sequence, column, position = at.places(size if s > size else None)
            self.data[sequence, position % size] = encoded[sequence, column]
            return
        if s == 0:  # no entry is complete, and a short cache has room for none
            return
        skipped = max(0, s - size)
        place = (at.shared_start + skipped) % size
        straight = min(s - skipped, size - place)  # rows up to the end of the ring; the others begin it again
        self.data[:, place : place + straight] = encoded[:, skipped : skipped + straight]
        if skipped + straight < s:
            self.data[:, : s - skipped - straight] = encoded[:, skipped + straight :]

    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep the rows of these sequences, in this order."""
        self.data = self.data[index.to(self.data.device)]

    def clear(self, index: Int[Tensor, " n"]) -> None:
        """Forget what these sequences had: a NaN has an effect also where its weight is 0."""
        self.data[index.to(self.data.device)] = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, used or not."""
        return self.data.untyped_storage().nbytes()

    @property
    def nbytes_per_token(self) -> float:
        """Bytes that each further token adds."""
        return 0.0 if self.tokens is None else self.data.shape[2] * self.data.itemsize / self.tokens


class LayerCache(Rows):
    """The stored rows of one layer as numbers: a row for each token.

    A layer that stores something else returns Rows in another format, or Stores of several.
    """

    def __init__(self, batch_size: int, max_seq_len: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(batch_size, max_seq_len, Numbers(width, dtype), device)


class Stores:
    """The stores of a layer that has several, each an attribute. One that is None is not there."""

    index: Any = None
    """As in Rows."""

    def __init__(self, **stores: Any) -> None:
        vars(self).update(stores)

    @property
    def parts(self) -> list[Rows]:
        """All rows, in the order of the stores."""
        return [rows for store in vars(self).values() if store is not None for rows in store.parts]


@dataclass(frozen=True, kw_only=True)
class CachePositions:
    """The place of the s new tokens of a call in each row of the cache, and the keys that they may see."""

    positions: Int[Tensor, "#b s"]
    """Position of each new token, on the device; one row if all rows are equally long."""
    shared_start: int | None
    """First position of the new tokens if all rows are equally long and have no padding, else None."""
    all_new: bool
    """True if all rows begin with the new tokens: there are no older keys to see."""
    n_keys: int
    """Number of keys to read, t: the longest row with its new tokens, and perhaps some that the mask hides."""
    is_token: Bool[Tensor, "b s"] | None
    """True where a new token is not padding; None if there is no padding."""
    lengths: Int[Tensor, " b"]
    """Valid length of each row with its new tokens, on the CPU."""

    @cached_property
    def mask(self) -> Bool[Tensor, "#b s t"] | None:
        """The mask: True for keys that a new token may not see, those after it; None if it may see all."""
        if self.shared_start is not None and self.shared_start + 1 == self.n_keys:
            return None
        keys = torch.arange(self.n_keys, device=self.positions.device)
        return keys > self.positions[..., None]

    @cached_property
    def _places(self) -> dict[int | None, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def places(self, latest: int | None = None) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return sequence, column and position of each new token, or of the `latest` of each row alone.

        They are found once for all layers: the host waits for the device to count them.
        """
        if latest not in self._places:
            assert self.is_token is not None, "rows of different lengths say which columns are tokens"
            counted = self.is_token
            if latest is not None:
                counted = counted & (self.positions >= self.lengths.to(self.positions.device)[:, None] - latest)
            sequence, column = counted.nonzero(as_tuple=True)
            self._places[latest] = sequence, column, self.positions.expand(len(counted), -1)[sequence, column]
        return self._places[latest]

    def moved_back(self, depth: int) -> "CachePositions":
        """Return the positions for the multi-token prediction block of this depth.

        Its entry for a token lies `depth` positions before the token. The first `depth` tokens of a row have none.
        """
        positions, lengths = self.positions - depth, (self.lengths - depth).clamp(min=0)
        if self.shared_start is not None and self.shared_start >= depth:
            start, is_token = self.shared_start - depth, None
        else:
            start, is_token = None, positions >= 0 if self.is_token is None else self.is_token & (positions >= 0)
            is_token, positions = is_token.expand(len(lengths), -1), positions.clamp(min=0)
        moved = {"positions": positions, "shared_start": start, "is_token": is_token, "lengths": lengths}
        return CachePositions(**moved, all_new=False, n_keys=self.n_keys)


@dataclass(frozen=True, kw_only=True)
class LayerCacheView:
    """One layer's part of a call with a cache."""

    store: Any
    """Rows, or the object that a layer's new_cache returned."""
    at: CachePositions
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    """Tensors that the layer makes of its weights and uses while this cache lives."""
    form: Form = "auto"
    """The way MLA attends to the store; auto is the one with less work (`mla.form_of`)."""

    @property
    def index(self) -> "LayerCacheView":
        """The same call's part for the indexer's keys."""
        assert self.store.index is not None, "a cache of DSA has the indexer's keys"
        return LayerCacheView(store=self.store.index, at=self.at)

    def append(self, parts: tuple[Tensor, ...]) -> None:
        """Write the rows of the new tokens, whose parts [b, s, ...] lie side by side."""
        self.store.write(torch.cat(parts, -1), self.at)

    def extend(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Append, and return the parts of all rows to attend to: those of a fresh cache as they came."""
        self.append(parts)
        if self.at.all_new and self.store.data.dtype == dtype:
            return parts
        rows = self.store.read(parts[0].shape[1] if self.at.all_new else self.at.n_keys, dtype)
        return rows.split([part.shape[-1] for part in parts], -1)


class Cache:
    """The stores of all blocks, and the valid length of every row. Made by Transformer.new_cache.

    Args:
        config: of the model, whose tokens alone it takes.
        form: how MLA attends to what is stored.
        mtp: the cache of the multi-token prediction blocks, where there is one.
    """

    def __init__(
        self,
        config: ModelConfig,
        stores: list[Any],
        batch_size: int,
        max_seq_len: int,
        device: torch.device,
        *,
        form: Form = "auto",
        mtp: "MTPCache | None" = None,
    ) -> None:
        self.config: ModelConfig = config
        self.stores: list[Any] = stores
        self.memos: list[dict[str, Any]] = [{} for _ in stores]
        """LayerCacheView.memo of each block."""
        self.max_seq_len: int = max_seq_len
        self.device: torch.device = device
        self.form: Form = form
        self.mtp = mtp
        self.lengths: Tensor = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
        """[b], on the CPU: valid length of each row, in tokens."""
        self._longest = [0] * batch_size
        """The same with tokens that were taken back."""
        self.slack: int | None = SLACK if any(rows.tokens is None for rows in self.rows) else None
        """Number of tokens that can be taken back; None: all."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, used or not, without that of the multi-token prediction blocks."""
        return sum(rows.nbytes for rows in self.rows)

    @property
    def mtp_nbytes(self) -> int:
        """Bytes of the storage of the multi-token prediction blocks, which nbytes leaves out."""
        return 0 if self.mtp is None else self.mtp.nbytes

    @property
    def nbytes_per_token(self) -> float:
        """Bytes that each further token adds in all layers, measured from the storage."""
        return sum(rows.nbytes_per_token for rows in self.rows)

    @property
    def fixed_nbytes(self) -> int:
        """Bytes of each sequence besides, whatever its length: V4's window, and rows of which an entry is made."""
        return sum(rows.nbytes for rows in self.rows if rows.tokens is None) // self.batch_size

    @property
    def rows(self) -> list[Rows]:
        """All rows of all layers."""
        return [rows for store in self.stores for rows in store.parts]

    def place_tokens(
        self, config: ModelConfig, tokens: Int[Tensor, "b s"], new_lengths: Tensor | None = None
    ) -> CachePositions:
        """Return the place of a model's new tokens, as `place` does.

        Raises: ValueError also if the cache is of another model or number of rows.
        """
        if self.config is not config and self.config != config:
            raise ValueError("the cache is of a model of another config; make one by this model's new_cache")
        if len(tokens) != self.batch_size:
            n = len(tokens)
            raise ValueError(f"tokens have {n} rows, the cache {self.batch_size}; use new_cache(batch_size={n})")
        return self.place(tokens.shape[1], new_lengths)

    def place(self, s: int, new_lengths: Tensor | None = None, skipped: int = 0) -> CachePositions:
        """Return the place of s new tokens after the last of each row.

        Args:
            new_lengths: number of new tokens of each row, [b], padded to s on the right; None: s in every row.
            skipped: number of tokens between the last of a row and the new ones.

        Raises: ValueError if they do not fit.
        """
        # whole numbers in lists: a decoded token pays for each operation of torch
        starts, room = [n + skipped for n in self.lengths.tolist()], self.max_seq_len
        new = [s] * len(starts) if new_lengths is None else _new_tokens(new_lengths, len(starts), s)
        lengths = [start + n for start, n in zip(starts, new, strict=True)]
        if (longest := max(lengths)) > room:
            raise ValueError(
                f"the cache holds {room} tokens a sequence, and this call would make {longest}; "
                "make it with a larger max_seq_len, or truncate it"
            )
        if self._have_lost(starts):
            raise ValueError(
                f"rows of {self.lengths.tolist()} tokens were overwritten by a call for {self._longest} that did not "
                "end; truncate to 0 and feed the tokens again"
            )
        self._longest = [
            max(n, was) if start else n for n, was, start in zip(lengths, self._longest, starts, strict=True)
        ]
        alike = min(starts) == max(starts) and min(new) == s
        first = starts[0] if alike else 0
        columns = torch.arange(first, first + s, device="cpu")[None]  # whatever torch's default device is
        return CachePositions(
            positions=(columns if alike else torch.tensor(starts, device="cpu")[:, None] + columns).to(self.device),
            shared_start=starts[0] if alike else None,
            all_new=not any(starts),
            # a CPU prepares a BF16 product again for each number of rows, so that number grows in steps (docs/log.md)
            n_keys=min(room, -(-longest // KEY_STEP) * KEY_STEP),
            is_token=None if alike else (columns < torch.tensor(new, device="cpu")[:, None]).to(self.device),
            lengths=torch.tensor(lengths, device="cpu"),
        )

    def _have_lost(self, lengths: list[int]) -> bool:
        """Return True if a row of this length has lost some of its tokens to later ones."""
        slack = self.slack
        return slack is not None and any(0 < n < was - slack for n, was in zip(lengths, self._longest, strict=True))

    def views(self, at: CachePositions) -> list[LayerCacheView]:
        """Return each block's part of a call."""
        each = zip(self.stores, self.memos, strict=True)
        return [LayerCacheView(store=store, at=at, memo=memo, form=self.form) for store, memo in each]

    def truncate(self, lengths: Int[Tensor, " b"] | int) -> None:
        """Forget all but the first tokens of each row. Multi-token prediction must not have seen more.

        Raises: ValueError for a length that is negative or longer than the row, for more tokens than compressed
            attention can take back, and where multi-token prediction would have to forget: it can only begin again,
            from 0.
        """
        have = self.lengths.tolist()
        wanted = _whole_numbers(lengths, f"truncate to {lengths}; want a whole number, or one for each row of {have}")
        if wanted.shape not in ((), self.lengths.shape) or bool(((wanted < 0) | (wanted > self.lengths)).any()):
            raise ValueError(
                f"truncate to {wanted.tolist()}, but the lengths are {have}; want 0 to as many for each row"
            )
        wanted = wanted.expand(self.batch_size).clone()
        if self._have_lost(wanted.tolist()):
            raise ValueError(
                f"truncate to {wanted.tolist()}, but rows have had {self._longest} tokens and the cache can "
                f"take back {self.slack}; truncate to 0 and feed them again"
            )
        if self.mtp is not None:
            self.mtp.forget_beyond(wanted)
        self._forget(wanted)

    def _forget(self, lengths: Int[Tensor, " b"]) -> None:
        """Take these as the valid lengths; of a row that begins again nothing stays."""
        if len(again := (lengths == 0).nonzero().flatten()):
            for rows in self.rows:
                rows.clear(again)
        self.lengths = lengths

    def select(self, rows: Int[Tensor, " n"] | list[int]) -> None:
        """Keep these rows, in this order. A row may be taken more than once.

        Raises: ValueError for anything but a list of numbers of rows, from 0.
        """
        n = self.batch_size
        refusal = f"select {rows}; want numbers of rows from 0 to {n - 1} in a list, one or more"
        index = _whole_numbers(rows, refusal)
        if index.dim() != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= n:
            raise ValueError(refusal)
        self.lengths = self.lengths[index]
        self._longest = [self._longest[row] for row in index.tolist()]
        for stored in self.rows:
            stored.select(index)
        if self.mtp is not None:
            self.mtp.select(index)

    def checked_mtp(self) -> "MTPCache":
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


class MTPCache(Cache):
    """The cache of the multi-token prediction blocks, which may have fewer tokens than the layers' cache."""

    last: list[Float[Tensor, "b *streams m"]]
    """For each depth: the hidden state at each row's last token, as the depth before made it."""

    def shift(
        self, k: int, hidden: Float[Tensor, "b s *streams m"], lengths: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b s *streams m"]:
        """Return the hidden state before each new token from the states at the new tokens, and store the last one."""
        before = torch.cat((self.last[k][:, None].to(hidden.dtype), hidden[:, :-1]), 1)
        self.last[k] = last_valid(hidden, lengths, self.last[k])
        return before

    def forget_beyond(self, lengths: Int[Tensor, " b"]) -> None:
        """Begin again with the rows that are cut to 0; raise ValueError for others that have seen more than is left."""
        kept = torch.where(lengths == 0, 0, self.lengths)
        if bool((kept > lengths).any()):
            raise ValueError(
                f"multi-token prediction has taken in {self.lengths.tolist()} tokens and cannot go back to "
                f"{lengths.tolist()}; truncate to 0 and feed them again, or make the cache with mtp=False"
            )
        self._forget(kept)

    def _have_lost(self, lengths: list[int]) -> bool:
        return False  # it is placed more than once in a call, and the layers' cache has raised before

    def select(self, rows: Int[Tensor, " n"] | list[int]) -> None:
        super().select(rows)
        self.last = [hidden[torch.as_tensor(rows, device=hidden.device)] for hidden in self.last]


def _new_tokens(given: Tensor, rows: int, s: int) -> list[int]:
    """Return the numbers of new tokens of the rows; raise ValueError unless each has one of 0 to s."""
    new = torch.as_tensor(given, device="cpu")
    if new.is_floating_point() or new.shape != (rows,) or int(new.min()) < 0 or int(new.max()) > s:
        raise ValueError(f"lengths={new.tolist()} for {rows} sequences of {s} columns; want one of 0 to {s} each")
    return new.tolist()


def _whole_numbers(given: Any, refusal: str) -> Int[Tensor, "..."]:
    """Return numbers as int64 on the CPU; raise ValueError with this sentence for anything else."""
    try:
        numbers = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(refusal) from None
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(refusal)
    return numbers.long()


def check_cache(config: ModelConfig, batch_size: int, max_seq_len: int, dtype: CacheDtype, form: Any) -> None:
    """Raise ValueError for a cache that a model of this config cannot use."""
    if min(batch_size, max_seq_len) < 1:
        raise ValueError(f"a cache of {batch_size} sequences of {max_seq_len} tokens; want 1 or more of both")
    if max_seq_len > config.max_seq_len:
        raise ValueError(
            f"a cache of {max_seq_len} tokens a sequence is longer than the model's max_seq_len={config.max_seq_len}; "
            "shorten it, or build the model with a longer context"
        )
    if dtype != "fp8" and dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype={dtype!r} holds no rows of a cache; use torch.float32, torch.bfloat16 or 'fp8'")
    if form not in ("auto", "expanded", "absorbed"):
        raise ValueError(f"form={form!r} is unknown; use auto, expanded or absorbed")
    if form != "auto" and config.attention == "compressed":
        raise ValueError(f"form={form!r} chooses between the two of MLA; V4's attention has one, so leave it out")
    if form == "absorbed" and (not config.is_mla or config.qk_norm):
        raise ValueError("form='absorbed' is MLA's without qk_norm; use expanded")


def last_valid(
    hidden: Float[Tensor, "b s *streams m"], lengths: Int[Tensor, " b"] | None, old: Float[Tensor, "b *streams m"]
) -> Float[Tensor, "b *streams m"]:
    """Return the hidden state of each row's last valid column, or the old one for a row that has none.

    Args:
        lengths: number of valid columns of each row; None: all.
    """
    if lengths is None:
        return hidden[:, -1]
    at = lengths.to(hidden.device)
    last = hidden[torch.arange(len(hidden), device=hidden.device), (at - 1).clamp(min=0)]
    return torch.where((at > 0).view(-1, *[1] * (last.dim() - 1)), last, old.to(last.dtype))
