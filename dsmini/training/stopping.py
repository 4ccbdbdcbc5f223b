"""Signals that ask a run to stop: Ctrl-C, SIGTERM and a closed terminal."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopAskedError(Exception):
    """Ends a phase that can be repeated, such as a validation, because a signal asked the run to stop."""


class StopSignals:
    """The signals that asked a run to stop.

    Args:
        agree: returns True in all processes of the run if its argument is True in one; None: this process is alone.
    """

    def __init__(self, agree: Callable[[bool], bool] | None = None) -> None:
        self.numbers: list[int] = []
        self.agree, self._agreed = agree, False

    @property
    def agreed(self) -> bool:
        """True in all processes once they know that a signal came to one. It stays True."""
        return self._agreed or (self.agree is None and bool(self.numbers))

    @agreed.setter
    def agreed(self, agreed: bool) -> None:
        self._agreed = agreed

    def came(self) -> bool:
        """Ask the others, which all ask together; return True in all if a signal came to one."""
        if self.agree is not None and not self._agreed:
            self._agreed = self.agree(bool(self.numbers))
        return self.agreed


@contextmanager
def asked_to_stop(agree: Callable[[bool], bool] | None = None) -> Iterator[StopSignals]:
    """Yield the signals so far: Ctrl-C, SIGTERM, a closed terminal. A second Ctrl-C interrupts at once.

    The others often come repeatedly (from a scheduler, then from a shell that passes them on), so none interrupts.
    """
    asked = StopSignals(agree)

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked.numbers:
            raise KeyboardInterrupt
        asked.numbers.append(number)

    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    hangup = [number for number in hangup if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores it
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
