"""The texts of documents in small pieces, to count or measure them."""

from collections.abc import Iterator, Sequence

from dsmini.data.documents import Piece, ProgressCallback, Reader, silent
from dsmini.data.tokenising import lines

SIZE = 1 << 16
"""Bytes of a text: the tokenizers library holds 256 of them."""


def read_texts(pieces: Sequence[Piece], what: str = "reading", progress: ProgressCallback = silent) -> Iterator[bytes]:
    """Yield the pieces of documents as texts of about SIZE bytes that end where a line or a word does.

    Args:
        what: name of the work, for `progress`.
    """
    reader = Reader(pieces, what, progress)
    for piece in pieces:
        chunks = (chunk[i : i + SIZE] for chunk in reader.chunks(piece) for i in range(0, len(chunk), SIZE))
        yield from lines(chunks, SIZE)


def read_first(pieces: Sequence[Piece], nbytes: int) -> list[bytes]:
    """Return the first texts of documents, up to about this many bytes."""
    taken: list[bytes] = []
    size = 0
    texts = read_texts(pieces)
    while size < nbytes and (text := next(texts, None)) is not None:
        taken.append(text)
        size += len(text)
    return taken
