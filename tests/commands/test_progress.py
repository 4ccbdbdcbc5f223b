"""The one progress bar, in a terminal and in a pipe, and the lines for people around it."""

import io
import re
import signal
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


PIPES = tomllib.loads(Path(__file__).with_name("progress.toml").read_text())


def run_bar(console: Console, clock: list[float], case: dict[str, Any]) -> list[str]:
    """Update a bar as a case says; return what is shown after each update."""
    shown = []
    with Progress(console, **case["options"]) as bar:
        for first, *others in case["updates"]:
            if isinstance(first, str):
                bar.stage(first, *others)
            else:
                words, left = others or ("", None)
                bar.update(first, words, left=left)
            shown.append(said(console))
            clock[0] += case["seconds"]
    return shown


@pytest.mark.parametrize("name", PIPES)
def test_pipe_gets(name: str, clock: list[float]) -> None:
    assert run_bar(console := pipe(), clock, PIPES[name])[-1] == said(console), "the end adds no line"
    assert said(console).splitlines() == PIPES[name]["lines"]


@pytest.mark.parametrize("variable", ["TERM=dumb", "FORCE_COLOR=1"])
def test_a_terminal_without_a_cursor_and_a_file_with_colours_get_lines(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable.split("="))
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with Progress(console, 10, "step", delay=0, line_every=1) as bar:
        for done in (1, 2, 3):
            bar.update(done, "words")
    assert [line.split()[:2] for line in console.file.getvalue().splitlines()] == [["step", "words"]] * 3


def test_pipe_gets_lines_of_a_second_bar_every_ten_seconds(clock: list[float]) -> None:
    console = pipe()
    with Progress(console, 10, "step", line_every=5) as bar, bar.part("validation") as update:
        for share in (0.1, 0.2, 0.3, 0.4):
            update(share)
            clock[0] += 6
    assert said(console).splitlines() == ["validation  30%"]


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


def test_stages_follow_each_other_and_leave_no_bar(clock: list[float]) -> None:
    shown = run_bar(console := terminal(), clock, PIPES["stages of tokens"])
    assert shown[0] == "" and "2,000 of 2,000 tokens" in shown[1] == shown[2] and "2 of 9 tokens" in shown[3]
    assert said(console) == shown[-1]


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
        main = threading.main_thread().ident  # as the system does: a signal to this thread would wake nobody
        signal.pthread_kill(main, signal.SIGINT)
        return release.wait(100)

    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(work)
    finally:
        release.set()
        signal.signal(signal.SIGINT, before)
