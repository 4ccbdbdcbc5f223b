"""Texts as they are read for a corpus: found, left out, split, packed, damaged, changing, large, and cached."""

import gzip
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.config import DataConfig, RunConfig
from dsmini.data import documents, tokenized
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.data.dialogue import PARTS, dialogues
from dsmini.data.documents import CHUNK, Document, cut_once, find, lines, notes
from dsmini.data.tokenized import arrange
from dsmini.text.tokenizer import ByteTokenizer
from dsmini.training.origin import absolute
from tests.helpers import corpora
from tests.helpers.configs import refusal

PACKED = gzip.compress(b"word " * 10 + bytes(np.random.default_rng(0).integers(1, 256, 5000, np.uint8)))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with a folder of texts in it."""
    corpora.lay_out(tmp_path / "texts", corpora.TEXTS)
    return tmp_path


def load(place: Path, files: dict[str, bytes], **more: Any) -> Corpus:
    """Lay out files below place/texts, and return the corpus of them."""
    corpora.lay_out(place / "texts", files)
    return corpora.load(place, **more)


def both(corpus: Corpus) -> bytes:
    return corpus.train.tobytes() + corpus.val.tobytes()


def test_standard_library_is_stable_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    first, second = (corpora.load(tmp_path / name, path=None) for name in "ab")
    assert first.sha256 == second.sha256
    assert np.array_equal(first.train, second.train)
    assert 0.09 < len(first.val) / (len(first.val) + len(first.train)) <= 0.1
    assert "whole files" in first.split and first.files > 100
    assert b"def " in first.train.tobytes() and b"def " in first.val.tobytes()


def test_folder_is_read_in_order_and_split_by_files(tmp_path: Path) -> None:
    files = {f"{i % 3}/{i:02d}.txt": bytes([65 + i % 26]) * (90 + i) for i in range(40)}
    corpus = load(tmp_path, files)
    train, val = (part.tobytes().split(b"\0")[:-1] for part in (corpus.train, corpus.val))
    order = [content for _, content in sorted(files.items())]
    assert sorted(train + val) == sorted(order)
    assert train == [text for text in order if text in train]
    assert val == [text for text in order if text in val]
    assert 0.08 <= len(corpus.val) / (len(corpus.val) + len(corpus.train)) <= 0.1
    uneven = load(tmp_path / "uneven", {"a.txt": b"a" * 50, "b.txt": b"b" * 1000})
    assert uneven.split == "the last 10% of the text", "a.txt alone is too little to hold out"


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 99))
def test_cut_parts_are_the_whole_text(sizes: list[int], percent: int) -> None:
    documents = [
        Document(name=str(i), path=Path(str(i)), stored=size, modified=(0, 0), size=size)
        for i, size in enumerate(sizes)
    ]
    text = "|".join(chr(97 + i) * size for i, size in enumerate(sizes))
    parts = cut_once(documents, percent / 100, whole_characters=False)
    train, val = (
        "".join(chr(97 + int(p.document.name)) * (p.stop - p.start) + "|" * p.ends for p in part)
        for part in (parts.train, parts.val)
    )
    cut = int((1 - percent / 100) * len(text))
    assert (train, val) == (text[:cut], text[cut:])


def test_binary_empty_hidden_and_damaged_files_are_left_out(tmp_path: Path) -> None:
    files = {"a.txt": b"text " * 50, "b.bin": b"\0\1\2" * 50, "c.txt": b"", ".git/d.txt": b"hidden " * 50, ".e": b"e"}
    corpus = load(tmp_path, files | {"cut.txt.gz": PACKED[:-9], "none.gz": b"no gzip"})
    assert corpus.files == 1 and set(both(corpus)) == set(b"text ")
    named = ("b.bin (not text)", "c.txt (empty)", "cut.txt (damaged .gz)", "none (damaged .gz)")
    assert corpus.left_out == named
    again = corpora.load(tmp_path)
    assert "read from" in again.cache and again.left_out == corpus.left_out


def test_runs_and_caches_inside_the_corpus_are_left_out(tmp_path: Path) -> None:
    """Otherwise the corpus of a run in the current folder would change during training, and be refused later."""
    kept = dict.fromkeys(("a.txt", "b/config.toml", "c/meta.json", "d/metrics.jsonl"), b"text " * 50)
    corpora.lay_out(tmp_path, kept)
    before = corpora.load(tmp_path, path=tmp_path)
    assert before.files == 4
    made = ("x/config.toml", "x/metrics.jsonl", "x/deep/er.txt", "y/config.toml", "y/checkpoints/step/x.json")
    made += ("z/config.toml", "z/corpus.json", "corpus/0123/meta.json", "corpus/0123/train.bin", "corpus/0123/val.bin")
    corpora.lay_out(tmp_path / "runs", dict.fromkeys(made, b"made " * 50))
    again = corpora.load(tmp_path, path=tmp_path)
    assert again.sha256 == before.sha256 and "read from" in again.cache  # the cache itself is below the corpus
    assert corpora.load(tmp_path, path=tmp_path / "runs/x").files == 3  # it is asked for by name


def test_linked_folders_are_read_once_and_a_packed_copy_is_left_out(tmp_path: Path) -> None:
    corpora.lay_out(tmp_path, {"elsewhere/deep/a.txt": b"linked " * 50})
    texts = corpora.lay_out(tmp_path / "texts", {"b.txt": b"text " * 50, "b.txt.gz": gzip.compress(b"text " * 50)})
    for link in (texts / "one", texts / "two", tmp_path / "elsewhere/deep/back"):
        link.symlink_to(tmp_path / "elsewhere")
    corpus = corpora.load(tmp_path)
    assert corpus.files == 2 and set(both(corpus)) == set(b"linked text \0")
    assert corpus.left_out == ("b.txt.gz (b.txt is there)",)


def test_links_to_a_file_are_read_once(tmp_path: Path) -> None:
    """As a file of its own a link may be held out while its target is trained on."""
    texts = corpora.lay_out(tmp_path / "texts", {f"b{i}.txt": bytes([65 + i]) * 50 for i in range(20)})
    (texts / "a.txt").symlink_to(texts / "b1.txt")
    (texts / "c.txt").hardlink_to(texts / "b2.txt")
    (texts / "blob").write_bytes(gzip.compress(b"#" * 50))
    (texts / "d.txt.gz").symlink_to(texts / "blob")
    corpus = corpora.load(tmp_path)
    assert corpus.files == 21 and corpus.left_out == ("blob (not text)",)
    assert not set(corpus.train.tolist()) & set(corpus.val.tolist()) - {0}


def test_linked_file_keeps_its_name_in_the_config_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name says that it is packed, and chooses it for fill-in-the-middle. A resumed run reads it again."""
    corpora.lay_out(tmp_path, {"blob": gzip.compress(b"text " * 50)})
    (tmp_path / "a.txt.gz").symlink_to("blob")
    monkeypatch.chdir(tmp_path)
    config = RunConfig(data=DataConfig(path=Path("a.txt.gz"), fim_rate=0.5))
    first, again = (corpora.load(tmp_path, path=c.data.path, fim_rate=0.5) for c in (config, absolute(config)))
    assert first.sha256 == again.sha256 and absolute(config).data.path == tmp_path / "a.txt.gz"


def test_the_tokenizer_is_no_text(tmp_path: Path) -> None:
    """python -m dsmini.tokenize writes it into the folder of the text, unless it is told otherwise."""
    corpora.lay_out(tmp_path, {"a.txt": b"text", "tokenizer.json": b"{}", "copy.json": b"{}", "other.json": b"[]"})
    found = find(tmp_path, tokenizer=tmp_path / "tokenizer.json")
    assert [document.name for document in found.documents] == ["a.txt", "other.json"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-16", "Ein \u00fcbler Text. "), ("utf-32", "Ein \u00fcbler Text. "), ("utf-16", "\u4eba\u5de5\u667a\u80fd")],
)
def test_text_in_another_encoding_is_left_out_and_named(tmp_path: Path, encoding: str, text: str) -> None:
    text *= 50
    name = encoding.upper()
    corpus = load(tmp_path, {f"{i}.txt": text.encode(encoding) for i in range(5)} | {"good.txt": b"text " * 50})
    assert corpus.left_out == tuple(f"{i}.txt ({name})" for i in range(5))
    assert corpus.describe()["left_out"] == list(corpus.left_out)
    (words,) = notes(corpus.left_out, (), "runs/x/corpus.json", as_bytes=True)
    named = ", ".join(f"{i}.txt ({name})" for i in range(3))
    assert words == f"5 left out: {named}, and 2 more (all are in runs/x/corpus.json)"
    said = refusal(corpora.load, tmp_path, path=tmp_path / "texts/0.txt")
    assert f"0.txt is {name}; name a text file in UTF-8, such as iconv -f {name} -t UTF-8 makes" in said


def test_text_of_single_bytes_is_read_and_named(tmp_path: Path) -> None:
    """A multi-byte character may lie across two chunks, and the last one of a file may be cut."""
    long = ("a" * (CHUNK - 1) + "\u00fc").encode()
    latin = "Gr\u00f6\u00dfe ".encode("latin-1") * 50
    corpus = load(tmp_path, {"a.txt": latin, "b.txt": long, "c.txt": long[:-1], "d.txt": b"text"})
    assert (corpus.files, corpus.left_out, corpus.not_utf8) == (4, (), ("a.txt", "c.txt"))
    assert corpus.describe()["not_utf8"] == ["a.txt", "c.txt"]
    assert 0xF6 in both(corpus), "a token is a byte, whatever it means"
    (words,) = notes((), corpus.not_utf8, "corpus.json", as_bytes=True)
    assert words.startswith("2 not UTF-8, read byte by byte as they are: a.txt, c.txt; to convert Latin-1: iconv -f ")
    (words,) = notes((), corpus.not_utf8, "corpus.json", as_bytes=False)
    assert "U+FFFD for each other byte: a.txt" in words


def test_gz_is_read_as_the_text_in_it(place: Path) -> None:
    plain = corpora.load(place)
    one = corpora.load(place, path=place / "texts/00.txt").sha256
    for name in list(corpora.TEXTS)[::2]:
        path = place / "texts" / name
        path.with_name(name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = corpora.load(place)
    assert "tokenized once" in packed.cache and packed.sha256 == plain.sha256 and packed.split == plain.split
    assert corpora.load(place, path=place / "texts/00.txt.gz").sha256 == one


def test_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(b"some text to read, line after line\n" * (64 * CHUNK // 35))
    tracemalloc.start()
    corpus = corpora.load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.train) > 57 * CHUNK
    # up to 6 MiB of text are tokenized at once: they, their tokens, those before them, and what is being read
    assert peak < 24 * CHUNK


def test_progress_ends_at_the_total(place: Path) -> None:
    told: list[tuple[str, int, int]] = []
    config = DataConfig(path=place / "texts")
    load_corpus(config, 8, 256, place / "corpus", progress=lambda *args: told.append(args))
    size = sum(map(len, corpora.TEXTS.values()))
    for what in ("reading", "tokenizing"):
        steps = [(done, total) for name, done, total in told if name == what]
        assert steps == sorted(steps) and steps[-1] == (size, size)


REFUSALS: list[tuple[dict[str, bytes], str, str]] = [  # the files, the path of the corpus, the sentence
    ({}, "nothing", "does not exist; name a text file or a folder"),
    ({}, "/dev/null", "neither a file nor a folder"),
    ({}, "x" * 5000, "is too long for a path"),
    ({"a": b""}, "a", "is empty"),
    ({"a": b"short"}, "a", "too short for one sequence of 16 and its targets; want at least 17"),
    ({"a": b"x" * 40}, "a", "the held-out part of {path} has 4 tokens"),
    ({"a": b"bin\0ary" * 50}, "a", "/a is not text; name a text file in UTF-8"),
    ({"a": b"x" * (3 << 20) + b"\0"}, "a", "is not text; name a text file in UTF-8"),
    ({"d/a": b"", "d/b": b"\0"}, "d", "2 files, all empty or not text: a (empty), b (not text);"),
    ({"a.gz": b"no gzip"}, "a.gz", "a.gz is a damaged .gz file"),
    ({"a.gz": PACKED[:2000]}, "a.gz", "a.gz is a damaged .gz file"),
    ({"a.gz": PACKED[:-8] + b"12345678"}, "a.gz", "; fetch it again, or remove it"),
]


@pytest.mark.parametrize(("files", "name", "sentence"), REFUSALS, ids=[sentence for *_, sentence in REFUSALS])
def test_bad_corpus_is_refused(tmp_path: Path, files: dict[str, bytes], name: str, sentence: str) -> None:
    path = corpora.lay_out(tmp_path / "texts", files) / name
    said = refusal(corpora.load, tmp_path, seq_len=16, path=path)
    assert sentence.format(path=path) in said and "iconv" not in said
    assert not (tmp_path / "corpus").exists()


def test_file_that_changes_while_read_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tokenized.measure

    def then_grow(*args: Any) -> Any:
        measured = real(*args)
        corpora.lay_out(place / "texts", dict.fromkeys(corpora.TEXTS, b"longer " * 100))
        return measured

    monkeypatch.setattr(tokenized, "measure", then_grow)
    assert ".txt changed while it was read; run the command again" in refusal(corpora.load, place)
    assert corpora.entries(place) == []


@pytest.mark.parametrize(
    ("owner", "name", "sentence"),
    [
        (os, "open", "cannot read {path}/d/a: Permission denied"),
        (os, "scandir", "cannot look at {path}/d: Permission denied; check the permissions"),
        (Path, "is_file", "cannot look at {path}/d/a: Permission denied; check the permissions"),
    ],
)
def test_what_may_not_be_seen_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, sentence: str
) -> None:
    """Refuse, as root may look everywhere: scandir fails without the right to read, is_file without that to enter."""
    real = getattr(owner, name)

    def below(at: Any, *args: Any) -> Any:
        if "d" in Path(at).parts:
            raise PermissionError(13, "Permission denied", str(at))
        return real(at, *args)

    path = corpora.lay_out(tmp_path / "texts", {"a": b"text", "d/a": b"text"})
    monkeypatch.setattr(owner, name, below)
    assert sentence.format(path=path) in refusal(corpora.load, tmp_path)


def test_folder_of_the_cache_that_cannot_be_made_is_named(place: Path) -> None:
    (place / "corpus").write_text("a file")
    said = refusal(corpora.load, place)
    assert said.startswith(f"cannot store the tokenized corpus in {place / 'corpus'}: ") and "; choose another" in said


# text made into tokens: where it is cut, and what fill-in-the-middle rearranges

BEGIN, HOLE, END = ByteTokenizer.fim
WORDS = [b"word ", b"line\n", b"\n", b" ", "é".encode(), ("日é" * 7).encode(), b"x" * 50]


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


def test_cuts_are_uniform() -> None:
    seen = np.zeros(5)
    for seed in range(5000):
        parts = arrange("äöüß".encode(), "name", 1.0, seed, ByteTokenizer())
        assert parts is not None
        _, prefix, _, _, _, middle = parts
        assert isinstance(prefix, bytes) and isinstance(middle, bytes)
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
        names = {word for line in lines for word in re.findall(r"\w+", line) if word in PARTS["names"]}
        assert len(names) <= 1 and ("Your name is" not in conversation or names)


# --- the cache of tokenized corpora: read when nothing changed, built when something did, whole or not there


Change = Callable[[Path], object]


def test_corpus_is_tokenized_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpora.load(place)
    assert "tokenized once into" in first.cache
    assert "too short" in refusal(corpora.load, place, seq_len=10**6), "whatever is in the cache"
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
