"""Loss spikes: how one is recognised.

A spike is a loss far above the running median of the last WINDOW finite ones. Far is THRESHOLD robust standard
deviations, 1.4826 times the median distance from the median (Iglewicz and Hoaglin, 1993), and LEAST nats besides.
Neither a single odd batch nor the fall of a young loss moves a median much, as they would a mean.

What to do is PaLM's remedy (Chowdhery et al. 2022, section 5.1): return to a checkpoint from before the spike and leave
out the batches since then, which did not spike again when they were fed to an older state.
"""

from collections import deque
from math import inf, isfinite
from statistics import median

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
