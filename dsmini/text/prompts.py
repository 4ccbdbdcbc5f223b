"""Prompts as people give them: in arguments, on standard input, and in files."""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_prompts(texts: Sequence[str], files: Sequence[Path], *, about: bool) -> Iterator[tuple[str, str]]:
    """Yield the heading and the text of each prompt; without any, that of a new line.

    Args:
        texts: "-" reads one from standard input.
        about: say in the heading how a text begins.

    Raises: ValueError for standard input twice, and for a file that cannot be read.
    """
    if texts.count("-") > 1:
        raise ValueError("--prompt has - more than once, and standard input can be read only once; leave one out")
    n = len(texts) + len(files)
    for i, text in enumerate(texts or ("\n",) * (n == 0), 1):
        if text == "-":
            yield f"{i} of {n}: standard input", _decoded(sys.stdin.buffer.read())
        else:
            beginning = textwrap.shorten(printable(text), 50, placeholder="...")
            yield f"{i} of {n}: {beginning}" if about else f"{i} of {n}", text
    for i, path in enumerate(files, len(texts) + 1):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the prompt file {path}: {error.strerror}; check its name") from None
        yield f"{i} of {n}: {path}", _decoded(content)


def read_line() -> str:
    """Return the next line of standard input, asked for if it is a terminal; an empty text at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return _decoded(sys.stdin.buffer.readline())


def printable(text: str) -> str:
    """Return a text whose undecodable bytes are shown as U+FFFD."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def _decoded(content: bytes) -> str:
    """Return a file's text without its last line break; what is no UTF-8 stays as Python keeps it in arguments."""
    return re.sub(rb"\r?\n\Z", b"", content).decode("utf-8", errors="surrogateescape")
