"""The text of a row's new tokens as they come, until an end token or a stop string.

A stop string may begin in one token and end in another. Text that may begin a stop string is therefore held back until
this is decided, so that no text ever has to be taken back.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from dsmini.text.tokenizer import TextStream


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
        if "" in stops:
            raise ValueError("a stop string is empty; give it a character, or leave it out")
        self.text = ""
        """The text so far, without the part that is held back."""
        self.n_tokens = 0
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
