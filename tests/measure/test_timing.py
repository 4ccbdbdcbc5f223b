"""Times in turns: what counts, in which order, and what is made of it."""

from collections.abc import Callable

import pytest
import torch

from dsmini import machine
from dsmini.machine import once
from dsmini.measure import timing
from dsmini.measure.timing import interleaved, ratios, spread, times

CPU = torch.device("cpu")


class FakeTime:
    """A clock that moves only when somebody works."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, list[str]()
        patch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name: str, *seconds: float) -> Callable[[], object]:
        """A run that takes these seconds, the last of them from then on."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def test_once_waits_for_the_device(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        clock.log.append("wait")
        clock.now += 10.0 * (clock.log == ["wait", "run", "wait"])  # the device goes on after the call

    monkeypatch.setattr(machine, "synchronize", synchronize)
    assert once(clock.work("run", 1.0), CPU) == 11
    assert clock.log == ["wait", "run", "wait"]


def test_times_leave_out_the_warm_up(clock: FakeTime) -> None:
    assert times(clock.work("a", 9.0, 1.0), CPU, seconds=0.0) == [1, 1, 1]
    assert len(times(clock.work("a", 1.0), CPU, seconds=5.0)) == 5
    assert len(times(clock.work("a", 1.0), CPU, seconds=0.0, least=7)) == 7


def test_interleaved_takes_turns_after_a_warm_up(clock: FakeTime) -> None:
    taken = interleaved({"a": clock.work("a", 9.0, 1.0), "b": clock.work("b", 9.0, 2.0)}, CPU, rounds=2)
    assert clock.log == list("ababab")
    assert taken == {"a": [1, 1], "b": [2, 2]}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (7.0, 2), (100.0, 5)])
def test_interleaved_begins_no_round_after_its_time(clock: FakeTime, seconds: float, rounds: int) -> None:
    taken = interleaved({"a": clock.work("a", 1.0), "b": clock.work("b", 2.0)}, CPU, 5, seconds)
    assert taken == {"a": [1] * rounds, "b": [2] * rounds}


def test_ratios_of_a_slow_round_cancel() -> None:
    taken = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]}
    assert ratios(taken, "theirs", "ours") == [2, 2, 2]
    with pytest.raises(ValueError, match="zip"):
        ratios({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


@pytest.mark.parametrize(
    ("values", "low", "median", "high"),
    [([3.0], 3, 3, 3), ([1.0, 3.0], 1.5, 2, 2.5), ([5.0, 1.0, 2.0, 4.0, 3.0], 2, 3, 4)],
)
def test_spread_is_median_and_quartiles(values: list[float], low: float, median: float, high: float) -> None:
    assert spread(values) == {"measured": median, "low": low, "high": high}
