"""The cache of tokenized corpora: read when nothing changed, built when something did, whole or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsmini.data import tokenized
from dsmini.data.corpus import Corpus
from dsmini.text.tokenizer import ByteTokenizer
from tests.helpers import corpora

Change = Callable[[Path], object]


def test_corpus_is_tokenized_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpora.load(place)
    assert "tokenized once into" in first.cache
    monkeypatch.setattr(ByteTokenizer, "encode_all", None)
    second = corpora.load(place, seed=1)
    assert "read from" in second.cache
    assert second.describe() == first.describe()
    assert np.array_equal(second.train, first.train) and np.array_equal(second.val, first.val)
    assert isinstance(second.train, np.memmap) and not second.train.flags.writeable
    (entry,) = corpora.entries(place)
    meta = json.loads((entry / "meta.json").read_text())
    assert meta["sha256"] == first.sha256 and meta["train_tokens"] == len(first.train)
    assert (entry / "meta.json").stat().st_size < 1000


def replace_by_one_of_its_size_and_time(text: Path) -> None:
    times = text.stat()
    text.write_bytes(text.read_bytes().swapcase())
    os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Change] = {
    "content alone": lambda texts: replace_by_one_of_its_size_and_time(texts / "00.txt"),
    "content": lambda texts: (texts / "00.txt").write_bytes(b"other " * 40),
    "folder": lambda texts: (texts.rename(texts.with_name("moved")), texts.symlink_to("moved")),
    "time": lambda texts: os.utime(texts / "00.txt", ns=(1, 1)),
    "one more": lambda texts: (texts / "new.txt").write_bytes(b"new " * 40),
    "name": lambda texts: (texts / "00.txt").rename(texts / "000.txt"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_corpus_is_tokenized_again(place: Path, change: str) -> None:
    corpora.load(place)
    CHANGES[change](place / "texts")
    assert "tokenized once" in corpora.load(place).cache and len(corpora.entries(place)) == 2


def flip(entry: Path) -> None:
    data = bytearray((entry / "val.bin").read_bytes())
    data[3] ^= 1
    (entry / "val.bin").write_bytes(data)


DAMAGES: dict[str, Change] = {
    "shorter": lambda entry: os.truncate(entry / "train.bin", 100),
    "flipped": flip,
    "lost": lambda entry: (entry / "val.bin").unlink(),
    "garbled": lambda entry: (entry / "meta.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_built_again_and_said(place: Path, damage: str) -> None:
    first = corpora.load(place)
    train, val = first.train.tobytes(), first.val.tobytes()
    (entry,) = corpora.entries(place)
    DAMAGES[damage](entry)
    again = corpora.load(place)
    assert "tokenized again into" in again.cache and str(entry) in again.cache
    assert again.train.tobytes() == train and again.val.tobytes() == val and again.sha256 == first.sha256
    assert "read from" in corpora.load(place).cache and corpora.entries(place) == [entry]


def test_large_entry_is_checked_by_size_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "_HASHED_ON_LOAD", 0)
    corpora.load(place)
    flip(corpora.entries(place)[0])
    assert "read from" in corpora.load(place).cache
    DAMAGES["shorter"](corpora.entries(place)[0])
    assert "train.bin had 100 bytes, want" in corpora.load(place).cache


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_build_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)) as caught:
            corpora.load(place)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot tokenize the corpus into {place / 'corpus'}: No space left on device"
    assert corpora.entries(place) == []
    assert "tokenized once" in corpora.load(place).cache


@pytest.mark.parametrize("damaged", [False, True])
def test_slower_builder_takes_what_is_there(place: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    """Two processes build at once; both may have found the same damaged entry."""
    if damaged:
        corpora.load(place)
        DAMAGES["shorter"](corpora.entries(place)[0])
    real = tokenized.CorpusCache._keep
    inside: list[Corpus] = []

    def meanwhile(cache: tokenized.CorpusCache, partial: Path) -> None:
        monkeypatch.setattr(tokenized.CorpusCache, "_keep", real)
        inside.append(corpora.load(place))
        real(cache, partial)

    monkeypatch.setattr(tokenized.CorpusCache, "_keep", meanwhile)
    outside = corpora.load(place)
    assert np.array_equal(outside.train, inside[0].train) and len(corpora.entries(place)) == 1


def test_too_short_corpus_is_not_stored(place: Path) -> None:
    with pytest.raises(ValueError, match="too short"):
        corpora.load(place, seq_len=10**6)
    assert not (place / "corpus").exists()
    corpora.load(place)
    with pytest.raises(ValueError, match="too short"):
        corpora.load(place, seq_len=10**6)
