"""Progress in bytes: a bar for what takes a second or more, and the rate at the end."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class BytesProgress:
    """A bar on the standard error: in a terminal after a second, elsewhere a line every ten seconds."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.started = self.said = time.monotonic()
        self.console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn())
        more = (TransferSpeedColumn(), TimeRemainingColumn())
        shown = self.console.is_terminal
        self.bar = Progress(*columns, *more, console=self.console, disable=not shown, transient=True)
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> "BytesProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.seconds = time.monotonic() - self.started

    def add(self, nbytes: int) -> None:
        """Count bytes that are read or written now."""
        self.done += nbytes
        now = time.monotonic()
        if now - self.started < 1:
            return
        self.bar.start()
        self.bar.update(self.task, completed=self.done)
        if not self.console.is_terminal and now - self.said > 10:
            self.said = now
            line = f"{self.what}: {self.done / max(1, self.total):.0%} of {self.total:,} bytes"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def rate(verb: str, nbytes: int, seconds: float) -> str:
    """Return a sentence that says how many bytes were read or written, and how fast."""
    per_second = nbytes / max(seconds, 1e-9) / 1e6
    return f"{verb} {nbytes:,} bytes in {seconds:.1f} s: {per_second:,.0f} MB/s"
