"""The piece of a tensor that a rank holds: rows of the whole, one after the other.

Experts are divided by their first dimension, and FSDP2 divides by the first dimension too. So a piece is a contiguous
part of the whole tensor's bytes, and a file of the whole has the same bytes whatever the layout of the ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldRows:
    """HeldRows `first` ... `first + rows - 1` of a tensor of `shape`."""

    shape: tuple[int, ...]
    first: int
    rows: int

    @property
    def whole(self) -> bool:
        """True if the piece is the whole tensor."""
        return self.first == 0 and self.rows == (self.shape[0] if self.shape else 1)

    @property
    def elements(self) -> tuple[int, int]:
        """First element of the piece in the whole, and the one after its last."""
        row = math.prod(self.shape[1:])
        return self.first * row, (self.first + self.rows) * row

    def of(self, whole: Tensor) -> Tensor:
        """Return the piece of a whole tensor."""
        return whole if self.whole else whole[self.first : self.first + self.rows]


Pieces = Mapping[str, Mapping[str, HeldRows]]
"""The rows that a rank holds of the tensors of each part of a run, by name."""
