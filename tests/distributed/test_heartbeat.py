"""The heartbeat: of ranks in one process with scripted times, and of a process whose store ends."""

import itertools
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from dsmini.distributed.failure import STALLED
from dsmini.distributed.heartbeat import ENDED, Heartbeat, place_of


class Ended(BaseException):
    """The end of a process, in place of it."""


def end(status: int) -> None:
    raise Ended(status)


PLACE = {"waits": ("torch/distributed/c10d.py:1 all_reduce", True), "waits elsewhere": ("exchange.py:2 wait", True)}


@pytest.mark.parametrize(
    ("behaviours", "culprit", "speaker", "words"),
    [
        (("waits", "is stopped", "waits"), 1, 2, "rank 1 .* has given no sign of life for 4 s; it was"),
        (("is stopped", "waits", "waits"), 0, 1, "rank 0 .* has given no sign of life"),
        (("waits", "waits", "sleeps"), 2, 0, "rank 2 .* has stood still for 4 s: step 14, backward, in "),
        (("sleeps", "waits", "waits"), 0, 0, "rank 0 .* has stood still"),
        (("sleeps", "waits", "sleeps"), 0, 0, "rank 0 .* has stood still"),
        (("waits", "waits elsewhere", "waits"), 1, 0, "all ranks have waited inside a collective for 4 s; rank 1 "),
        (("ends", "waits", "is stopped"), None, None, ""),
        (("waits", "moves", "saves", "ends"), None, None, ""),
        (("waits", "validates", "waits"), None, None, ""),
        (("waits", "saves", "saves"), None, None, ""),
    ],
    ids=str,
)
def test_stall_is_found_and_ends_all(
    behaviours: tuple[str, ...], culprit: int | None, speaker: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, clock, lines = {"behaviour": ""}, itertools.count(), itertools.count()
    patches: dict[str, Callable[..., Any]] = {
        "os._exit": end,
        "time.sleep": lambda seconds: None,
        "time.monotonic": lambda: next(clock),
        "place_of": lambda thread: PLACE.get(now["behaviour"], ("faults.py:3 do", False)),
        "stack_of": lambda thread: next(lines) if now["behaviour"] == "validates" else 0,
    }
    for name, function in patches.items():
        monkeypatch.setattr(f"dsmini.distributed.heartbeat.{name}", function)
    store: Any = dist.HashStore()
    said: dict[int, tuple[int, float, str]] = {}
    ranks = [
        Heartbeat(rank, len(behaviours), store, 3.0, lambda *stall, rank=rank: said.setdefault(rank, stall))
        for rank in range(len(behaviours))
    ]
    for rank, behaviour in zip(ranks, behaviours, strict=True):
        rank.beat(14, "saving" if behaviour == "saves" else "backward")
        rank._publish(ENDED if behaviour == "ends" else rank.phase)
    living = {rank for rank, behaviour in enumerate(behaviours) if behaviour not in ("is stopped", "ends")}
    statuses: dict[int, int] = {}
    for _ in range(500 if speaker is None else 10):
        for rank in sorted(living - statuses.keys()):
            now["behaviour"] = behaviours[rank]
            if behaviours[rank] == "moves":
                ranks[rank].beat(14, "backward")
            try:
                ranks[rank].exchange(1.0)
            except Ended as ended:
                statuses[rank] = ended.args[0]
    if speaker is None:
        assert statuses == {} and said == {}
        return
    assert statuses == dict.fromkeys(living, STALLED) and said.keys() == {speaker}
    assert said[speaker][0] == culprit and re.match(words, said[speaker][2])


def test_rank_that_failed_ends_those_that_do_not_hear_of_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On NCCL a main thread waits in a collective for a rank that has ended, and no error comes."""
    monkeypatch.setattr(os, "_exit", end)
    store: Any = dist.HashStore()
    first, other = (Heartbeat(rank, 2, store, 3.0, Mock()) for rank in range(2))
    with pytest.raises(KeyError), other:
        raise KeyError("a fault")
    for _ in range(10):
        first.exchange(1.0)
    with pytest.raises(Ended, match="1"):
        first.exchange(1.0)
    assert "rank 0: lost another process (rank 1 has failed)" in capfd.readouterr().err
    first.on_stall.assert_not_called()  # pyright: ignore[reportAttributeAccessIssue]


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[float] = []
    beat = Heartbeat(0, 2, dist.HashStore(), 3.0, lambda *_: None, period=0.01)
    monkeypatch.setattr(beat, "exchange", lambda of: (passed.append(of), beat.closed.set()))
    clock = iter([0.0, 100.0, *[100.0] * 9])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    beat._run()
    assert passed == [0.03]


def test_end_of_the_store_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[bool] = []
    beat = Heartbeat(0, 2, dist.HashStore(), 3.0, lambda *_: None, lambda: lost.append(True), period=0.01)

    monkeypatch.setattr(beat, "exchange", Mock(side_effect=dist.DistNetworkError("Connection reset by peer")))
    beat._run()
    assert lost == [True]


def test_store_that_does_not_answer_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    beat = Heartbeat(1, 2, dist.HashStore(), 0.2, lambda *stall: said.append(stall[2]), period=0.01)
    monkeypatch.setattr(beat, "exchange", lambda _: beat.closed.wait(60))
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match=f"{STALLED}"):
        beat._run()
    beat.closed.set()
    assert "held by rank 0 or the launcher, has not answered for 0 s" in said[0]


def code(module: str, file: str, line: str) -> Any:
    """Return a function of one line of a module that is installed."""
    names: dict[str, Any] = {"__name__": module}
    exec(compile(f"def function(call):\n    {line}\n", f"/usr/lib/python3/site-packages/{file}", "exec"), names)
    return names["function"]


def test_place_is_the_innermost_line_outside_torch_of_an_installed_package_too() -> None:
    seen, held, main = [], threading.Lock(), threading.main_thread().ident
    ours = code("dsmini.distributed.mesh", "dsmini/distributed/mesh.py", "call(lock)")
    torchs = code("torch.distributed.distributed_c10d", "torch/distributed/distributed_c10d.py", "call()")

    def look() -> None:
        end = time.monotonic() + 20
        while not (seen and seen[-1][1]) and time.monotonic() < end:
            seen.append(place_of(main))
        held.release()

    held.acquire()
    threading.Thread(target=look).start()
    ours.__globals__["lock"] = held.acquire
    ours(torchs)
    assert seen[-1] == ("dsmini/distributed/mesh.py:2 function", True)
