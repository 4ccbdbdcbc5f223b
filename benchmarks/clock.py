"""The time that cases take: how much is left, and an end for one that takes ten times its estimate."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

QUICK = 120.0
"""Seconds that --quick may take."""
TIMES, LEAST = 10.0, 30.0
"""A case is stopped at ten times its estimate, and not before it took half a minute."""
GRACE = 10.0
"""Seconds that one call into torch may continue after that."""


def allowed(estimate: float, spent: float | None) -> float:
    """Return the seconds that a case may take.

    Args:
        spent: seconds of --quick that are over; None without it.
    """
    most = max(LEAST, TIMES * estimate)
    return most if spent is None else min(most, max(LEAST, QUICK - spent))


class TookTooLong(BaseException):
    """The time of a case is over. Not an Exception: measured code must not catch it."""


@contextmanager
def deadline(seconds: float, on_stuck: Callable[[], None]) -> Iterator[None]:
    """Raise TookTooLong in the block when its time is over.

    An alarm interrupts Python wherever it is, so that no case has to look at a clock between its rounds. It cannot
    interrupt one call into torch, and on a slow CPU a backward pass can take minutes. Therefore, GRACE seconds later, a
    thread calls on_stuck, which must not return. The thread gets its turn, because torch frees Python's lock.
    Both work on Linux and macOS. A process for each case could be killed as well, but it would load torch and the
    models again, and a forked one hangs in OpenMP.
    """
    over = False

    def ring(*_: object) -> None:
        if not over:
            raise TookTooLong

    def give_up() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it would outlive a program that replaces this one, and end it
        on_stuck()

    last_resort = threading.Timer(seconds + GRACE, give_up)
    last_resort.daemon = True
    old = signal.signal(signal.SIGALRM, ring)
    # again and again: where Python calls __del__, an exception is lost
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
    """Seconds left, from the estimates of cases, corrected by what those before them really took."""

    def __init__(self, estimates: Sequence[float]) -> None:
        self.cases, self.nth = len(estimates), 0
        self.total = sum(estimates)
        self.expected = self.taken = 0.0
        """Seconds of the cases that are done, as estimated and as measured."""
        self.current, self.started = 0.0, 0.0

    @property
    def factor(self) -> float:
        """Real seconds in an estimated one. The first case alone, if it is short, changes it little."""
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
        """Return the seconds until all is done."""
        later = (self.total - self.expected - self.current) * self.factor
        if not self.current:
            return later
        return later + max(0.0, self.current * self.factor - (time.monotonic() - self.started))
