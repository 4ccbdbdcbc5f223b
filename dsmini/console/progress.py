"""Show progress: a bar in a terminal, lines at intervals in a pipe or a file."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from dsmini.console.messages import say

SECONDS_BETWEEN_LINES = 10.0
"""Shortest time between two lines in a pipe, for a caller that does not count them."""
LEAST_DONE, LEAST_SECONDS = 0.05, 5.0
"""Share of the work, and time, below which its rate says nothing about the time left."""
SECONDS_OF_SILENCE = 60.0
"""Time without a line in a pipe after which the next update prints one, for any caller."""


class Progress:
    """A display of the work done, its figures, and the time left.

    Args:
        total: amount of work, in any unit.
        label: name of the work.
        unit: "bytes" or "tokens" shows them.
        delay: seconds of work before a bar appears; short work shows none.
        line_every: amount of work between two lines in a pipe, the first update included; 0 gives a line for each
            update, None one every ten seconds. After a minute without a line the next update prints one.
        stays: leave the bar on the screen at the end.
        refresh_per_second: of the bar; 1 disturbs a measurement least.
    """

    def __init__(
        self,
        console: Console,
        total: float = 0,
        label: str = "",
        *,
        unit: Literal["", "bytes", "tokens"] = "",
        delay: float = 1.0,
        line_every: float | None = None,
        stays: bool = False,
        refresh_per_second: float = 10,
    ) -> None:
        self.console: Console = console
        self.total: float = total
        self.unit = unit
        self.label: str = label
        self._object = label
        """Name of the work, or of its stage; a caller may change it before an update."""
        self.done: float = 0.0
        """Amount of work that is done."""
        self.delay: float = delay
        self.line_every: float | None = line_every
        self._started = self._begun = self._last_line = time.monotonic()
        self._lines: int | None = None  # number of lines that the work done so far is worth
        self._ended: float | None = None
        # a dumb terminal shows no bar, and a file that FORCE_COLOR makes a terminal would get each of its frames
        self._live: bool = console.is_interactive and ("FORCE_COLOR" not in os.environ or console.file.isatty())
        columns = [TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[words]}")]
        self._bar = RichProgress(
            columns[0],
            BarColumn(bar_width=None),
            columns[1],
            console=console,
            refresh_per_second=refresh_per_second,
            disable=not self._live,
            transient=not stays,
        )
        self._task = self._bar.add_task(label, total=total, words="")

    def __enter__(self) -> "Progress":
        if self.delay <= 0:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the work began, until it ended."""
        return (self._ended or time.monotonic()) - self._started

    def update(self, done: float, words: str = "", *, left: float | None = None) -> None:
        """Show how much work is done.

        Args:
            words: more about it, such as the loss.
            left: seconds left, if the caller knows better than the rate so far; infinity shows none.
        """
        self.done = done
        now = time.monotonic()
        if self.unit == "bytes":
            words = f"{done / max(1, self.total):.0%} of {self.total:,.0f} bytes"
        elif self.unit == "tokens":
            words = f"{done:,.0f} of {self.total:,.0f} tokens"
        known = now - self._begun
        if left is None and known >= LEAST_SECONDS and done > 0 and done >= LEAST_DONE * self.total:
            left = known * max(0.0, self.total / done - 1)
        if left is not None and left < math.inf:
            words = f"{words}  {timedelta(seconds=round(left))} left".lstrip()
        self._bar.update(self._task, completed=done, total=self.total, description=self.label, words=words)
        if known >= self.delay:
            self._bar.start()
        if self._line_is_due(now - self._last_line):
            self._print_line(f"{self.label}  {words}".rstrip())

    def add(self, amount: float) -> None:
        """Show that this much more work is done."""
        self.update(self.done + amount)

    def stage(self, what: str, done: float, total: float) -> None:
        """Show work in stages, each with its own amount: the stage "reading" of the label "the corpus", for example.

        The bar of a stage that is done goes, and comes with the next.
        """
        label = f"{what} {self._object}".rstrip()
        if label != self.label or self.done >= self.total:
            self.label = label
            self._begun = time.monotonic()
        self.total = total
        self.update(done)
        if done >= total:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        say(self.console, line)

    @contextmanager
    def part(self, label: str) -> Iterator[Callable[[float], None]]:
        """Show a second bar below the first, in a pipe a line every ten seconds.

        The function that it yields takes the share that is done.
        """
        task = self._bar.add_task(label, total=1.0, words="")

        def update(share: float) -> None:
            self._bar.update(task, completed=share)
            if time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
                self._print_line(f"{label}  {share:.0%}")

        self._last_line = time.monotonic()
        try:
            yield update
        finally:
            self._bar.remove_task(task)

    def _line_is_due(self, silence: float) -> bool:
        if self.line_every is None:
            return silence > SECONDS_BETWEEN_LINES
        if self.line_every == 0:
            return True
        before, self._lines = self._lines, int(self.done // self.line_every)
        return before != self._lines or silence > SECONDS_OF_SILENCE

    def _print_line(self, line: str) -> None:
        """Print a line, where there is no bar."""
        if not self._live:
            self._last_line = time.monotonic()
            say(self.console, line)


@contextmanager
def patience(console: Console, label: str, seconds: float = SECONDS_BETWEEN_LINES) -> Iterator[None]:
    """Print a line every few seconds while a block runs that cannot say how far it is."""
    started, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            say(console, f"{label}: {time.monotonic() - started:.0f} s so far")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
