"""The held-out part of a corpus: whole documents picked by their names, or else the end of the text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dsmini.data.documents import Document, Piece


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training part and the held-out part of a corpus."""

    train: list[Piece]
    val: list[Piece]
    words: str
    """Sentence that says how the held-out part was chosen."""


def split(documents: Sequence[Document], val_fraction: float, whole_characters: bool) -> Split:
    """Hold out whole documents, picked by the hash of their names, up to the fraction; if they are too few or too
    uneven for that, hold out the end of the whole text.

    Args:
        whole_characters: move that cut up to three bytes on, to where a UTF-8 character begins.
    """
    budget = int(val_fraction * sum(document.size + 1 for document in documents))
    held_out: set[int] = set()
    size = 0
    for i in sorted(range(len(documents)), key=lambda i: _name_hash(documents[i].name)):
        if size + documents[i].size + 1 <= budget:
            held_out.add(i)
            size += documents[i].size + 1
    if size >= 0.8 * budget and held_out:
        whole = [Piece(document=document, start=0, stop=document.size, ends=True) for document in documents]
        return Split(
            train=[piece for i, piece in enumerate(whole) if i not in held_out],
            val=[piece for i, piece in enumerate(whole) if i in held_out],
            words=f"{len(held_out)} whole files",
        )
    return cut_once(documents, val_fraction, whole_characters)


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def cut_once(documents: Sequence[Document], val_fraction: float, whole_characters: bool) -> Split:
    """Cut the documents, with an end between each two, in one place."""
    cut = int((1 - val_fraction) * (sum(document.size + 1 for document in documents) - 1))
    train: list[Piece] = []
    val: list[Piece] = []
    at = 0
    for document in documents:
        size, ends = document.size, document is not documents[-1]
        here = min(max(cut - at, 0), size + ends)
        if whole_characters and 0 < here < size:
            here += _continuation_bytes(document, here)
        if here:
            train.append(Piece(document=document, start=0, stop=min(here, size), ends=here > size))
        if here < size + ends:
            val.append(Piece(document=document, start=min(here, size), stop=size, ends=ends))
        at += size + 1
    return Split(train=train, val=val, words=f"the last {val_fraction:.0%} of the text")


def _continuation_bytes(document: Document, at: int) -> int:
    """Return how many bytes from here on, at most 3, belong to a character that began before."""
    rest = Piece(document=document, start=at, stop=min(at + 3, document.size), ends=False)
    following = b"".join(chunk for chunk, _ in rest.chunks())
    return next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
