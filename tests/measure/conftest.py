"""A clock that only the simulated work moves."""

import time
from collections.abc import Callable

import pytest


class Clock:
    """Clock that moves by what is paid, with a log of what ran."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, list[str]()

    def pay(self, seconds: float) -> None:
        self.now += seconds

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a run that takes these seconds in turn, and repeats the last."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.pay(left.pop(0) if len(left) > 1 else left[0])

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock
