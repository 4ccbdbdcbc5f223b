"""Reading and tokenizing: how many tokens the text gives in a second, next to those that steps take.

A run reads its text once and tokenizes it into a cache. Its loader then takes batches from the cache. Four rates show
which of them would be too slow:

    read        bytes/s of a sample of the text's own files, from the disk or from the system's memory
    tokenize    bytes/s and tokens/s of the same sample; it happens once, before the first step
    load        tokens/s of batches, prepared alone, times the threads of data.workers
    take        tokens of a step over its seconds without waiting

The loader is at fault where it gives less than steps would take. It is timed alone: a loader that computes also takes
cores from the steps, which is seen where a batch is replayed.

Worked example: a batch of 1,024 tokens is prepared in 0.2 ms, so the loader gives 5 million tokens/s. A step computes
for 100 ms, so it takes 10,240 tokens/s. The loader could give 500 times as many.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsmini.config import DataConfig
from dsmini.data.cache import token_dtype
from dsmini.data.corpus import Corpus
from dsmini.data.documents import Document, find
from dsmini.data.texts import SIZE, lines
from dsmini.diagnosis.finding import Finding
from dsmini.report.units import human
from dsmini.text.tokenizer import Tokenizer, load_tokenizer
from dsmini.training.trainer import StepResult

READ_BYTES, READ_SECONDS = 4 << 20, 0.05
"""Size of the sample: it ends with the first of both."""
ENCODED_SECONDS = 0.04
"""Time of a tokenizing that is long enough to be timed. Samples double until then, so that all take about twice it."""


@dataclass(frozen=True, kw_only=True)
class TextRates:
    """Rates of a sample of a run's text."""

    nbytes: int
    """Size of the sample."""
    read: float
    """Bytes read in a second."""
    tokenized: float
    """Bytes tokenized in a second."""
    tokens: float
    """Tokens made in a second."""


def text_rates(data: DataConfig, seed: int = 0) -> TextRates | None:
    """Read and tokenize a sample of a run's files; None where they or the tokenizer are not there any more."""
    try:
        documents, tokenizer = find(data.path).documents, load_tokenizer(data.tokenizer)
        texts, nbytes, seconds = _read(documents, seed)
    except ValueError:
        return None
    if not texts:
        return None
    encoded, tokens, taken = _tokenize(tokenizer, texts)
    return TextRates(nbytes=nbytes, read=nbytes / seconds, tokenized=encoded / taken, tokens=tokens / taken)


def _read(documents: Sequence[Document], seed: int) -> tuple[list[bytes], int, float]:
    """Return texts of files in random order, the bytes that were read, and the seconds."""
    texts: list[bytes] = []
    nbytes = 0
    start = time.perf_counter()
    for number in np.random.default_rng(seed).permutation(len(documents)).tolist():
        for chunk, _ in documents[number].chunks():
            nbytes += len(chunk)
            if b"\0" not in chunk:  # else it is no text, and training leaves it out
                texts.append(chunk)
            if nbytes >= READ_BYTES or time.perf_counter() - start > READ_SECONDS:
                return texts, nbytes, time.perf_counter() - start
    return texts, nbytes, time.perf_counter() - start


def _tokenize(tokenizer: Tokenizer, chunks: Sequence[bytes]) -> tuple[int, int, float]:
    """Tokenize more and more of the texts; return the bytes and tokens of the last time, and its seconds."""
    pieces = (chunk[i : i + SIZE] for chunk in chunks for i in range(0, len(chunk), SIZE))
    texts, dtype = list(lines(pieces, SIZE)), token_dtype(tokenizer.vocab_size)
    n = 1
    while True:
        start = time.perf_counter()
        ids = np.concatenate(tokenizer.encode_all(texts[:n])).astype(dtype)
        seconds = time.perf_counter() - start
        if seconds > ENCODED_SECONDS or n >= len(texts):
            return sum(map(len, texts[:n])), len(ids), seconds
        n *= 2


def reading_findings(
    corpus: Corpus, text: TextRates | None, batches: Sequence[float], workers: int, steps: Sequence[StepResult]
) -> list[Finding]:
    """Return the rates of reading, of tokenizing, and of the loader over that of the steps.

    Args:
        batches: seconds of batches that were prepared alone.
        steps: plain steps.
    """
    take = statistics.median(step.tokens / (step.seconds * (1 - step.data_wait)) for step in steps)
    found = [] if text is None else _of_text(corpus, text, take)
    return [*found, _loader(steps[0].tokens, batches, workers, take)]


def _of_text(corpus: Corpus, text: TextRates, take: float) -> list[Finding]:
    whole = len(corpus.train) / text.tokens
    said = f"The text is read at {human(text.read, 'bytes/s')}, on a sample of {text.nbytes / 1e6:.1f} MB."
    if corpus.bytes_per_token == 1.0:
        return [_rate("reading", text.read, "bytes/s", f"{said} A token is a byte, so that nothing is tokenized.")]
    return [
        _rate("reading", text.read, "bytes/s", said),
        _rate(
            "tokenizing",
            text.tokens,
            "tokens/s",
            f"It is tokenized at {human(text.tokenized, 'bytes/s')}, {_tokens(text.tokens)}, "
            f"{_times(text.tokens / take)} what steps take. That happens once, before the first step: all "
            f"{len(corpus.train):,} training tokens would take {human(whole, 's')}. Steps read the cache.",
        ),
    ]


def _loader(tokens: int, batches: Sequence[float], workers: int, take: float) -> Finding:
    """Return the rate of the loader over that of the steps."""
    seconds = statistics.median(batches)
    low, value, high = (max(1, workers) * tokens / s / take for s in (max(batches), seconds, min(batches)))
    is_fault = high < 1
    can = "can give" if is_fault or value >= 1 else "may give only"
    return Finding(
        axis="Data",
        name="loader_rate",
        value=value,
        unit="x",
        low=low,
        high=high,
        is_fault=is_fault,
        sentence=(
            f"The loader {can} {_times(value)} as many tokens as steps take: {_tokens(value * take)} from "
            f"the cache, {human(seconds, 's')} a batch, next to {_tokens(take)}."
        ),
        fix="Prepare batches in more threads (data.workers), or make one cheaper to prepare." if is_fault else "",
    )


def _rate(name: str, value: float, unit: str, sentence: str) -> Finding:
    return Finding(
        axis="Data", name=name, value=value, unit=unit, low=value, high=value, is_fault=False, sentence=sentence
    )


def _tokens(rate: float) -> str:
    return human(rate, "tokens/s") if rate < 1e6 else human(rate / 1e6, "million tokens/s")


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.2g} times"
