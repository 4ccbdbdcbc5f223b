"""A row's new tokens as text while they come, until an end token or a stop string.

A stop string may begin in one token and end in another, so text that may be its beginning is held back until it is
known; what is given out never has to be taken back.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from dsmini.text.tokenizer import TextStream


class Continuation:
    """The text of one row's new tokens. The end token and the stop string are no part of it.

    What is given out depends on the tokens alone, not on how many come at once. The stop string that is complete
    first ends the row; of two that are complete with the same character, the longer one.

    Args:
        stream: a tokenizer's, which has seen the prompt.
        ends: the tokens that end the row.
        stops: the texts that end it.

    Raises: ValueError for an empty stop string.
    """

    def __init__(self, stream: TextStream, *, ends: Collection[int] = (), stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; give it a character, or leave it out")
        self.text = ""
        """The text that was given out so far."""
        self.n_tokens = 0
        """Number of tokens that were read, the one that ended the row included."""
        self.ended: Literal["end", "stop"] | None = None
        """The end token or stop string that has ended the row, by its kind."""
        self._stream, self._ends, self._stops = stream, ends, stops
        self._held = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain with these tokens; those after the row's end are not read."""
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
        """Return the text that was held back; no token follows."""
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
