"""Findings in batches, padding, rows of experts and guesses, and rates of reading them: known batches, slow loaders."""

import dataclasses
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.config import DataConfig
from dsmini.data.documents import Document
from dsmini.diagnosis.findings import padding as module
from dsmini.diagnosis.findings import reading
from dsmini.diagnosis.findings.batches import batch_findings, look_at
from dsmini.diagnosis.findings.guesses import acceptance
from dsmini.diagnosis.findings.padding import padded_rows, padding
from dsmini.diagnosis.findings.reading import TextRates, reading_findings, text_rates
from dsmini.diagnosis.subject import Subject
from dsmini.nn.losses import IGNORE
from dsmini.text.tokenizer import ByteTokenizer
from tests.conftest import Clock
from tests.diagnosis.conftest import MODEL, World, step_of
from tests.helpers.token_texts import corpus, random_text

# --- targets

OUT = IGNORE
# targets, the share that is left out, if it is a fault, and words of the sentence
PADDED: dict[str, tuple[list[list[int]], float, bool, str]] = {
    "none": ([[0] * 8] * 6, 0.0, False, "0.0% of the 48 targets"),
    "two of three at the end": ([[1, 2, OUT, 4, OUT, OUT]], 0.5, True, "33.3% stand after"),
    "a masked prompt is context": ([[OUT] * 9 + [1]] * 2, 0.9, False, "0.0% stand after"),
    "a row without a target": ([[1, 2], [OUT, OUT]], 0.5, True, "50.0% stand after"),
    "a tenth": ([[0] * 90 + [OUT] * 10], 0.1, False, "10.0% stand after"),
    "more than a tenth": ([[0] * 89 + [OUT] * 11], 0.11, True, "11.0% stand after"),
}


@pytest.mark.parametrize("case", PADDED)
def test_targets_after_the_last_that_counts_are_for_nothing(case: str) -> None:
    rows, share, is_fault, words = PADDED[case]
    found = padding([torch.tensor(rows)])
    assert (found.value, found.is_fault, bool(found.fix)) == (share, is_fault, is_fault) and words in found.sentence


# --- rows of experts

WIDE = dataclasses.replace(MODEL, n_layers=3, n_dense_layers=1, n_routed_experts=4, max_seq_len=257)


def rows_of(config: ModelConfig, dtype: torch.dtype, backend: str = "eager") -> Any:
    torch.manual_seed(0)
    with ops.use(backend):
        return padded_rows(Transformer(config, compute_dtype=dtype), torch.randint(0, 256, (1, 257)))


def test_rows_between_experts_are_counted() -> None:
    """Check two layers of 257 x 2 visits, and 256 x 2 of the MTP block: each has 4 x 63 rows more, rounded up to 64.

    514 + 252 = 766 become 768, and 512 + 252 = 764 become 768.
    """
    found = rows_of(WIDE, torch.bfloat16)
    visits, rows = 2 * 514 + 512, 3 * 768
    assert found.value == pytest.approx(1 - visits / rows) and not found.is_fault
    assert "2,304 rows for 1,540 visits" in found.sentence


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "eager"), (torch.bfloat16, "reference")])
def test_experts_without_alignment_have_no_padding(dtype: torch.dtype, backend: str) -> None:
    found = rows_of(WIDE, dtype, backend)
    assert found.value == 0.0 and "none of them is padding" in found.sentence


def test_kernel_multiplies_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check it by the name of the kernel that ran; a layer where none ran counts the padding again."""
    seen: list[Any] = []
    monkeypatch.setattr(module.ops, "counting", lambda counter: seen.append(counter) or ops.use(None))
    whole = module.row_alignment

    def told(*args: Any) -> int:
        seen.append("asked")
        return whole(*args)

    monkeypatch.setattr(module, "row_alignment", told)
    model = Transformer(WIDE, compute_dtype=torch.bfloat16)
    first: Any = model.layers[1]
    first.ffn.experts.register_forward_hook(
        lambda *_: seen[0].kernel_ran(ops.Call("trained_experts", (), {}, None, 0.0))
    )
    found = padded_rows(model, torch.randint(0, 256, (1, 257)))
    assert found is not None and seen.count("asked") == 2, "that of two layers, and none of the first"


def test_dense_model_has_no_rows_of_experts() -> None:
    dense = dataclasses.replace(WIDE, n_dense_layers=4)
    assert padded_rows(Transformer(dense), torch.zeros(1, 8).long()) is None


def test_looking_leaves_no_hooks_and_no_gradients(subject: Subject) -> None:
    model, looked = subject.trainer.model, look_at(subject, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = batch_findings(subject, looked.batches)
    assert [each.name for each in found] == ["padding", "padded_rows", "acceptance"]
    assert found[0].value == 0.0 and not any(each.is_fault for each in found)
    assert all(not m._forward_hooks and m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- guesses


class Saying(Transformer):
    """A model whose head says the tokens that it is told, position by position."""

    def told(self, main: list[int], *guesses: list[int]) -> "Saying":
        self.said = [main, *guesses]
        return self

    def states(self, tokens: Tensor, **_: Any) -> Any:
        hidden = one_hot(self.said[0], len(tokens))
        return type("States", (), {"normed": hidden, "given": hidden})()


def one_hot(ids: list[int], rows: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ids), 256).float().expand(rows, -1, -1)


def saying(main: list[int], *guesses: list[int]) -> Any:
    model: Any = Saying(dataclasses.replace(MODEL, n_mtp_layers=len(guesses))).told(main, *guesses)
    model.head = torch.nn.Identity()
    chain = model.mtp

    def chain_forward(tokens: Tensor, *_: Any) -> Any:
        return [one_hot(ids, len(tokens)) for ids in guesses], []

    chain.forward = chain_forward
    return model


def test_guesses_are_compared_with_the_prediction_of_the_same_token() -> None:
    """Check one depth: its guess at i is of the token that the model predicts at i + 1."""
    found = acceptance(saying([9, 1, 2, 3, 4], [1, 2, 0, 4]), torch.zeros(2, 5).long())
    assert found is not None and found.value == 0.75 and found.low == found.high == 0.75, "both rows alike"
    assert "75%" in found.sentence and "1.75 tokens" in found.sentence and not found.is_fault


def test_deeper_guess_counts_only_after_the_first() -> None:
    """Check two depths at three positions: the first agrees at 1 and 2, the second at 0 and 2, both at 2 alone."""
    found = acceptance(saying([9, 1, 2, 3, 4], [0, 2, 3, 0], [2, 0, 4]), torch.zeros(1, 5).long())
    assert found is not None and found.value == pytest.approx(2 / 3)
    assert "33% with all 2" in found.sentence and "2.00 tokens" in found.sentence
    assert (found.low, found.high) == (0.0, 1.0), "one row has no spread"


def test_random_weights_say_so(subject: Subject) -> None:
    tokens = subject.one_batch[0]
    fresh, trained = (acceptance(subject.trainer.model, tokens, steps=steps) for steps in (0, 5))
    assert fresh is not None and trained is not None
    assert "random still" in fresh.sentence and "random still" not in trained.sentence
    assert subject.trainer.model.training


def test_model_without_guesses_has_none() -> None:
    model = Transformer(dataclasses.replace(MODEL, n_mtp_layers=0))
    assert acceptance(model, torch.zeros(1, 8).long()) is None


def test_copying_model_accepts_every_guess() -> None:
    """Check a real forward: with a head that always says token 0, both agree everywhere."""
    model = Transformer(MODEL)
    with torch.no_grad():
        model.head.weight.zero_()
    found = acceptance(model, torch.randint(0, 256, (2, 8)))
    assert found is not None and found.value == 1.0 and "2.00 tokens" in found.sentence


# --- rates of reading

TEXT = TextRates(nbytes=2_000_000, read=800e6, tokenized=4e6, tokens=1e6)


def found_of(batches: Sequence[float], workers: int = 1, seconds: float = 0.1, wait: float = 0.0) -> Any:
    text, steps = corpus(random_text(50_000), val_bytes=4_000), [step_of(seconds, wait, tokens=1000)]
    found = reading_findings(text, TEXT, batches, workers, steps)
    assert [each.name for each in found] == ["reading", "tokenizing", "loader_rate"]
    return found


def test_loader_over_steps() -> None:
    """Check 1,000 tokens in 2 ms against 1,000 in 100 ms, and twice that with two threads."""
    read, tokenize, loader = found_of([0.002, 0.001, 0.004])
    assert (loader.low, loader.value, loader.high) == pytest.approx((25, 50, 100))
    assert "can give 50 times as many tokens as steps take" in loader.sentence and not loader.is_fault
    assert "500,000 tokens/s" in loader.sentence and "10,000 tokens/s" in loader.sentence
    assert "800 MB/s" in read.sentence and "4.00 MB/s" in tokenize.sentence and "100 times" in tokenize.sentence
    assert "50.0 ms" in tokenize.sentence, "50,000 tokens at a million a second"
    assert found_of([0.002], workers=2)[-1].value == pytest.approx(100)
    assert found_of([0.002], workers=0)[-1].value == pytest.approx(50)


def test_loader_slower_than_steps_is_a_fault() -> None:
    """Check a step that waits 80 of 100 ms: else it took 50,000 tokens/s, and the loader gives half."""
    loader = found_of([0.04, 0.041, 0.039], seconds=0.1, wait=0.8)[-1]
    assert loader.value == pytest.approx(0.5) and loader.is_fault and "data.workers" in loader.fix
    unclear = found_of([0.015, 0.021, 0.025], seconds=0.1, wait=0.8)[-1]
    assert unclear.low < 1 < unclear.high and not unclear.is_fault


def test_slow_loader_of_a_run_is_found(subject: Subject, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check batches of 32 tokens that take 100 ms by a clock of their own, beside steps of 20 ms."""
    there: World = world()
    whole = subject.trainer.loader.prepared

    def prepared(request: tuple[int, int]) -> Any:
        there.now += 0.1
        return whole(request)

    monkeypatch.setattr(subject.trainer.loader, "prepared", prepared)
    slow = look_at(subject, 2)
    assert slow.seconds == pytest.approx([0.1, 0.1])
    found = reading_findings(subject.trainer.corpus, None, slow.seconds, 1, [step_of(0.02)])
    assert [each.name for each in found] == ["loader_rate"] and found[0].is_fault
    assert found[0].value == pytest.approx(0.2)


def test_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a large text is read in part, by size or by time."""
    (tmp_path / "a.txt").write_bytes(b"a line of text\n" * 1_000_000)
    found = text_rates(DataConfig(path=tmp_path / "a.txt"))
    assert found is not None and found.nbytes <= reading.READ_BYTES
    assert found.tokens == pytest.approx(found.tokenized), "a token is a byte"
    clock = Clock(monkeypatch)
    monkeypatch.setattr(reading.time, "perf_counter", lambda: clock.pay(0.06))
    found = text_rates(DataConfig(path=tmp_path / "a.txt"))
    assert found is not None and found.nbytes == 1 << 20, "the first chunk takes 60 ms by this clock"


def test_rates_are_bytes_over_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Check them by a clock that only reading and tokenizing move: 10 ms a chunk, 1 us a byte, 4 bytes a token."""

    class Slow(ByteTokenizer):
        def encode_all(self, texts: Sequence[bytes]) -> list[Any]:
            clock.pay(1e-6 * sum(map(len, texts)))
            return [np.zeros(len(text) // 4, np.uint8) for text in texts]

    def chunks(document: Document, start: int = 0) -> Any:
        clock.pay(0.01)
        yield b"1234567\n" * 1000, 0

    monkeypatch.setattr(Document, "chunks", chunks)
    monkeypatch.setattr(reading, "load_tokenizer", lambda _: Slow())
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("text")
    found = text_rates(DataConfig(path=tmp_path))
    assert found is not None and found.nbytes == 32_000
    assert (found.read, found.tokenized, found.tokens) == pytest.approx((800e3, 1e6, 250e3))


def test_files_that_are_no_text_are_read_and_not_tokenized(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" * 1000)
    assert text_rates(DataConfig(path=tmp_path)) is None
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text " * 1000))
    found = text_rates(DataConfig(path=tmp_path))
    assert found is not None and found.nbytes == 6000


def test_missing_text_leaves_its_rates_out(tmp_path: Path) -> None:
    assert text_rates(DataConfig(path=tmp_path / "gone")) is None
    (tmp_path / "a.txt").write_text("text")
    assert text_rates(DataConfig(path=tmp_path, tokenizer=tmp_path / "gone.json")) is None
