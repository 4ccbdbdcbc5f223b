"""Rates of reading, tokenising and loading, next to those of steps: known rates, missing files, slow loaders."""

import gzip
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmini.config import DataConfig
from dsmini.data.documents import Document
from dsmini.diagnosis.diagnosis import LookPlan, diagnose
from dsmini.diagnosis.findings import reading
from dsmini.diagnosis.findings.batches import look_at
from dsmini.diagnosis.findings.reading import TextRates, reading_findings, text_rates
from dsmini.diagnosis.subject import Subject
from dsmini.text.tokenizer import ByteTokenizer
from dsmini.training.trainer import StepResult
from tests.helpers.token_texts import corpus, random_text

TEXT = TextRates(nbytes=2_000_000, read=800e6, tokenised=4e6, tokens=1e6)


def steps(seconds: float, wait: float, tokens: int = 1000) -> list[StepResult]:
    losses: dict[str, Any] = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
    return [StepResult(step=1, tokens=tokens, seconds=seconds, data_wait=wait, counts=None, skipped=False, **losses)]


def found_of(batches: Sequence[float], workers: int = 1, seconds: float = 0.1, wait: float = 0.0) -> Any:
    found = reading_findings(corpus(random_text(50_000), val_bytes=4_000), TEXT, batches, workers, steps(seconds, wait))
    assert [each.name for each in found] == ["reading", "tokenising", "loader_rate"]
    return found


def test_loader_over_steps() -> None:
    """Check 1,000 tokens in 2 ms against 1,000 in 100 ms, and twice that with two threads."""
    read, tokenise, loader = found_of([0.002, 0.001, 0.004])
    assert (loader.low, loader.value, loader.high) == pytest.approx((25, 50, 100))
    assert "can give 50 times as many tokens as steps take" in loader.sentence and not loader.is_fault
    assert "500,000 tokens/s" in loader.sentence and "10,000 tokens/s" in loader.sentence
    assert "800 MB/s" in read.sentence and "4.00 MB/s" in tokenise.sentence and "100 times" in tokenise.sentence
    assert "50.0 ms" in tokenise.sentence, "50,000 tokens at a million a second"
    assert found_of([0.002], workers=2)[-1].value == pytest.approx(100)
    assert found_of([0.002], workers=0)[-1].value == pytest.approx(50)


def test_loader_slower_than_steps_is_a_fault() -> None:
    """Check a step that waits 80 of 100 ms: else it took 50,000 tokens/s, and the loader gives half."""
    loader = found_of([0.04, 0.041, 0.039], seconds=0.1, wait=0.8)[-1]
    assert loader.value == pytest.approx(0.5) and loader.is_fault and "data.workers" in loader.fix
    unclear = found_of([0.015, 0.021, 0.025], seconds=0.1, wait=0.8)[-1]
    assert unclear.low < 1 < unclear.high and not unclear.is_fault


def test_slow_loader_of_a_run_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = {each.name: each for each in diagnose(subject, LookPlan(rounds=5, least=5), None).findings}
    assert not healthy["loader_rate"].is_fault and healthy["loader_rate"].low > 1
    assert healthy["reading"].value > 0 and "nothing is tokenised" in healthy["reading"].sentence
    assert "tokenising" not in healthy
    whole = subject.trainer.loader.prepared

    def prepared(request: tuple[int, int]) -> Any:
        time.sleep(0.1)
        return whole(request)

    monkeypatch.setattr(subject.trainer.loader, "prepared", prepared)
    slow = look_at(subject, 2)
    assert min(slow.seconds) > 0.1
    found = reading_findings(subject.trainer.corpus, None, slow.seconds, 1, steps(0.02, 0.0, tokens=32))
    assert [each.name for each in found] == ["loader_rate"] and found[0].is_fault


def test_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a large text is read in part, by size or by time."""
    (tmp_path / "a.txt").write_bytes(b"a line of text\n" * 1_000_000)
    found = text_rates(DataConfig(path=tmp_path / "a.txt"))
    assert found is not None and found.nbytes <= reading.READ_BYTES
    assert found.tokens == pytest.approx(found.tokenised), "a token is a byte"
    now = [0.0]
    monkeypatch.setattr(reading.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 0.06) or now[0])
    found = text_rates(DataConfig(path=tmp_path / "a.txt"))
    assert found is not None and found.nbytes == 1 << 20, "the first chunk takes 60 ms by this clock"


def test_rates_are_bytes_over_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check them by a clock that only reading and tokenising move: 10 ms a chunk, 1 us a byte, 4 bytes a token."""
    now = [0.0]
    monkeypatch.setattr(reading.time, "perf_counter", lambda: now[0])

    class Slow(ByteTokenizer):
        def encode_all(self, texts: Sequence[bytes]) -> list[Any]:
            now[0] += 1e-6 * sum(map(len, texts))
            return [np.zeros(len(text) // 4, np.uint8) for text in texts]

    def chunks(document: Document, start: int = 0) -> Any:
        now[0] += 0.01
        yield b"1234567\n" * 1000, 0

    monkeypatch.setattr(Document, "chunks", chunks)
    monkeypatch.setattr(reading, "load_tokenizer", lambda _: Slow())
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("text")
    found = text_rates(DataConfig(path=tmp_path))
    assert found is not None and found.nbytes == 32_000
    assert (found.read, found.tokenised, found.tokens) == pytest.approx((800e3, 1e6, 250e3))


def test_files_that_are_no_text_are_read_and_not_tokenised(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" * 1000)
    assert text_rates(DataConfig(path=tmp_path)) is None
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text " * 1000))
    found = text_rates(DataConfig(path=tmp_path))
    assert found is not None and found.nbytes == 6000


def test_missing_text_leaves_its_rates_out(tmp_path: Path) -> None:
    assert text_rates(DataConfig(path=tmp_path / "gone")) is None
    (tmp_path / "a.txt").write_text("text")
    assert text_rates(DataConfig(path=tmp_path, tokenizer=tmp_path / "gone.json")) is None
