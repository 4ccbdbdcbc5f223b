"""The cache of tokenised corpora: read when nothing changed, built when something did, whole or not there."""

import gzip
import json
import multiprocessing
import os
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.config import DataConfig
from dsmini.data import cache as corpus_cache
from dsmini.data import documents, tokenising
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.data.documents import CHUNK
from dsmini.data.fim import arrange
from dsmini.data.tokenising import lines
from dsmini.text.tokenizer import ByteTokenizer

BEGIN, HOLE, END = ByteTokenizer.fim
Files = dict[str, bytes]
TEXTS: Files = {f"{i:02d}.txt": f"document {i}, héllo ".encode() * (10 + i) for i in range(40)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a folder of texts in it."""
    (tmp_path / "texts").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).write_bytes(text)
    return tmp_path


def load(place: Path, seed: int = 0, **config: Any) -> Corpus:
    return load_corpus(DataConfig(**{"path": place / "texts"} | config), 8, 256, place / "corpus", seed)


def entries(place: Path) -> list[Path]:
    return sorted(path for path in (place / "corpus").iterdir() if path.name != ".lock")


def test_a_corpus_is_tokenised_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(place)
    assert "tokenised once into" in first.cache
    monkeypatch.setattr(ByteTokenizer, "encode_all", None)
    second = load(place, seed=1)
    assert "read from" in second.cache and len(entries(place)) == 1
    assert second.describe() == first.describe()
    assert np.array_equal(second.train, first.train) and np.array_equal(second.val, first.val)
    assert isinstance(second.train, np.memmap) and not second.train.flags.writeable


def change_a_file(place: Path) -> None:
    (place / "texts/00.txt").write_bytes(b"other " * 40)


def touch_a_file(place: Path) -> None:
    os.utime(place / "texts/00.txt", ns=(1, 1))


def add_a_file(place: Path) -> None:
    (place / "texts/new.txt").write_bytes(b"new " * 40)


def rename_a_file(place: Path) -> None:
    (place / "texts/00.txt").rename(place / "texts/000.txt")


@pytest.mark.parametrize("change", [change_a_file, touch_a_file, add_a_file, rename_a_file])
def test_a_corpus_that_changed_is_tokenised_anew(place: Path, change: Any) -> None:
    load(place)
    change(place)
    assert "tokenised once" in load(place).cache and len(entries(place)) == 2


def test_each_config_has_its_entry(place: Path) -> None:
    for config in ({}, {"val_fraction": 0.2}, {"fim_rate": 0.5}, {"fim_rate": 0.5, "seed": 1}):
        assert "tokenised once" in load(place, **config).cache, config
    assert len(entries(place)) == 4


def shorten(entry: Path) -> None:
    os.truncate(entry / "train.bin", 100)


def flip(entry: Path) -> None:
    data = bytearray((entry / "val.bin").read_bytes())
    data[3] ^= 1
    (entry / "val.bin").write_bytes(data)


def lose(entry: Path) -> None:
    (entry / "val.bin").unlink()


def garble(entry: Path) -> None:
    (entry / "meta.json").write_text("{")


@pytest.mark.parametrize("harm", [shorten, flip, lose, garble])
def test_a_damaged_entry_is_built_again_and_said(place: Path, harm: Any) -> None:
    first = load(place)
    train, val = first.train.tobytes(), first.val.tobytes()
    (entry,) = entries(place)
    harm(entry)
    again = load(place)
    assert "tokenised again into" in again.cache and str(entry) in again.cache
    assert again.train.tobytes() == train and again.val.tobytes() == val and again.sha256 == first.sha256
    assert "read from" in load(place).cache and entries(place) == [entry]


def test_the_size_of_a_large_entry_is_checked_without_reading_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_cache, "_HASHED_ON_LOAD", 0)
    load(place)
    shorten(entries(place)[0])
    assert "train.bin had 100 bytes, want" in load(place).cache


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error) if isinstance(error, OSError) else error) as caught:
            load(place)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot tokenise the corpus into {place / 'corpus'}: No space left on device"
    assert entries(place) == []
    assert "tokenised once" in load(place).cache


def test_what_a_killed_build_left_is_ignored_and_removed_later(place: Path) -> None:
    load(place)
    (entry,) = entries(place)
    partial = entry.rename(entry.with_name(entry.name + ".partial-x"))
    (partial / "meta.json").unlink()
    assert "tokenised once" in load(place).cache
    assert partial.exists(), "another process may be at it"
    for path in (*partial.iterdir(), partial):
        os.utime(path, (time.time() - 4000,) * 2)
    load(place, val_fraction=0.2)
    assert not partial.exists()


def build(place: Path, barrier: Any, answers: Any) -> None:
    barrier.wait()
    corpus = load(place)
    answers.put((corpus.sha256, int(corpus.train.sum()), int(corpus.val.sum())))


def test_two_processes_that_build_at_once_both_end_well(place: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    for _ in range(3):
        processes = [context.Process(target=build, args=(place, barrier, answers)) for _ in range(2)]
        for process in processes:
            process.start()
        said = {answers.get(timeout=60) for _ in processes}
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert len(said) == 1
        (entry,) = entries(place)
        shorten(entry)  # in the next round both find it damaged


def test_the_slower_of_two_builders_takes_the_entry_that_is_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = corpus_cache.Cache._keep
    inside: list[Corpus] = []

    def meanwhile(cache: corpus_cache.Cache, partial: Path) -> None:
        monkeypatch.setattr(corpus_cache.Cache, "_keep", real)
        inside.append(load(place))
        real(cache, partial)

    monkeypatch.setattr(corpus_cache.Cache, "_keep", meanwhile)
    outside = load(place)
    assert np.array_equal(outside.train, inside[0].train) and len(entries(place)) == 1


def test_a_corpus_that_is_too_short_is_not_kept(place: Path) -> None:
    with pytest.raises(ValueError, match="too short"):
        load_corpus(DataConfig(path=place / "texts"), 10**6, 256, place / "corpus")
    assert not (place / "corpus").exists()
    load(place)
    with pytest.raises(ValueError, match="too short"):
        load_corpus(DataConfig(path=place / "texts"), 10**6, 256, place / "corpus")


def test_a_folder_that_cannot_be_made_is_named(place: Path) -> None:
    (place / "corpus").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot keep the tokenised corpus in .*corpus: .*; choose another"):
        load(place)


def test_gz_is_read_as_the_text_in_it(place: Path) -> None:
    plain = load(place)
    for name in list(TEXTS)[::2]:
        path = place / "texts" / name
        path.with_name(name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load(place)
    assert "tokenised once" in packed.cache and packed.sha256 == plain.sha256 and packed.split == plain.split
    alone = {name: load(place, path=place / "texts" / name).sha256 for name in ("01.txt", "00.txt.gz")}
    (place / "00.txt").write_bytes(TEXTS["00.txt"])
    assert alone["00.txt.gz"] == load(place, path=place / "00.txt").sha256 != alone["01.txt"]


@pytest.mark.parametrize("harm", ["truncated", "garbled"])
def test_a_damaged_gz_is_named(place: Path, harm: str) -> None:
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(5000)))
    packed = packed[:2000] if harm == "truncated" else packed[:-8] + b"12345678"
    (place / "texts/x.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"x\.gz is a damaged \.gz file: .*; fetch it again, or remove it"):
        load(place)


def test_a_file_that_changes_while_it_is_read_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = corpus_cache.measure

    def then_grow(*args: Any) -> Any:
        measured = real(*args)
        for name in TEXTS:
            (place / "texts" / name).write_bytes(b"longer " * 100)
        return measured

    monkeypatch.setattr(corpus_cache, "measure", then_grow)
    with pytest.raises(ValueError, match=r"\.txt changed while it was read; run the command again"):
        load(place)
    assert entries(place) == []


def test_a_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(b"some text to read, line after line\n" * (64 * CHUNK // 35))
    tracemalloc.start()
    corpus = load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.train) > 57 * CHUNK
    # up to 6 MiB of text are tokenised at once: they, their tokens, those before them, and what is being read
    assert peak < 24 * CHUNK


def test_progress_ends_where_it_should(place: Path) -> None:
    told: list[tuple[str, int, int]] = []
    config = DataConfig(path=place / "texts")
    load_corpus(config, 8, 256, place / "corpus", progress=lambda *args: told.append(args))
    size = sum(map(len, TEXTS.values()))
    for what in ("reading", "tokenising"):
        steps = [(done, total) for name, done, total in told if name == what]
        assert steps == sorted(steps) and steps[-1] == (size, size)
    told.clear()
    load_corpus(config, 8, 256, place / "corpus", progress=lambda *args: told.append(args))
    assert told == []


WORDS = [b"word ", b"line\n", b"\n", b" ", "é".encode(), "日".encode(), b"x" * 50]


@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_pieces_are_the_text_cut_between_words_or_characters(parts: list[bytes]) -> None:
    text = b"".join(parts)
    pieces = list(lines((text[i : i + 16] for i in range(0, len(text), 16)), 16))
    assert b"".join(pieces) == text and all(0 < len(piece) < 32 for piece in pieces)
    for piece in pieces:
        piece.decode()
    for before, after in pairwise(pieces):
        if b"\n" in before.strip() and b"\n" in after.strip():
            assert before.endswith(b"\n") or after.startswith(b" ") or b" " not in before


def documents_of(tokens: np.ndarray) -> list[bytes]:
    return tokens.tobytes().split(b"\0")[:-1]


def parse(text: bytes) -> bytes | None:
    """The document that was rearranged; None if none was."""
    if BEGIN not in text:
        return None
    assert text[0] == BEGIN and text.count(HOLE) == text.count(END) == text.count(BEGIN) == 1
    prefix, rest = text[1:].split(bytes([HOLE]))
    suffix, middle = rest.split(bytes([END]))
    for part in (prefix, middle, suffix):
        part.decode()  # no character is cut
    return prefix + middle + suffix


def test_a_share_of_the_training_documents_is_rearranged(place: Path) -> None:
    for i in range(600):
        (place / f"texts/more-{i}.txt").write_bytes(f"número {i} und ähnlich".encode() * 5)
    plain, corpus = load(place), load(place, fim_rate=0.3)
    originals, texts = documents_of(plain.train), documents_of(corpus.train)
    assert len(texts) == len(originals)
    back = [parse(text) for text in texts]
    changed = [text is not None for text in back]
    assert [text if b is None else b for text, b in zip(texts, back, strict=True)] == originals
    assert sum(changed) == corpus.rearranged == corpus.describe()["rearranged"]
    # binomial: five deviations
    assert abs(sum(changed) - 0.3 * len(texts)) < 5 * (0.21 * len(texts)) ** 0.5
    assert np.array_equal(corpus.val, plain.val)
    everything = load(place, fim_rate=1.0)
    assert everything.rearranged == len(texts)


def test_a_documents_fate_depends_on_seed_and_name_alone(place: Path) -> None:
    before = {parse(text): text for text in documents_of(load(place, fim_rate=1.0).train)}
    (place / "texts/a-new-one.txt").write_bytes(b"new " * 10)
    after = {parse(text): text for text in documents_of(load(place, fim_rate=1.0).train)}
    both = before.keys() & after.keys()
    assert len(both) > 30 and all(before[text] == after[text] for text in both)
    other = {parse(text): text for text in documents_of(load(place, fim_rate=1.0, seed=1).train)}
    assert sum(other[text] == before[text] for text in other.keys() & before.keys()) < 5


@given(st.text(max_size=12), st.integers(0, 999))
def test_every_border_between_characters_can_be_a_cut(text: str, seed: int) -> None:
    raw = text.replace("\0", "").encode()
    arranged = arrange(raw, "name", 1.0, seed, ByteTokenizer())
    if not raw:
        assert arranged is None
        return
    assert arranged is not None
    begin, prefix, hole, suffix, end, middle = arranged
    assert (begin, hole, end) == (BEGIN, HOLE, END)
    assert isinstance(prefix, bytes) and isinstance(middle, bytes) and isinstance(suffix, bytes)
    assert prefix + middle + suffix == raw
    prefix.decode(), middle.decode(), suffix.decode()


def test_cuts_are_uniform() -> None:
    seen = np.zeros(5)
    for seed in range(5000):
        arranged = arrange("äöüß".encode(), "name", 1.0, seed, ByteTokenizer())
        assert arranged is not None
        prefix, middle = arranged[1], arranged[5]
        assert isinstance(prefix, bytes) and isinstance(middle, bytes)
        for at in (len(prefix), len(prefix) + len(middle)):
            seen[at // 2] += 1
    assert np.abs(seen - 2000).max() < 5 * 40  # binomial of 10000 at a fifth


def test_documents_that_hold_a_mark_or_are_large_stay_as_they_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (place / "texts").iterdir():
        path.write_bytes(b"latin \xfe one " * 5)
    (place / "texts/large.txt").write_bytes(b"large " * 200)
    monkeypatch.setattr("dsmini.data.fim.LARGEST", 1000)
    corpus = load(place, fim_rate=1.0)
    assert corpus.rearranged == 0 and corpus.sha256 == load(place).sha256


def test_documents_that_are_all_too_large_to_be_rearranged_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest = min(map(len, documents_of(load(place).train)))
    monkeypatch.setattr("dsmini.data.fim.LARGEST", smallest - 1)
    with pytest.raises(ValueError, match=r"data.fim_rate=0.5 would rearrange nothing: .* larger than \d+ bytes; cut"):
        load(place, fim_rate=0.5)
    monkeypatch.setattr("dsmini.data.fim.LARGEST", smallest)
    assert load(place, fim_rate=1.0).rearranged >= 1


def test_the_meta_file_is_small_and_says_what_it_is(place: Path) -> None:
    corpus = load(place)
    (entry,) = entries(place)
    meta = json.loads((entry / "meta.json").read_text())
    assert meta["sha256"] == corpus.sha256 and meta["train_tokens"] == len(corpus.train)
    assert (entry / "meta.json").stat().st_size < 1000


@pytest.fixture
def _few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK", 100)
    monkeypatch.setattr(tokenising, "_AT_ONCE", 300)


@pytest.mark.usefixtures("_few_at_a_time")
def test_the_tokens_do_not_depend_on_how_much_is_read_at_once(place: Path) -> None:
    train, val = (part.tobytes() for part in (load(place).train, load(place).val))
    assert sorted(documents_of(np.frombuffer(train + val, np.uint8))) == sorted(TEXTS.values())
