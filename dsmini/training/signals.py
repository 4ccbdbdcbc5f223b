"""The signals that ask a run to stop: Ctrl-C, SIGTERM, a closed terminal."""

import signal
from types import FrameType, TracebackType
from typing import Any

from dsmini.distributed.world import World


class StopAskedError(Exception):
    """Ends a phase that can be repeated, such as a validation, because a signal asked the run to stop."""


class StopSignals:
    """The signals that came to this process inside `with`. A second Ctrl-C interrupts at once.

    The others often come repeatedly (from a scheduler, then from a shell that passes them on), so none interrupts.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.numbers: list[int] = []
        self.stopping: bool = False
        """All processes of the run know that a signal came to one. It stays True."""

    def __enter__(self) -> "StopSignals":
        hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
        hangup = [number for number in hangup if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores it
        self.before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM, *hangup)
        }
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self.numbers:
            raise KeyboardInterrupt
        self.numbers.append(number)
        self.stopping = self.stopping or self.world.size == 1  # nobody else is to be asked

    def came(self) -> bool:
        """Ask the others, which all ask together; return True in all if a signal came to one."""
        self.stopping = self.stopping or self.world.any(bool(self.numbers))
        return self.stopping
