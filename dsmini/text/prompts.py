"""Prompts as people give them: in arguments, on standard input, and in files."""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

LARGEST = 64 << 20
"""Largest size of a prompt in bytes, more than any context holds."""


def read_prompts(texts: Sequence[str], files: Sequence[Path], *, about: bool) -> Iterator[tuple[str, str]]:
    """Yield the heading and the text of each prompt; without a prompt, those of a new line.

    Args:
        texts: "-" reads one from standard input.
        about: show the beginning of a text in its heading.

    Raises: ValueError for standard input twice, for a file that cannot be read, and for one that is too large.
    """
    if texts.count("-") > 1:
        raise ValueError("--prompt has - more than once, and standard input can be read only once; leave one out")
    n = len(texts) + len(files)
    for i, text in enumerate(texts or ("\n",) * (n == 0), 1):
        if text == "-":
            yield f"{i} of {n}: standard input", _decoded(_all_of(sys.stdin.buffer, "standard input"))
        else:
            beginning = textwrap.shorten(without_surrogates(text), 50, placeholder="...")
            yield f"{i} of {n}: {beginning}" if about else f"{i} of {n}", text
    for i, path in enumerate(files, len(texts) + 1):
        try:
            with path.open("rb") as file:  # a pipe too, as the shell's <(...) makes one
                content = _all_of(file, f"the prompt file {path}")
        except OSError as error:
            raise ValueError(f"cannot read the prompt file {path}: {error.strerror}; check its name") from None
        yield f"{i} of {n}: {path}", _decoded(content)


def read_line() -> str:
    """Return the next line of standard input, with a prompt sign on a terminal; an empty text at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return _decoded(sys.stdin.buffer.readline())


def without_surrogates(text: str) -> str:
    """Return a text with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def _all_of(file: BinaryIO, name: str) -> bytes:
    """Return the content of a file. Raises: ValueError for one that is too large, or has no end."""
    content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{name} has more than {LARGEST:,} bytes; give a shorter prompt")
    return content


def _decoded(content: bytes) -> str:
    """Return a file's text without its last line break. Bytes that are not UTF-8 become lone surrogates, as in Python's
    arguments."""
    return re.sub(rb"\r?\n\Z", b"", content).decode("utf-8", errors="surrogateescape")
