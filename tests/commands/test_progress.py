"""The one progress bar, in a terminal and in a pipe, and the lines for people around it."""

import io
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from dsmini.console.command import interruptible
from dsmini.console.progress import Progress, patience
from dsmini.training.run import TrainingProgress
from dsmini.training.trainer import StepResult


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds that the bar reads; a test sets them."""
    now = [100.0]
    monkeypatch.setattr("dsmini.console.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def pipe() -> Console:
    return Console(file=io.StringIO(), width=200)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, legacy_windows=False)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_pipe_gets_the_first_update_and_one_line_each_interval() -> None:
    console = pipe()
    with Progress(console, 10, "step", delay=0, line_every=4) as bar:
        for done in range(1, 11):
            bar.label = f"step {done}/10"
            bar.update(done, "loss 1.0", left=10.0 - done)
    assert said(console).splitlines() == [
        "step 1/10  loss 1.0  0:00:09 left",
        "step 4/10  loss 1.0  0:00:06 left",
        "step 8/10  loss 1.0  0:00:02 left",
    ]


def test_pipe_gets_every_update_or_one_after_a_minute_of_silence(clock: list[float]) -> None:
    for every, lines in ((0, 4), (5000, 2)):
        console = pipe()
        with Progress(console, 10_000, "step", line_every=every) as bar:
            for _ in range(4):
                bar.update(bar.done + 1, f"loss {bar.done:.0f}", left=9.0)
                clock[0] += 40
        want = [f"step  loss {done}  0:00:09 left" for done in range(0, 4, 4 // lines)]
        assert said(console).splitlines() == want


def test_pipe_gets_lines_of_a_second_bar_every_ten_seconds(clock: list[float]) -> None:
    console = pipe()
    with Progress(console, 10, "step", line_every=5) as bar, bar.part("validation") as update:
        for share in (0.1, 0.2, 0.3, 0.4):
            update(share)
            clock[0] += 6
    assert said(console).splitlines() == ["validation  30%"]


def test_pipe_gets_a_line_of_bytes_every_ten_seconds(clock: list[float]) -> None:
    console = pipe()
    with Progress(console, label="the corpus", unit="bytes") as bar:
        bar.stage("reading", 10, 2000)
        clock[0] += 11
        bar.stage("reading", 1000, 2000)
        clock[0] += 5
        bar.stage("tokenizing", 100, 2000)
        clock[0] += 6
        bar.stage("tokenizing", 500, 2000)
    assert said(console).splitlines() == [
        "reading the corpus  50% of 2,000 bytes  0:00:11 left",
        "tokenizing the corpus  25% of 2,000 bytes  0:00:18 left",
    ]
    assert bar.seconds == 22


def test_time_left_is_told_after_a_twentieth_and_five_seconds(clock: list[float]) -> None:
    for seconds, done in ((10, (0, 4, 10)), (4, (0, 50, 50))):
        console = pipe()
        with Progress(console, 100, "step", line_every=0) as bar:
            for amount in done:
                bar.update(amount)
                clock[0] += seconds
        left = "0:03:00" if seconds == 10 else "0:00:08"
        assert said(console).splitlines() == ["step", "step", f"step  {left} left"]


@pytest.mark.parametrize(("seconds", "left"), [((4.0, 2.0, 1.0), "  0:00:34 left"), ((1.0, 1.0, 1.0), "")])
def test_training_tells_the_time_left_after_three_steps_and_five_seconds(seconds: tuple[float, ...], left: str) -> None:
    console = pipe()
    losses = {"loss": 2.0, "mtp_loss": 0.0, "balance_loss": 0.0, "grad_norm": 1.0, "lr": 0.1}
    with TrainingProgress(console, 20) as bar:
        for step, each in enumerate(seconds, 1):
            done = {"step": step, "tokens": 8, "seconds": each, "data_wait": 0.0, "counts": None, "skipped": False}
            bar.show(StepResult(**losses, **done), 10.0)
    figures = "loss 2.000  10 tok/s  lr 1.0e-01"
    assert said(console).splitlines() == [f"step {n}/20  {figures}{left * (n == 3)}" for n in (1, 2, 3)]


def test_terminal_shows_label_words_and_time_left() -> None:
    console = terminal()
    with Progress(console, 8, "step", delay=0, stays=True) as bar:
        bar.update(2, "loss [b]1.0", left=75.4)
        bar.say("a line [above] the bar")
        with bar.part("validation") as on_part:
            on_part(0.5)
    shown = said(console)
    assert "step" in shown and "loss [b]1.0" in shown and "0:01:15 left" in shown
    assert "a line [above] the bar" in shown and "validation" in shown


def test_terminal_shows_no_bar_for_short_work(clock: list[float]) -> None:
    console = terminal()
    with Progress(console, 100, "reading", unit="bytes") as bar:
        bar.add(60)
        assert said(console) == ""
        clock[0] += 2
        bar.add(40)
    assert "reading" in said(console) and bar.done == 100


def test_stages_of_tokens_follow_each_other_and_leave_no_bar(clock: list[float]) -> None:
    shown, reading, writing = [], "reading", "writing"
    stages = [(reading, 100, 2000), (reading, 2000, 2000), (writing, 1, 9), (writing, 2, 9)]
    for console in (pipe(), terminal()):
        with Progress(console, unit="tokens") as bar:
            for stage in stages:
                bar.stage(*stage)
                shown.append(said(console))
                clock[0] += 11
            bar.stage(writing, 9, 9)
            ended = said(console)
        assert said(console) == ended
    assert shown[3].splitlines() == [
        "reading  2,000 of 2,000 tokens  0:00:00 left",
        "writing  1 of 9 tokens",
        "writing  2 of 9 tokens  0:00:38 left",
    ]
    assert shown[4] == "" and "2,000 of 2,000 tokens" in shown[5] == shown[6] and "2 of 9 tokens" in shown[7]


def test_patience_prints_lines_until_its_block_ends() -> None:
    console, before, end = pipe(), {*threading.enumerate()}, time.monotonic() + 100  # some may end meanwhile
    with patience(console, "reading m", seconds=0.01):
        while "so far" not in said(console) and time.monotonic() < end:
            time.sleep(0.01)
    lines = said(console).splitlines()
    assert lines and all(re.fullmatch(r"reading m: \d+ s so far", line) for line in lines)
    assert {*threading.enumerate()} <= before, "nobody is left to print"


def test_foreign_work_returns_raises_and_ends_late() -> None:
    assert interruptible(lambda: threading.current_thread() is not threading.main_thread())
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"it takes longer than 0\.1 s"):
        interruptible(lambda: release.wait(100), seconds=0.1)
    release.set()


def test_foreign_work_is_interrupted() -> None:
    """The signal comes while the work waits, whatever the handler was that pytest found at its start."""
    before, release = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Event()

    def work() -> bool:
        signal.raise_signal(signal.SIGINT)
        return release.wait(100)

    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(work)
    finally:
        release.set()
        signal.signal(signal.SIGINT, before)
