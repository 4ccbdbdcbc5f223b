"""Signals that ask a run to stop: Ctrl-C, SIGTERM and a closed terminal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopAskedError(Exception):
    """Ends a phase that can be repeated, such as a validation, because a signal asked the run to stop."""


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Yield a list of the signals so far: Ctrl-C, SIGTERM, a closed terminal. A second Ctrl-C interrupts at once.

    The others often come repeatedly (from a scheduler, then from a shell that passes them on), so none interrupts.
    """
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    hangup = [number for number in hangup if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores it
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
