"""Loss spikes: how one is recognised, and the batches that a rewound run leaves out.

A spike is a loss far above the running median of the last WINDOW finite ones. Far is THRESHOLD robust standard
deviations, 1.4826 times the median distance from the median (Iglewicz and Hoaglin, 1993), and LEAST nats besides.
Neither a single odd batch nor the fall of a young loss moves a median much, as they would a mean.

What to do is PaLM's remedy (Chowdhery et al. 2022, section 5.1): return to a checkpoint from before the spike and leave
out the batches since then, which did not spike again when they were fed to an older state.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from statistics import median
from typing import Any

WINDOW = 128
THRESHOLD = 10.0
LEAST = 1.0
"""Smallest spike in nats, for a loss that hardly varies."""


class Spikes:
    """Detector of spikes in the losses of a run, step by step; on all ranks alike if the losses are."""

    def __init__(self, window: int = WINDOW) -> None:
        self.losses: deque[tuple[int, float]] = deque(maxlen=window)

    def see(self, step: int, loss: float) -> bool:
        """Add the loss of a step; return whether it is a spike. One that is not finite is neither a spike nor added."""
        spike = isfinite(loss) and loss > self.limit()
        if isfinite(loss):
            self.losses.append((step, loss))  # a spike too: one that stays becomes the median, and the alarm ends
        return spike

    def limit(self) -> float:
        """Return the loss above which the next one is a spike; infinity before a quarter of the window is known."""
        losses = [loss for _, loss in self.losses]
        if len(losses) < (self.losses.maxlen or 0) // 4:
            return inf
        middle = median(losses)
        return middle + max(THRESHOLD * 1.4826 * median(abs(loss - middle) for loss in losses), LEAST)

    def rewind(self, step: int) -> None:
        """Forget the losses after a step, to which the run has returned."""
        self.losses = deque([pair for pair in self.losses if pair[0] <= step], self.losses.maxlen)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedBatches:
    """The numbered sequences of the data's stream that a run leaves out, and how often it was rewound for them."""

    ranges: tuple[tuple[int, int], ...] = ()
    """Ranges (first, end) of sequence numbers, the end excluded; sorted, with a gap between two."""
    rewinds: int = 0

    def skip(self, first: int, end: int, *, most_rewinds: int) -> "SkippedBatches":
        """Return what is skipped after one more rewind, which leaves out the sequences from `first` to before `end`.

        Raises: ArithmeticError if the run was rewound `most_rewinds` times already.
        """
        if self.rewinds >= most_rewinds:
            raise ArithmeticError(
                f"the loss spiked again after {self.rewinds} rewinds, and {most_rewinds} are allowed; look at the "
                "data, or continue with a smaller learning rate"
            )
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.ranges, (first, end)]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return SkippedBatches(ranges=tuple(merged), rewinds=self.rewinds + 1)

    def next(self, first: int, rows: int) -> list[tuple[int, int]]:
        """Return the next `rows` sequences from position `first` of the stream as ranges (first, end).

        The stream continues at the end of the last range, so that each sequence that is left is taken exactly once.
        """
        out: list[tuple[int, int]] = []
        for start, end in [*self.ranges, (2**63, 0)]:
            if rows and start > first:
                taken = min(rows, start - first)
                out.append((first, first + taken))
                rows -= taken
            first = max(first, end)
        return out

    def to_json(self) -> dict[str, Any]:
        """Return the value for a JSON file."""
        return {"ranges": [list(pair) for pair in self.ranges], "rewinds": self.rewinds}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SkippedBatches":
        """Return the value that `to_json` wrote. Raises: ValueError for another one."""
        with suppress(KeyError, TypeError, ValueError):
            ranges, rewinds = tuple((int(first), int(end)) for first, end in value["ranges"]), int(value["rewinds"])
            ends = [-1, *(end for pair in ranges for end in pair)]
            if rewinds >= 0 and all(a < b for a, b in pairwise(ends)):
                return cls(ranges=ranges, rewinds=rewinds)
        raise ValueError(f"skipped batches are {value!r}, want sorted ranges with gaps between them, and rewinds")
