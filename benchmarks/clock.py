"""Time of cases: how much is left, and a stop for a case that takes ten times its estimate."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

QUICK = 120.0
"""Seconds that --quick may take."""
TIMES, LEAST = 10.0, 30.0
"""A case is stopped after ten times its estimate, but not before half a minute."""
GRACE = 10.0
"""Seconds that one call into torch may continue after that."""


def allowed(estimate: float, spent: float | None) -> float:
    """Return the seconds that a case may take.

    Args:
        spent: seconds of --quick that have passed; None without --quick.
    """
    most = max(LEAST, TIMES * estimate)
    return most if spent is None else min(most, max(LEAST, QUICK - spent))


class TookTooLong(BaseException):
    """End of the time of a case; not an Exception, because measured code must not catch it."""


@contextmanager
def deadline(seconds: float, on_stuck: Callable[[], None]) -> Iterator[None]:
    """Raise TookTooLong in the block when its time is over.

    An alarm interrupts Python anywhere, so no case has to look at a clock. It cannot interrupt a call into torch, and
    on a slow CPU a backward pass can take minutes. Therefore a thread calls on_stuck GRACE seconds later; on_stuck must
    not return. The thread runs because torch frees Python's lock. Both work on Linux and macOS. A process for each case
    would have to load torch and the models again, and a forked one hangs in OpenMP.
    """
    over = False

    def ring(*_: object) -> None:
        if not over:
            raise TookTooLong

    def give_up() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # or it would end the program that replaces this one
        on_stuck()

    last_resort = threading.Timer(seconds + GRACE, give_up)
    last_resort.daemon = True
    old = signal.signal(signal.SIGALRM, ring)
    # repeated, because an exception inside __del__ is lost
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    last_resort.start()
    try:
        yield
    finally:
        over = True
        last_resort.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class Clock:
    """Estimate of the seconds left, corrected by the time that the cases so far took."""

    def __init__(self, estimates: Sequence[float]) -> None:
        self.cases, self.nth = len(estimates), 0
        self.total = sum(estimates)
        self.expected = self.taken = 0.0
        """Estimated and measured seconds of the cases that are done."""
        self.current, self.started = 0.0, 0.0

    @property
    def factor(self) -> float:
        """Real seconds per estimated second. A short first case changes it little."""
        prior = max(0.05 * self.total, 1e-9)
        return (self.taken + prior) / (self.expected + prior)

    def begin(self, estimate: float) -> None:
        """Begin a case."""
        self.nth += 1
        self.current, self.started = estimate, time.monotonic()

    def end(self, taken: float) -> None:
        """End the case."""
        self.expected += self.current
        self.taken += taken
        self.current = 0.0

    def skip(self, estimate: float) -> None:
        """Leave a case out."""
        self.nth += 1
        self.total -= estimate

    def left(self) -> float:
        """Return the seconds until all cases are done."""
        later = (self.total - self.expected - self.current) * self.factor
        if not self.current:
            return later
        return later + max(0.0, self.current * self.factor - (time.monotonic() - self.started))
