"""The corpus: the same bytes every time, split by whole files, and batches that depend on seed and step alone."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmini.config import DataConfig
from dsmini.data import Corpus, load_corpus


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def corpus_of(val: bytes, train: bytes = b"a" * 100) -> Corpus:
    parts = {"train": np.frombuffer(train, np.uint8), "val": np.frombuffer(val, np.uint8)}
    return Corpus(**parts, source="test", files=1, skipped=0, split="test", sha256="")


def test_the_standard_library_is_the_same_twice_and_a_tenth_is_held_out() -> None:
    first, second = (load_corpus(DataConfig(), 256, 256) for _ in range(2))
    assert first.sha256 == second.sha256
    assert np.array_equal(first.train, second.train)
    assert 0.09 < len(first.val) / (len(first.val) + len(first.train)) <= 0.1
    assert "whole files" in first.split and first.files > 100
    assert b"def " in first.train.tobytes() and b"def " in first.val.tobytes()


def test_a_folder_is_read_in_order_and_split_by_whole_files(tmp_path: Path) -> None:
    files = {f"{i % 3}/{i:02d}.txt": bytes([65 + i % 26]) * (90 + i) for i in range(40)}
    corpus = load_corpus(DataConfig(path=folder_of(tmp_path, files)), 16, 256)
    train, val = (part.tobytes().split(b"\0")[:-1] for part in (corpus.train, corpus.val))
    order = [content for _, content in sorted(files.items())]
    assert sorted(train + val) == sorted(order)
    assert train == [text for text in order if text in train]
    assert val == [text for text in order if text in val]
    assert 0.08 <= len(corpus.val) / (len(corpus.val) + len(corpus.train)) <= 0.1


def test_binary_empty_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    files = {"a.txt": b"text " * 50, "b.bin": b"\0\1\2" * 50, "c.txt": b"", ".git/d.txt": b"hidden " * 50}
    corpus = load_corpus(DataConfig(path=folder_of(tmp_path, files)), 8, 256)
    assert (corpus.files, corpus.skipped) == (1, 2)
    assert set(corpus.train.tobytes() + corpus.val.tobytes()) == set(b"text ")


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    text = bytes(range(1, 201))
    corpus = load_corpus(DataConfig(path=folder_of(tmp_path, {"t": text}) / "t"), 8, 256)
    assert corpus.train.tobytes() == text[:180]
    assert corpus.val.tobytes() == text[180:]


def test_few_large_files_are_split_at_their_end(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(path=folder_of(tmp_path, {"a": b"a" * 500, "b": b"b" * 500})), 8, 256)
    assert corpus.split == "the last 10% of the text"
    assert corpus.val.tobytes() == b"b" * 100


def test_the_hash_is_of_all_tokens(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(path=folder_of(tmp_path, {"t": b"text " * 50}) / "t"), 8, 256)
    assert corpus.sha256 == hashlib.sha256(b"text " * 50).hexdigest()


@pytest.mark.parametrize(
    ("path", "message"), [("/dev/null", "neither a file nor a folder"), ("x" * 5000, "cannot be a path")]
)
def test_what_is_no_file_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(path=Path(path)), 8, 256)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    corpus = corpus_of(b"", train=bytes(range(256)) * 20)
    tokens, targets = corpus.batch(7, 5, 32, seed=3)
    again, _ = corpus.batch(7, 5, 32, seed=3)
    assert torch.equal(tokens, again)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal((tokens[:, -1] + 1) % 256, targets[:, -1])
    for step, seed in ((8, 3), (7, 4)):
        assert not torch.equal(tokens, corpus.batch(step, 5, 32, seed=seed)[0])


def test_batches_reach_both_ends_of_the_text() -> None:
    corpus = corpus_of(b"", train=bytes(range(12)))
    starts = {int(corpus.batch(step, 1, 8, seed=0)[0][0, 0]) for step in range(200)}
    assert starts == {0, 1, 2, 3}


@given(st.integers(2, 400), st.integers(1, 40))
def test_every_held_out_token_is_scored_once(size: int, seq_len: int) -> None:
    if size <= seq_len:
        return
    val = bytes(i % 251 for i in range(size))
    x, y = corpus_of(val).windows(seq_len)
    n = (size - 1) // seq_len * seq_len
    assert bytes(x.flatten().tolist()) == val[:n]
    assert bytes(y.flatten().tolist()) == val[1 : n + 1]
    part, _ = corpus_of(val).windows(seq_len, at_most=3 * seq_len)
    assert len(part) == min(3, len(x)) and part[0].equal(x[0]) and part[-1].equal(x[-1] if len(part) > 1 else x[0])


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nothing", "does not exist; name a text file or a folder"),
        ({"a": b""}, "a", "is empty"),
        ({"a": b"short"}, "a", "too short for one sequence of 16 and its targets; want at least 17"),
        ({"a": b"x" * 40}, "a", "the held-out part of .* has 4 tokens"),
        ({"a": b"bin\0ary" * 50}, "a", "holds NUL bytes, so it is not text"),
        ({"d/a": b"", "d/b": b"\0"}, "d", "has no text: 2 files"),
    ],
)
def test_bad_corpora_are_refused_with_the_reason(
    tmp_path: Path, files: dict[str, bytes], name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(path=folder_of(tmp_path, files) / name), 16, 256)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = folder_of(tmp_path, {"a": b"text"}) / "a"
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=f"cannot read {path}: Permission denied"):
        load_corpus(DataConfig(path=path), 16, 256)


@pytest.mark.parametrize("vocab_size", [100, 400])
def test_a_vocabulary_that_is_not_of_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} is not that of bytes; use 256"):
        load_corpus(DataConfig(), 16, vocab_size)
