"""Text made into tokens: where it is cut, and what fill-in-the-middle rearranges."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.data import documents, tokenized
from dsmini.data.dialogue import NAMES, dialogues
from dsmini.data.documents import lines
from dsmini.data.tokenized import arrange
from dsmini.text.tokenizer import ByteTokenizer
from tests.helpers import corpora

BEGIN, HOLE, END = ByteTokenizer.fim
WORDS = [b"word ", b"line\n", b"\n", b" ", "é".encode(), "日".encode(), b"x" * 50]


def single(text: bytes, separator: bytes) -> set[int]:
    """Return the places inside a text of a separator that has no white space on either side."""
    inside = (i for i in range(1, len(text) - 1) if text[i : i + 1] == separator)
    return {i for i in inside if not {text[i - 1], text[i + 1]} & set(b" \t\r\n\f\v")}


@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_pieces_are_cut_between_words_or_characters(parts: list[bytes]) -> None:
    text = b"".join(parts)
    pieces = list(lines((text[i : i + 16] for i in range(0, len(text), 16)), 16))
    assert b"".join(pieces) == text and all(0 < len(piece) < 48 for piece in pieces)
    for piece in pieces:
        piece.decode()
    for before, after in pairwise(pieces):
        cut = len(before)
        if cut - 1 in single(before + after, b"\n"):
            continue
        assert not single(before, b"\n")
        assert cut in single(before + after, b" ") or not single(before, b" ")


def documents_of(tokens: np.ndarray) -> list[bytes]:
    return tokens.tobytes().split(b"\0")[:-1]


def parse(text: bytes) -> bytes | None:
    """Return the document that was rearranged; None if none was."""
    if BEGIN not in text:
        return None
    assert text[0] == BEGIN and text.count(HOLE) == text.count(END) == text.count(BEGIN) == 1
    prefix, rest = text[1:].split(bytes([HOLE]))
    suffix, middle = rest.split(bytes([END]))
    for part in (prefix, middle, suffix):
        part.decode()  # no character is cut
    return prefix + middle + suffix


def test_share_of_training_documents_is_rearranged(place: Path) -> None:
    for i in range(600):
        (place / f"texts/more-{i}.txt").write_bytes(f"número {i} und ähnlich".encode() * 5)
    plain, corpus = corpora.load(place), corpora.load(place, fim_rate=0.3)
    originals, texts = documents_of(plain.train), documents_of(corpus.train)
    assert len(texts) == len(originals)
    back = [parse(text) for text in texts]
    changed = [text is not None for text in back]
    assert [text if b is None else b for text, b in zip(texts, back, strict=True)] == originals
    assert sum(changed) == corpus.rearranged == corpus.describe()["rearranged"]
    # binomial: five deviations
    assert abs(sum(changed) - 0.3 * len(texts)) < 5 * (0.21 * len(texts)) ** 0.5
    assert np.array_equal(corpus.val, plain.val)
    everything = corpora.load(place, fim_rate=1.0)
    assert everything.rearranged == len(texts)


def test_rearrangement_depends_on_seed_and_name_alone(place: Path) -> None:
    before = {parse(text): text for text in documents_of(corpora.load(place, fim_rate=1.0).train)}
    (place / "texts/a-new-one.txt").write_bytes(b"new " * 10)
    after = {parse(text): text for text in documents_of(corpora.load(place, fim_rate=1.0).train)}
    both = before.keys() & after.keys()
    assert len(both) > 30 and all(before[text] == after[text] for text in both)
    other = {parse(text): text for text in documents_of(corpora.load(place, fim_rate=1.0, seed=1).train)}
    assert sum(other[text] == before[text] for text in other.keys() & before.keys()) < 5


def arranged(text: bytes, seed: int) -> tuple[bytes, bytes, bytes]:
    """Return prefix, suffix and middle of a document that is rearranged."""
    parts = arrange(text, "name", 1.0, seed, ByteTokenizer())
    assert parts is not None
    (begin, prefix, hole, suffix, end, middle) = parts
    assert (begin, hole, end) == (BEGIN, HOLE, END)
    assert isinstance(prefix, bytes) and isinstance(middle, bytes) and isinstance(suffix, bytes)
    return prefix, suffix, middle


@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12), st.integers(0, 999))
def test_cuts_fall_between_characters(text: str, seed: int) -> None:
    prefix, suffix, middle = arranged(text.encode(), seed)
    assert prefix.decode() + middle.decode() + suffix.decode() == text


def test_cuts_are_uniform() -> None:
    seen = np.zeros(5)
    for seed in range(5000):
        prefix, _, middle = arranged("äöüß".encode(), seed)
        for at in (len(prefix), len(prefix) + len(middle)):
            seen[at // 2] += 1
    assert np.abs(seen - 2000).max() < 5 * 40  # binomial of 10000 at a fifth


def test_documents_with_marks_or_too_large_stay_unchanged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (place / "texts").iterdir():
        path.write_bytes(b"latin \xfe one " * 5)
    (place / "texts/large.txt").write_bytes(b"large " * 200)
    monkeypatch.setattr("dsmini.data.tokenized.LARGEST_FIM", 1000)
    corpus = corpora.load(place, fim_rate=1.0)
    assert corpus.rearranged == 0 and corpus.sha256 == corpora.load(place).sha256


def test_tokens_do_not_depend_on_chunk_size(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK", 100)
    monkeypatch.setattr(tokenized, "_AT_ONCE", 300)
    corpus = corpora.load(place)
    assert sorted(documents_of(corpus.train) + documents_of(corpus.val)) == sorted(corpora.TEXTS.values())


def test_dialogues_are_lines_of_two_that_end_with_an_empty_one() -> None:
    text = dialogues(200)
    assert text == dialogues(200) != dialogues(200, seed=1)
    for conversation in text.removesuffix("\n\n").split("\n\n"):
        lines = conversation.splitlines()
        assert [line.startswith("> ") for line in lines] == [True, False] * (len(lines) // 2) and len(lines) >= 2
        names = {word for line in lines for word in re.findall(r"\w+", line) if word in NAMES}
        assert len(names) <= 1 and ("Your name is" not in conversation or names)
