"""Positions and causal mask of the new tokens in a call with a cache, whose rows may have different valid lengths."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini.functional.cached_attention import Mask, hidden_keys, keys_to_read


@dataclass(frozen=True, kw_only=True)
class Window:
    """The place of the s new tokens of a call in each row of the cache, and the keys that they may see."""

    positions: Int[Tensor, "#b s"]
    """Position of each new token, on the device; one row if all rows are equally long."""
    start: int | None
    """First position of the new tokens if all rows are equally long and have no padding, else None."""
    fresh: bool
    """True if all rows begin with the new tokens: there are no older keys to see."""
    end: int
    """Number of keys to read, t: the longest row with its new tokens, and perhaps some that the mask hides."""
    real: Bool[Tensor, "b s"] | None
    """True where a new token is not padding; None if there is no padding."""
    lengths: Int[Tensor, " b"]
    """Valid length of each row with its new tokens, on the CPU."""

    @classmethod
    def after(cls, before: Tensor, s: int, new: Tensor | None, max_seq_len: int, device: torch.device) -> "Window":
        """Place s new tokens after rows of valid lengths `before` [b].

        Args:
            new: number of new tokens of each row, [b], which are padded to s on the right; None: s in every row.

        Raises: ValueError if they do not fit.
        """
        if new is not None:
            new = whole_numbers(new, "lengths=")
            if new.shape != before.shape or int(new.min()) < 0 or int(new.max()) > s:
                raise ValueError(
                    f"lengths={new.tolist()} for {len(before)} sequences of {s} columns; want one of 0 to {s} each"
                )
        lengths = before + (s if new is None else new)
        starts, most = before.tolist(), int(lengths.max())
        if most > max_seq_len:
            raise ValueError(
                f"the cache holds {max_seq_len} tokens a sequence, and this call would make {most}; "
                "make it with a larger max_seq_len, or truncate it"
            )
        columns = torch.arange(s)
        alike = min(starts) == max(starts) and (new is None or bool((new == s).all()))
        positions = (before[:1] if alike else before)[:, None] + columns
        real = None
        if not alike:
            real = columns < lengths[:, None] - before[:, None]
        return cls(
            positions=positions.to(device),
            start=starts[0] if alike else None,
            fresh=not any(starts),
            end=keys_to_read(most, max_seq_len),
            real=None if real is None else real.to(device),
            lengths=lengths,
        )

    @cached_property
    def mask(self) -> Bool[Tensor, "#b s t"] | None:
        """The mask: True for keys that a new token may not see, those after it; None if it may see all."""
        if self.start is not None and self.start + 1 == self.end:
            return None
        keys = torch.arange(self.end, device=self.positions.device)
        return keys > self.positions[..., None]

    def masked(self, mask: Mask) -> Bool[Tensor, "#b s t"]:
        """Return the mask with that of a layer added to it."""
        queries = self.positions.clamp(max=self.end - 1)  # those of padding may lie after all keys
        return hidden_keys(mask, queries, self.end)

    def shifted(self, depth: int) -> "Window":
        """Return the window of the multi-token prediction block of this depth.

        Its entry for a token lies `depth` positions before the token. The first `depth` tokens of a row have none.
        """
        positions, lengths = self.positions - depth, (self.lengths - depth).clamp(min=0)
        if self.start is not None and self.start >= depth:
            start = self.start - depth
            return Window(positions=positions, start=start, fresh=False, end=self.end, real=None, lengths=lengths)
        there = positions >= 0
        real = (there if self.real is None else self.real & there).expand(len(lengths), -1)
        positions = positions.clamp(min=0)
        return Window(positions=positions, start=None, fresh=False, end=self.end, real=real, lengths=lengths)


def whole_numbers(given: Any, what: str) -> Int[Tensor, "..."]:
    """Return numbers as an int64 tensor on the CPU.

    Raises: ValueError for what is not a whole number, such as 2.7, True or NaN.
    """
    numbers = torch.as_tensor(given).cpu()
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(f"{what} {numbers.tolist()}: {numbers.dtype}; want whole numbers, such as int64")
    return numbers.to(torch.int64)


def last_valid(
    hidden: Float[Tensor, "b s m"], lengths: Int[Tensor, " b"] | None, old: Float[Tensor, "b m"]
) -> Float[Tensor, "b m"]:
    """Return the hidden state of each row's last valid column, or the old one for a row that has none.

    Args:
        lengths: number of valid columns of each row; None: all.
    """
    if lengths is None:
        return hidden[:, -1]
    at = lengths.to(hidden.device)
    last = hidden[torch.arange(len(hidden), device=hidden.device), (at - 1).clamp(min=0)]
    return torch.where((at > 0)[:, None], last, old.to(last.dtype))
