"""Prompts as people give them, and the texts that follow, as they are shown.

A stop string may begin in one token and end in another. Text that may begin a stop string is therefore held back until
this is decided, so that no text ever has to be taken back.
"""

import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

from dsmini.console.messages import printable
from dsmini.reading import refusing
from dsmini.text.tokenizer import TextStream


def read_prompts(texts: Sequence[str], files: Sequence[Path], *, about: bool) -> Iterator[tuple[str, str]]:
    """Yield the heading and the text of each prompt; without a prompt, those of a new line.

    Args:
        texts: "-" reads one from standard input.
        about: show the beginning of a text in its heading.

    Raises: ValueError for standard input twice, and for a file that cannot be read.
    """
    if texts.count("-") > 1:
        raise ValueError("--prompt has - more than once, and standard input can be read only once; leave one out")
    n = len(texts) + len(files)
    for i, text in enumerate(texts or ("\n",) * (n == 0), 1):
        if text == "-":
            yield f"{i} of {n}: standard input", _decoded(sys.stdin.buffer.read())
        else:
            beginning = textwrap.shorten(without_surrogates(text), 50, placeholder="...")
            yield f"{i} of {n}: {beginning}" if about else f"{i} of {n}", text
    for i, path in enumerate(files, len(texts) + 1):
        with refusing(f"cannot read the prompt file {path}", "check its name"), path.open("rb") as file:
            content = file.read()  # a pipe too, as the shell's <(...) makes one
        yield f"{i} of {n}: {path}", _decoded(content)


def read_line() -> str:
    """Return the next line of standard input, with a prompt sign on a terminal; an empty text at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return _decoded(sys.stdin.buffer.readline())


def without_surrogates(text: str) -> str:
    """Return a text with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def _decoded(content: bytes) -> str:
    """Return a file's text without its last line break. Bytes that are not UTF-8 become lone surrogates, as in Python's
    arguments."""
    return re.sub(rb"\r?\n\Z", b"", content).decode("utf-8", errors="surrogateescape")


# --- the text of a row's new tokens as they come


def check_stops(stops: Collection[str]) -> None:
    """Raise ValueError for an empty stop string."""
    if "" in stops:
        raise ValueError("a stop string is empty; give it a character, or leave it out")


class Continuation:
    """The text of one row's new tokens, without the end token or the stop string.

    The text depends on the tokens alone, not on how many come at once. The stop string that is complete first ends
    the row. If two are complete with the same character, the longer one does.

    Args:
        stream: the tokenizer's stream, which has decoded the prompt.
        ends: the tokens that end the row.
        stops: the strings that end the row.

    Raises: ValueError for an empty stop string.
    """

    def __init__(self, stream: TextStream, *, ends: Collection[int] = (), stops: Sequence[str] = ()) -> None:
        check_stops(stops)
        self.text: str = ""
        """The text so far, without the part that is held back."""
        self.n_tokens: int = 0
        """Number of tokens read so far, including the one that ended the row."""
        self.ended: Literal["end", "stop"] | None = None
        """The kind of end that the row has had; None before its end."""
        self._stream, self._ends, self._stops = stream, ends, stops
        self._held = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens make certain. Tokens after the row's end are not read."""
        before = len(self.text)
        for token in tokens:
            if self.ended is not None:
                break
            self.n_tokens += 1
            if token in self._ends:
                self.close()
                self.ended = self.ended or "end"
            else:
                self._take(self._stream.decode([token]))
        return self.text[before:]

    def close(self) -> str:
        """End the row and return the text that was held back."""
        before = len(self.text)
        if self.ended is None:
            self._take(self._stream.decode([], final=True))
        self.text += self._held
        self._held = ""
        return self.text[before:]

    def _take(self, piece: str) -> None:
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            certain, self._held, self.ended = min(found)[1], "", "stop"
        else:
            certain = len(text) - _may_begin(text, self._stops)
            self._held = text[certain:]
        self.text += text[:certain]


def _may_begin(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


# --- texts that grow at the same time


class Page:
    """Shows texts that grow at the same time, one below the other.

    The first text that has not ended streams, and those below it wait. Nothing is shown before there is a text, so that
    a mistake can still be told alone.

    Args:
        headings: one for each text; a single text is shown without its heading.
    """

    def __init__(self, headings: Sequence[str], out: TextIO | None = None) -> None:
        self._headings, self._out = headings, sys.stdout if out is None else out
        self._waiting = [""] * len(headings)
        self._ended = [False] * len(headings)
        self._at = -1

    def add(self, i: int, piece: str) -> None:
        """Append to a text."""
        if self._at < 0:
            self._turn()
        if i == self._at:
            self._write(piece)
        else:
            self._waiting[i] += piece

    def end(self, i: int) -> None:
        """End a text, so that the next one is shown. A second call changes nothing."""
        if self._at < 0:
            self._turn()
        self._ended[i] = True
        while self._at < len(self._ended) and self._ended[self._at]:
            self._write("\n")
            self._turn()

    def _turn(self) -> None:
        self._at += 1
        if self._at == len(self._headings):
            return
        heading = f"== {self._headings[self._at]} ==\n" if len(self._headings) > 1 else ""
        self._write(("\n" if self._at else "") + heading + self._waiting[self._at])

    def _write(self, text: str) -> None:
        self._out.write(printable(text) if self._out.isatty() else text)
        self._out.flush()
