"""A page: texts that grow at the same time, shown one below the other."""

import sys
from collections.abc import Sequence
from typing import TextIO

from dsmini.console.printable import printable


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
