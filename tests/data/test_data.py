"""The corpus: the same tokens every time, each trained on once an epoch, in an order that workers do not change."""

import hashlib
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, Loader, load_corpus
from dsmini.data.documents import CHUNK, Document, left_out_in_words, not_utf8_in_words
from dsmini.data.order import permute
from dsmini.data.split import cut_once


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def corpus_of(val: bytes = b"", train: bytes = b"a" * 100) -> Corpus:
    parts = {"train": np.frombuffer(train, np.uint8), "val": np.frombuffer(val, np.uint8)}
    return Corpus(**parts, source="test", files=1, skipped=0, split="test", sha256="")


def load(path: Path | None, cache: Path, seq_len: int = 8) -> Corpus:
    return load_corpus(DataConfig(path=path), seq_len, 256, cache)


def test_standard_library_is_stable_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    first, second = (load(None, tmp_path / name) for name in "ab")
    assert first.sha256 == second.sha256
    assert np.array_equal(first.train, second.train)
    assert 0.09 < len(first.val) / (len(first.val) + len(first.train)) <= 0.1
    assert "whole files" in first.split and first.files > 100
    assert b"def " in first.train.tobytes() and b"def " in first.val.tobytes()


def test_folder_is_read_in_order_and_split_by_files(tmp_path: Path) -> None:
    files = {f"{i % 3}/{i:02d}.txt": bytes([65 + i % 26]) * (90 + i) for i in range(40)}
    corpus = load(folder_of(tmp_path / "text", files), tmp_path, 16)
    train, val = (part.tobytes().split(b"\0")[:-1] for part in (corpus.train, corpus.val))
    order = [content for _, content in sorted(files.items())]
    assert sorted(train + val) == sorted(order)
    assert train == [text for text in order if text in train]
    assert val == [text for text in order if text in val]
    assert 0.08 <= len(corpus.val) / (len(corpus.val) + len(corpus.train)) <= 0.1


def test_binary_empty_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    files = {"a.txt": b"text " * 50, "b.bin": b"\0\1\2" * 50, "c.txt": b"", ".git/d.txt": b"hidden " * 50, ".e": b"e"}
    corpus = load(folder_of(tmp_path / "text", files), tmp_path)
    assert (corpus.files, corpus.skipped, corpus.left_out) == (1, 2, ("b.bin (binary)", "c.txt (empty)"))
    assert set(corpus.train.tobytes() + corpus.val.tobytes()) == set(b"text ")
    again = load(tmp_path / "text", tmp_path)
    assert "read from" in again.cache and again.left_out == corpus.left_out


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_named_with_the_command(tmp_path: Path, encoding: str) -> None:
    text = "Ein \u00fcbler Text. " * 50
    name = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding.upper())
    files = {f"{i}.txt": text.encode(encoding) for i in range(5)} | {"good.txt": b"text " * 50}
    corpus = load(folder_of(tmp_path / "d", files), tmp_path)
    assert (corpus.skipped, corpus.left_out) == (5, tuple(f"{i}.txt ({name})" for i in range(5)))
    assert corpus.describe()["left_out"] == list(corpus.left_out)
    words = left_out_in_words(corpus.left_out, "runs/x/corpus.json")
    named = f"0.txt ({name}), 1.txt ({name}), 2.txt ({name}), and 2 more (all are in runs/x/corpus.json)"
    assert words.startswith(f"5 left out: {named}; to include ")
    assert words.endswith(f"; to include {name} text: iconv -f {name} -t UTF-8 FILE > NEW_FILE")
    path = tmp_path / "d/0.txt"
    with pytest.raises(ValueError, match=f"is {name}, want UTF-8; convert it: iconv -f ") as refused:
        load(path, tmp_path)
    if shutil.which("iconv"):
        subprocess.run(str(refused.value).rpartition("convert it: ")[2], shell=True, check=True)
        assert (tmp_path / "d/0.txt.utf8").read_text() == text


def test_encodings_beyond_the_names_that_are_shown_have_advice_too() -> None:
    words = left_out_in_words([*(f"{i}.bin (binary)" for i in range(3)), "x (UTF-16)", "y (UTF-32)"], "corpus.json")
    assert "UTF-16)" not in words and words.count("iconv") == 2


def test_text_of_single_bytes_is_read_and_named(tmp_path: Path) -> None:
    """A multi-byte character may lie across two chunks, and the last one of a file may be cut."""
    long = ("a" * (CHUNK - 1) + "\u00fc").encode()
    files = {"a.txt": "Gr\u00f6\u00dfe ".encode("latin-1") * 50, "b.txt": long, "c.txt": long[:-1], "d.txt": b"text"}
    corpus = load(folder_of(tmp_path / "d", files), tmp_path)
    assert (corpus.files, corpus.skipped, corpus.not_utf8) == (4, 0, ("a.txt", "c.txt"))
    assert corpus.describe()["not_utf8"] == ["a.txt", "c.txt"]
    assert 0xF6 in corpus.train.tobytes() + corpus.val.tobytes(), "a token is a byte, whatever it means"
    words = not_utf8_in_words(corpus.not_utf8, "corpus.json", as_bytes=True)
    assert words.startswith("2 not UTF-8, read byte by byte as they are: a.txt, c.txt; to convert Latin-1: iconv -f ")
    assert "U+FFFD for each other byte: a.txt" in not_utf8_in_words(corpus.not_utf8, "corpus.json", as_bytes=False)


def test_cache_inside_the_corpus_is_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.txt": b"text " * 50})
    first, second = (load(tmp_path, tmp_path / "corpus") for _ in range(2))
    assert second.files == 1 and second.sha256 == first.sha256 and "read from" in second.cache


def test_runs_and_caches_inside_the_corpus_are_left_out(tmp_path: Path) -> None:
    """Otherwise the corpus of a run in the current folder would change during training, and be refused later."""
    kept = dict.fromkeys(("a.txt", "b/config.toml", "c/meta.json", "d/metrics.jsonl"), b"text " * 50)
    before = load(folder_of(tmp_path, kept), tmp_path / "corpus")
    assert before.files == 4
    made = ("x/config.toml", "x/metrics.jsonl", "x/deep/er.txt", "y/config.toml", "y/checkpoints/step/x.json")
    made += ("z/config.toml", "z/corpus.json", "corpus/0123/meta.json", "corpus/0123/train.bin", "corpus/0123/val.bin")
    folder_of(tmp_path / "runs", dict.fromkeys(made, b"made " * 50))
    assert load(tmp_path, tmp_path / "corpus").sha256 == before.sha256
    assert load(tmp_path / "runs/x", tmp_path / "corpus").files == 3  # it is asked for by name


def test_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    text = bytes(range(1, 201))
    corpus = load(folder_of(tmp_path, {"t": text}) / "t", tmp_path)
    assert corpus.train.tobytes() == text[:180]
    assert corpus.val.tobytes() == text[180:]


def test_few_large_files_are_split_at_their_end(tmp_path: Path) -> None:
    corpus = load(folder_of(tmp_path / "text", {"a": b"a" * 500, "b": b"b" * 500}), tmp_path)
    assert corpus.split == "the last 10% of the text"
    assert corpus.train.tobytes() == b"a" * 500 + b"\0" + b"b" * 399
    assert corpus.val.tobytes() == b"b" * 101


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 99))
def test_cut_parts_are_the_whole_text(sizes: list[int], percent: int) -> None:
    documents = [
        Document(name=str(i), path=Path(str(i)), stored=size, modified=0, size=size) for i, size in enumerate(sizes)
    ]
    text = "|".join(chr(97 + i) * size for i, size in enumerate(sizes))
    parts = cut_once(documents, percent / 100, whole_characters=False)
    train, val = (
        "".join(chr(97 + int(p.document.name)) * (p.stop - p.start) + "|" * p.ends for p in part)
        for part in (parts.train, parts.val)
    )
    cut = int((1 - percent / 100) * len(text))
    assert (train, val) == (text[:cut], text[cut:])


def test_hash_covers_all_tokens(tmp_path: Path) -> None:
    corpus = load(folder_of(tmp_path, {"t": b"text " * 50}) / "t", tmp_path)
    assert corpus.sha256 == hashlib.sha256(b"text " * 50).hexdigest()


@pytest.mark.parametrize(
    ("path", "message"), [("/dev/null", "neither a file nor a folder"), ("x" * 5000, "is too long for a path")]
)
def test_missing_or_special_file_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Path(path), tmp_path)


@given(st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_permutation_is_one_to_one(n: int, seed: int) -> None:
    keys = np.random.SeedSequence(seed).generate_state(6, np.uint64).astype(np.uint64)
    assert sorted(permute(np.arange(n), n, keys).tolist()) == list(range(n))


def test_every_order_of_four_is_equally_likely() -> None:
    states = (np.random.SeedSequence(seed).generate_state(6, np.uint64).astype(np.uint64) for seed in range(2400))
    seen = Counter(tuple(permute(np.arange(4), 4, keys).tolist()) for keys in states)
    assert len(seen) == 24
    # each is binomial with mean 100 and deviation below 10: five of them are passed once in a million tests
    assert all(abs(count - 100) < 50 for count in seen.values())


def inputs_of(corpus: Corpus, first: int, n: int, seq_len: int, seed: int) -> list[list[int]]:
    return corpus.batch(first, n, seq_len, seed)[0].tolist()


@given(st.data(), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_epoch_trains_on_every_token_once(data: st.DataObject, seq_len: int, seed: int, epoch: int) -> None:
    size = data.draw(st.integers(seq_len + 1, 250))
    corpus, per_epoch = corpus_of(train=bytes(range(size))), size // seq_len
    rows = inputs_of(corpus, epoch * per_epoch, per_epoch, seq_len, seed)
    seen = Counter(token for row in rows for token in row)
    assert set(seen.values()) == {1}
    assert size - len(seen) == size % seq_len


@given(st.integers(9, 250), st.integers(0, 100), st.integers(1, 60), st.integers(0, 9))
def test_targets_are_the_next_tokens_of_a_circle(size: int, first: int, n: int, seed: int) -> None:
    tokens, targets = corpus_of(train=bytes(range(size))).batch(first, n, 8, seed)
    assert tokens.shape == targets.shape == (n, 8) and tokens.dtype == targets.dtype == torch.int64
    assert torch.equal((tokens + 1) % size, targets)


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(0, 200), st.integers(0, 9))
def test_stream_can_start_at_any_position(steps: list[int], skipped: int, seed: int) -> None:
    corpus = corpus_of(train=bytes(range(200)))
    whole = inputs_of(corpus, 0, skipped + sum(steps) + 1, 7, seed)
    at = skipped
    for n in steps:
        assert inputs_of(corpus, at, n, 7, seed) == whole[at : at + n]
        at += n


def test_epochs_and_seeds_differ_in_order_and_offset() -> None:
    corpus = corpus_of(train=bytes(range(250)))
    epochs = [inputs_of(corpus, epoch * 31, 31, 8, seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(row[0] for row in rows) for rows in epochs}) == 3
    assert len({rows[0][0] % 8 for rows in epochs}) > 1
    assert sorted(row[0] for row in epochs[0]) != [row[0] for row in epochs[0]]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_do_not_depend_on_workers(workers: int) -> None:
    corpus = corpus_of(train=bytes(range(250)))
    loader = Loader(corpus, 8, seed=3, workers=workers)
    requests = [(sum(range(i)), i) for i in range(1, 30)]
    for i, (first, n) in enumerate(requests):
        got, want = loader.take(requests[i : i + 4]), corpus.batch(first, n, 8, 3)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    loader.close()


def test_workers_prepare_the_next_batches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = Corpus.batch
    monkeypatch.setattr(
        Corpus, "batch", lambda self, first, *rest: (asked.append(first), real(self, first, *rest))[1], raising=True
    )
    loader = Loader(corpus_of(), 8, seed=0, workers=1)
    loader.take([(0, 2), (2, 2), (4, 2)])
    loader.take([(2, 2), (4, 2)])
    loader.close()
    assert asked == [0, 2, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_reaches_the_training(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    def fail(self: Corpus, first: int, *rest: int) -> None:
        raise OSError(f"sequence {first}")

    monkeypatch.setattr(Corpus, "batch", fail)
    loader = Loader(corpus_of(), 8, seed=0, workers=workers)
    with pytest.raises(OSError, match="sequence 4"):
        loader.take([(4, 2), (6, 2)])
    loader.close()


def test_document_includes_its_end_token() -> None:
    tokens = torch.tensor([[5, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 0]])
    assert corpus_of().documents(tokens).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@given(st.integers(2, 400), st.integers(1, 40), st.integers(1, 9))
def test_every_held_out_token_is_scored_once(size: int, seq_len: int, rows: int) -> None:
    if size <= seq_len:
        return
    val = bytes(i % 251 for i in range(size))
    windows = corpus_of(val).windows(seq_len)
    blocks = list(windows.blocks(rows))
    n = (size - 1) // seq_len * seq_len
    assert b"".join(bytes(x.flatten().tolist()) for x, _ in blocks) == val[:n]
    assert b"".join(bytes(y.flatten().tolist()) for _, y in blocks) == val[1 : n + 1]
    assert windows.tokens == n == len(windows) * seq_len
    assert all(len(x) == rows for x, _ in blocks[:-1])
    few = corpus_of(val).windows(seq_len, at_most=3 * seq_len)
    ((part, _),), ((whole, _),) = few.blocks(99), windows.blocks(999)
    assert len(few) == len(part) == min(3, len(windows)) and part[0].equal(whole[0])
    assert part[-1].equal(whole[-1] if len(part) > 1 else whole[0])


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nothing", "does not exist; name a text file or a folder"),
        ({"a": b""}, "a", "is empty"),
        ({"a": b"short"}, "a", "too short for one sequence of 16 and its targets; want at least 17"),
        ({"a": b"x" * 40}, "a", "the held-out part of .* has 4 tokens"),
        ({"a": b"bin\0ary" * 50}, "a", "holds NUL bytes, so it is not text"),
        ({"a": b"x" * (3 << 20) + b"\0"}, "a", "holds NUL bytes, so it is not text"),
        (
            {"d/a": b"", "d/b": b"\0"},
            "d",
            r"2 files, all empty or not text: a \(empty\), b \(binary\);",
        ),
        ({"a.gz": b"no gzip"}, "a.gz", "a.gz is a damaged .gz file"),
    ],
)
def test_bad_corpus_is_refused_with_the_reason(
    tmp_path: Path, files: dict[str, bytes], name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder_of(tmp_path, files) / name, tmp_path / "cache", 16)
    assert not (tmp_path / "cache").exists()


def refuse(path: object, *_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder_of(tmp_path, {"a": b"text"}) / "a"
    monkeypatch.setattr("dsmini.reading.os.open", refuse)
    with pytest.raises(ValueError, match=f"cannot read {path}: Permission denied"):
        load(path, tmp_path, 16)


@pytest.mark.parametrize("call", ["os.scandir", "Path.is_file"])
def test_folder_that_may_not_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Refuse, as root may look everywhere: scandir fails without the right to read, is_file without that to enter."""
    path = folder_of(tmp_path, {"a": b"text", "d/a": b"text"})
    real = getattr(*{"os.scandir": (os, "scandir"), "Path.is_file": (Path, "is_file")}[call])
    below = lambda at, *args: refuse(at) if "d" in Path(at).parts else real(at, *args)  # noqa: E731
    monkeypatch.setattr("dsmini.data.documents." + call, below)
    with pytest.raises(ValueError, match=rf"cannot look at {path}/d.*: Permission denied; check the permissions"):
        load(path, tmp_path, 16)


def test_document_that_became_special_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    document = Document(name="a", path=tmp_path / "a", stored=1, modified=0)
    with pytest.raises(ValueError, match="it is a FIFO, want a regular file"):
        list(document.chunks())


@pytest.mark.parametrize("vocab_size", [100, 400])
def test_vocabulary_that_is_not_of_bytes_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} is not that of bytes; use 256"):
        load_corpus(DataConfig(), 16, vocab_size, tmp_path)
