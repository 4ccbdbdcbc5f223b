"""Text made into token ids, a chunk at a time, so that memory stays small whatever the size of the corpus.

A large document is tokenised in pieces of about 1 MiB, cut where a line begins with a letter or sign, or else a word.
Byte-pair encodings whose own splitting of text stops there, such as GPT-2's and DeepSeek's, give the tokens of the
uncut text.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmini.data import fim
from dsmini.data.documents import CHUNK, Piece, Reader
from dsmini.text.tokenizer import Tokenizer

_AT_ONCE = 4 * CHUNK
"""Bytes of text that the tokenizer is given in one call, at least."""
_SPACE = b" \t\r\n\f\v"


class Tokenising:
    """The token ids of one part of a corpus, piece by piece.

    Args:
        fim_rate: share of the documents that fill-in-the-middle rearranges.
        seed: seed of that choice.
    """

    def __init__(self, tokenizer: Tokenizer, reader: Reader, fim_rate: float, seed: int) -> None:
        self.tokenizer, self.reader, self.fim_rate, self.seed = tokenizer, reader, fim_rate, seed
        self.rearranged = 0
        """Number of documents that fill-in-the-middle has changed so far."""

    def ids(self, pieces: Sequence[Piece]) -> Iterator[NDArray[Any]]:
        """Yield the tokens of the pieces in order, of several texts at once."""
        waiting: list[bytes | int] = []
        size = 0
        for item in self._items(pieces):
            waiting.append(item)
            size += len(item) if isinstance(item, bytes) else 1
            if size >= _AT_ONCE:
                yield self._encode(waiting)
                waiting, size = [], 0
        if waiting:
            yield self._encode(waiting)

    def _items(self, pieces: Sequence[Piece]) -> Iterator[bytes | int]:
        """Yield the texts to be tokenised each for itself, and the tokens between them, in order."""
        for piece in pieces:
            if self.fim_rate and piece.stop - piece.start <= fim.LARGEST:
                text = b"".join(self.reader.chunks(piece))
                arranged = fim.arrange(text, piece.document.name, self.fim_rate, self.seed, self.tokenizer)
                self.rearranged += arranged is not None
                yield from arranged or [text]
            else:
                yield from lines(self.reader.chunks(piece))
            if piece.ends:
                yield self.tokenizer.end_of_document

    def _encode(self, items: Sequence[bytes | int]) -> NDArray[Any]:
        texts = iter(self.tokenizer.encode_all([item for item in items if isinstance(item, bytes)]))
        return np.concatenate([next(texts) if isinstance(item, bytes) else np.array([item]) for item in items])


def token_dtype(vocab_size: int) -> str:
    """Return numpy's name of the smallest unsigned integer that holds every token, little-endian."""
    if vocab_size <= 1 << 8:
        return "<u1"
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def lines(chunks: Iterator[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """Yield the same text in pieces that end where a line or a word does.

    Args:
        chunks: text in parts of at most `size` bytes. Most pieces are as short, and none is as long as three: the rest
            after a line may be cut at a word, and the rest after that have neither.
    """
    rest = b""
    for chunk in chunks:
        text = rest + chunk
        at = len(text) if len(text) < size else _last_border(text)
        if len(text) >= size:
            yield text[:at]
            text = text[at:]
        rest = text
    if rest:
        yield rest


def _last_border(text: bytes) -> int:
    """Return the place after the last single line break, or before the last single space, or before a character."""
    for separator, behind in ((b"\n", 1), (b" ", 0)):
        at = len(text) - 1
        for _ in range(1000):
            at = text.rfind(separator, 1, at)
            if at < 0:
                break
            if text[at - 1] not in _SPACE and text[at + 1] not in _SPACE:
                return at + behind
    at = len(text)
    while at > len(text) - 4 and text[at - 1] & 0xC0 == 0x80:
        at -= 1
    return at - 1 if text[at - 1] >= 0xC0 else len(text)
