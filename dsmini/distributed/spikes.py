"""Loss spikes: how one is recognised, and the batches that a rewound run leaves out.

A spike is a loss far above the running median of the last `window` finite ones. Far is `threshold` robust standard
deviations, 1.4826 times the median distance from the median (Iglewicz and Hoaglin, 1993), and `least` nats besides.
Neither a single odd batch in the window nor the fall of a young loss moves a median much, as they would a mean. A
steep fall widens the distances, so the rule is slow to speak while the loss is young.

What to do is PaLM's remedy (Chowdhery et al. 2022, section 5.1): return to a checkpoint from before the spike and leave
out the batches since then, which did not spike again when they were fed to an older state. It returns to about 100
steps before, and skips 200 to 500 batches.

The data is a stream of numbered sequences. SkippedBatches are ranges of it that no step takes.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import median
from typing import Any

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class Spikes:
    """Detector of spikes in the losses of a run, step by step; on all ranks alike if the losses are.

    Args:
        window: number of losses that the median is taken of.
        threshold: robust standard deviations above the median.
        least: smallest spike in nats, for a loss that hardly varies.
    """

    def __init__(self, window: int = 128, threshold: float = 10.0, least: float = 1.0) -> None:
        if window < 8:
            raise ValueError(f"the window of the spike detector is {window}, want 8 losses or more; the default is 128")
        self.threshold, self.least = threshold, least
        self.enough = window // 4
        """Losses without which no verdict is given."""
        self._losses: deque[tuple[int, float]] = deque(maxlen=window)

    def see(self, step: int, loss: float) -> bool:
        """Add the loss of a step; return whether it is a spike.

        One that is not finite is neither a spike nor added: such a step changes nothing, and is counted elsewhere.
        """
        if not isfinite(loss):
            return False
        spike = loss > self.limit()
        self._losses.append((step, loss))  # a spike too: one that stays becomes the median, and the alarm ends
        return spike

    def limit(self) -> float:
        """Return the loss above which the next one is a spike; infinity before there are enough losses."""
        losses = [loss for _, loss in self._losses]
        if len(losses) < self.enough:
            return float("inf")
        middle = median(losses)
        spread = NORMAL * median(abs(loss - middle) for loss in losses)
        return middle + max(self.threshold * spread, self.least)

    def rewind(self, step: int) -> None:
        """Forget the losses after a step, to which the run has returned."""
        kept = [pair for pair in self._losses if pair[0] <= step]
        self._losses.clear()
        self._losses.extend(kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedBatches:
    """The sequences that a run leaves out, and how often it was rewound for them."""

    ranges: tuple[tuple[int, int], ...] = ()
    """Ranges (first, end) of sequence numbers, the end excluded; sorted, with a gap between two."""
    rewinds: int = 0

    def __post_init__(self) -> None:
        ends = [end for pair in self.ranges for end in pair]
        if self.rewinds < 0 or any(end < 0 for end in ends) or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(
                f"skipped batches are ranges={self.ranges}, rewinds={self.rewinds}; want ranges that are not empty, "
                "sorted and apart, so restore the file that held them"
            )

    def skip(self, first: int, end: int, *, most_rewinds: int) -> "SkippedBatches":
        """Return what is skipped after one more rewind, which leaves out the sequences from `first` to before `end`.

        Raises: ArithmeticError if the run was rewound `most_rewinds` times already; ValueError for an empty range.
        """
        if not 0 <= first < end:
            raise ValueError(f"the batches to skip are {first} to {end}, want a first one before the end; check both")
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
        for start, end in [*self.ranges, (first + rows + self.total, 0)]:
            if rows and start > first:
                taken = min(rows, start - first)
                out.append((first, first + taken))
                rows -= taken
            first = max(first, end)
        return out

    @property
    def total(self) -> int:
        """Number of sequences left out."""
        return sum(end - first for first, end in self.ranges)

    def to_json(self) -> dict[str, Any]:
        """Return the value for a JSON file."""
        return {"ranges": [list(pair) for pair in self.ranges], "rewinds": self.rewinds}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SkippedBatches":
        """Return the value that `to_json` wrote. Raises: ValueError for another one."""
        ranges, rewinds = value.get("ranges"), value.get("rewinds")
        pairs = isinstance(ranges, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in ranges)
        numbers = [rewinds, *(end for pair in ranges for end in pair)] if pairs and ranges is not None else [None]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"skipped batches are {value!r}, want ranges of two numbers each, and rewinds")
        return cls(ranges=tuple((first, end) for first, end in ranges or ()), rewinds=int(rewinds or 0))
