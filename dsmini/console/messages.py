"""Print lines for people; every command and package uses these functions."""

from rich.console import Console
from rich.text import Text

from dsmini.console.printable import printable


def say(console: Console, line: str = "", style: str = "") -> None:
    """Print a line without markup, colours of numbers or wrapping; its control characters become pictures."""
    console.print(Text(printable(line), style=style), soft_wrap=True)


def rate(verb: str, nbytes: int, seconds: float) -> str:
    """Return in words how many bytes were read or written, and how fast."""
    per_second = nbytes / max(seconds, 1e-9) / 1e6
    return f"{verb} {nbytes:,} bytes in {seconds:.1f} s: {per_second:,.0f} MB/s"
