"""The texts of documents in pieces that end where a line or a word does, so that no more than a piece is held.

Byte-pair encodings whose own splitting of text stops at such places, such as GPT-2's and DeepSeek's, give the tokens of
the uncut text.
"""

from collections.abc import Iterator, Sequence

from dsmini.data.documents import CHUNK, Piece, ProgressCallback, Reader, silent

SIZE = 1 << 16
"""Bytes of a text: the tokenizers library holds 256 of them."""
_SPACE = b" \t\r\n\f\v"


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
