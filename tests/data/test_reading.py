"""Files as they are read for a corpus: packed, damaged, changing, large."""

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmini.config import DataConfig
from dsmini.data import cache as corpus_cache
from dsmini.data.corpus import load_corpus
from dsmini.data.documents import CHUNK
from tests.helpers import corpora


def test_gz_is_read_as_the_text_in_it(place: Path) -> None:
    plain = corpora.load(place)
    for name in list(corpora.TEXTS)[::2]:
        path = place / "texts" / name
        path.with_name(name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = corpora.load(place)
    assert "tokenised once" in packed.cache and packed.sha256 == plain.sha256 and packed.split == plain.split
    alone = {name: corpora.load(place, path=place / "texts" / name).sha256 for name in ("01.txt", "00.txt.gz")}
    (place / "00.txt").write_bytes(corpora.TEXTS["00.txt"])
    assert alone["00.txt.gz"] == corpora.load(place, path=place / "00.txt").sha256 != alone["01.txt"]


@pytest.mark.parametrize("harm", ["truncated", "garbled"])
def test_damaged_gz_is_named(place: Path, harm: str) -> None:
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(5000)))
    packed = packed[:2000] if harm == "truncated" else packed[:-8] + b"12345678"
    (place / "texts/x.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"x\.gz is a damaged \.gz file: .*; fetch it again, or remove it"):
        corpora.load(place)


def test_file_that_changes_while_read_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = corpus_cache.measure

    def then_grow(*args: Any) -> Any:
        measured = real(*args)
        for name in corpora.TEXTS:
            (place / "texts" / name).write_bytes(b"longer " * 100)
        return measured

    monkeypatch.setattr(corpus_cache, "measure", then_grow)
    with pytest.raises(ValueError, match=r"\.txt changed while it was read; run the command again"):
        corpora.load(place)
    assert corpora.entries(place) == []


def test_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(b"some text to read, line after line\n" * (64 * CHUNK // 35))
    tracemalloc.start()
    corpus = corpora.load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.train) > 57 * CHUNK
    # up to 6 MiB of text are tokenised at once: they, their tokens, those before them, and what is being read
    assert peak < 24 * CHUNK


def test_progress_ends_at_the_total(place: Path) -> None:
    told: list[tuple[str, int, int]] = []
    config = DataConfig(path=place / "texts")
    load_corpus(config, 8, 256, place / "corpus", progress=lambda *args: told.append(args))
    size = sum(map(len, corpora.TEXTS.values()))
    for what in ("reading", "tokenising"):
        steps = [(done, total) for name, done, total in told if name == what]
        assert steps == sorted(steps) and steps[-1] == (size, size)
    told.clear()
    load_corpus(config, 8, 256, place / "corpus", progress=lambda *args: told.append(args))
    assert told == []
