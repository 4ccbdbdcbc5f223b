"""The corpus: token ids that are mapped, not loaded, cut into batches in an order that is a function of the seed.

The default corpus is real text that every machine has: the source code of Python's own standard library.

Its order is an endless stream, of which sequence number n is computed when it is needed. An epoch is a permutation of
all windows of the text. Shuffling a list of them would take memory that grows with the text and a state to save. Here
the permutation is a function, so a position in the stream is one number, and a run can continue anywhere.

The function is a Feistel network: it cuts an index into two halves and adds to each in turn a hash of the other. That
can be undone, so no two indices have the same image, whatever the hash. It permutes a power of four that is less than
four times too large. A result that is not a window is permuted again until it is one (cycle walking).

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002. Not a cipher here: a shuffle.

Fill-in-the-middle is a document rearranged so that predicting its next token fills a hole in it.

    <fim begin> prefix <fim hole> suffix <fim end> middle <end of document>

Prefix-suffix-middle (PSM), applied to whole documents before they are packed into sequences, to a share of them.
Source: DeepSeek-V3 report, section 4.1, which used a rate of 0.1.

A corpus is tokenized once, into files of token ids, next to the runs, that later runs map into memory.

    CACHE/0123456789abcdef/    the key: a hash of everything the tokens depend on
        train.bin, val.bin     uint8, uint16 or uint32 (little-endian), the smallest that holds the vocabulary
        meta.json              the facts of the corpus, with counts and the SHA-256 of the tokens

An entry is built in a hidden folder next to it and renamed when it is whole, so an entry that exists is complete. The
remains of an interrupted build are never read, and a later build removes them. The cache may be deleted at any time.
"""

import dataclasses
import fcntl
import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from dsmini.atomic import STALE_AFTER, as_json, finish_folder, partial_folder, remove_leftovers
from dsmini.config import DataConfig
from dsmini.config.fields import build, check_types, plain
from dsmini.data.documents import (
    CHUNK,
    Piece,
    ProgressCallback,
    Reader,
    Source,
    Split,
    find,
    lines,
    measure,
    silent,
    split,
)
from dsmini.reading import read_bytes, read_table
from dsmini.text.tokenizer import FIM_TOKENS, ByteTokenizer, Tokenizer, load_tokenizer

_ROUNDS = 6


def window_starts(first: int, n: int, length: int, seq_len: int, seed: int) -> NDArray[np.int64]:
    """Return the places in a text, read as a circle, where sequences first .. first + n - 1 of the stream begin.

    Each epoch has its own random offset and order, and covers every token once, but for a remainder of less than
    seq_len tokens.
    """
    windows = length // seq_len
    numbers = np.arange(first, first + n)
    starts = np.empty(n, dtype=np.int64)
    for epoch in range(first // windows, (first + n - 1) // windows + 1):
        state = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS + 1, np.uint64).astype(np.uint64)
        here = numbers // windows == epoch
        places = permute(numbers[here] % windows, windows, state[:_ROUNDS])
        starts[here] = (int(state[_ROUNDS]) % length + places * seq_len) % length
    return starts


def permute(index: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Permute range(n), with one round for each key, and return the images of these indices."""
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    out = index.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _feistel(out[todo], half, keys)
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def _feistel(index: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = index >> half, index & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64: every bit of the input changes about half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- fill-in-the-middle


LARGEST_FIM = 1 << 20
"""Bytes of a document; larger ones are left as they are: their ends are far beyond any context."""


def arrange(text: bytes, name: str, rate: float, seed: int, tokenizer: Tokenizer) -> list[bytes | int] | None:
    """Return a document's parts and the tokens between them; None if it stays as it is.

    It is chosen with probability `rate` and cut at two places, uniform over its character borders. Both depend on seed
    and name alone, so the choice for a document is the same in every corpus. A document that already holds a marking
    token (bytes that are not UTF-8) stays as it is.
    """
    assert tokenizer.fim is not None, "load_corpus checks this"
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
    random = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    if not text or random.random() >= rate or np.isin(tokenizer.encode(text), tokenizer.fim).any():
        return None
    data = np.frombuffer(text, dtype=np.uint8)
    borders = np.append(np.flatnonzero(data & 0xC0 != 0x80), len(text))
    first, second = sorted(borders[random.integers(len(borders), size=2)].tolist())
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    return [tokenizer.fim.begin, prefix, tokenizer.fim.hole, suffix, tokenizer.fim.end, middle]


# --- the tokens, stored once


FORMAT = 4
"""Version of an entry; changes whenever the same corpus would be written otherwise."""
_HASHED_ON_LOAD = 256 << 20
"""Bytes of the largest entry whose tokens are hashed each time: that takes less than a second."""
_AT_ONCE = 4 * CHUNK
"""Bytes of text that the tokenizer is given in one call, at least."""


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """The description of a corpus, as corpus.json and the cache have it."""

    source: str
    """Sentence that names what was read."""
    files: int
    skipped: int
    """Number of files of a folder that were left out because they are empty or not text."""
    left_out: tuple[str, ...] = ()
    """Their names, each with the reason."""
    not_utf8: tuple[str, ...] = ()
    """Names of the texts that are not UTF-8."""
    split: str
    """Sentence that says how the held-out part was chosen."""
    train_tokens: int = 0
    val_tokens: int = 0
    val_bytes: int | None = None
    """Bytes of the held-out text, a document's end counted as one; None: a token is a byte."""
    rearranged: int = 0
    """Number of training documents rearranged for fill-in-the-middle."""
    sha256: str
    """Hash of the training tokens followed by the held-out ones."""


class CorpusCache:
    """The entry for one source, tokenizer and config in a folder.

    Args:
        seed: seed of the choice of documents for fill-in-the-middle.
    """

    def __init__(self, folder: Path, source: Source, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self.folder, self.source, self.tokenizer, self.config, self.seed = folder, source, tokenizer, config, seed
        everything = {
            "format": FORMAT,
            "root": str(source.root.resolve()),  # two folders may hold files of equal names, sizes and times
            "files": [[document.name, document.stored, document.modified] for document in source.documents],
            "val_fraction": config.val_fraction,
            "tokenizer": config.tokenizer and hashlib.sha256(read_bytes(config.tokenizer)).hexdigest(),
            "fim": [config.fim_rate, seed] if config.fim_rate else None,
        }
        self.dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
        """The smallest unsigned integers that hold every token, little-endian."""
        self.rearranged = 0
        """Number of documents that fill-in-the-middle has changed so far."""
        self.entry = folder / hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]

    def open(
        self, check: Callable[[int, int], None], progress: ProgressCallback
    ) -> tuple[CorpusFacts, Mapping[str, NDArray[Any]], str]:
        """Return the entry, built first if it is missing or damaged: its facts, both parts mapped into memory, and a
        sentence that says it was there, or why it had to be built.

        Args:
            check: called with the numbers of training and held-out tokens before anything is stored; may raise.

        Raises: ValueError for text that cannot be used; OSError where the tokens cannot be written.
        """
        words = f"tokenized once into {self.entry}, read from there next time"
        if self.entry.exists():
            try:
                return *self._read(), f"read from {self.entry}, where it was tokenized before"
            except ValueError as damage:
                words = f"tokenized again into {self.entry}, for {damage}"
        self._build(check, progress)
        return *self._read(), words

    def _read(self) -> tuple[CorpusFacts, Mapping[str, NDArray[Any]]]:
        """Return the facts of the entry, and both parts mapped into memory.

        Raises: ValueError saying why it cannot be used.
        """
        try:
            facts = build(CorpusFacts, read_table(self.entry / "meta.json"), "meta.json", "")
            check_types(facts)
            files = {part: self.entry / f"{part}.bin" for part in ("train", "val")}
            parts = {part: np.memmap(file, dtype=self.dtype, mode="r") for part, file in files.items()}
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.entry} could not be read ({error})") from None
        for part, count in (("train", facts.train_tokens), ("val", facts.val_tokens)):
            size, want = parts[part].nbytes, count * self.dtype.itemsize
            if size != want:
                raise ValueError(f"{files[part]} had {size:,} bytes, want {want:,}")
        if sum(tokens.nbytes for tokens in parts.values()) <= _HASHED_ON_LOAD:
            digest = hashlib.sha256()
            for tokens in parts.values():
                digest.update(tokens.data)
                forget(tokens)
            if digest.hexdigest() != facts.sha256:
                raise ValueError(f"the tokens in {self.entry} were not those of its meta.json")
        return facts, parts

    def _build(self, check: Callable[[int, int], None], progress: ProgressCallback) -> None:
        texts, left_out = measure(self.source, progress)
        parts = split(texts, self.config.val_fraction, whole_characters=self.config.tokenizer is not None)
        if self.config.tokenizer is None:  # known before anything is written; fill-in-the-middle only adds
            check(*(sum(p.stop - p.start + p.ends for p in part) for part in (parts.train, parts.val)))
        with ExitStack() as stack:
            try:
                remove_leftovers(self.folder, STALE_AFTER)
                partial = stack.enter_context(partial_folder(self.entry))
            except OSError as error:
                raise ValueError(
                    f"cannot store the tokenized corpus in {self.folder}: {error.strerror}; "
                    "choose another place with --out"
                ) from None
            try:
                facts = CorpusFacts(
                    source=self.source.words,
                    files=len(texts),
                    skipped=len(left_out),
                    left_out=tuple(left_out),
                    not_utf8=tuple(document.name for document in texts if not document.utf8),
                    split=parts.words,
                    val_bytes=sum(piece.stop - piece.start + piece.ends for piece in parts.val),
                    **self._write(partial, parts, progress),
                )
                check(facts.train_tokens, facts.val_tokens)
                (partial / "meta.json").write_text(as_json(asdict(facts)), encoding="utf-8")
                self._keep(partial)
            except OSError as error:
                raise OSError(f"cannot tokenize the corpus into {self.folder}: {error.strerror or error}") from None

    def _keep(self, partial: Path) -> None:
        """Rename the finished folder to the entry, replacing a damaged one, unless another process was first."""
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else each of two builders might move the other's entry aside
            try:
                self._read()
            except ValueError:
                finish_folder(partial, self.entry, replace=True)

    def _write(self, folder: Path, parts: Split, progress: ProgressCallback) -> dict[str, Any]:
        """Write the tokens of both parts into a folder, and return their facts."""
        digest = hashlib.sha256()
        reader = Reader([*parts.train, *parts.val], "tokenizing", progress)
        tokens: dict[str, int] = {}
        for name, pieces, rate in (("train", parts.train, self.config.fim_rate), ("val", parts.val, 0.0)):
            with (folder / f"{name}.bin").open("wb") as file:
                for ids in self._ids(self._items(pieces, reader, rate)):
                    data = ids.astype(self.dtype, copy=False).data
                    file.write(data)
                    digest.update(data)
                tokens[f"{name}_tokens"] = file.tell() // self.dtype.itemsize
        return {**tokens, "rearranged": self.rearranged, "sha256": digest.hexdigest()}

    def _items(self, pieces: Sequence[Piece], reader: Reader, fim_rate: float) -> Iterator[bytes | int]:
        """Yield the texts to be tokenized each for itself, and the tokens between them, in order."""
        for piece in pieces:
            if fim_rate and piece.stop - piece.start <= LARGEST_FIM:
                text = b"".join(reader.chunks(piece))
                arranged = arrange(text, piece.document.name, fim_rate, self.seed, self.tokenizer)
                self.rearranged += arranged is not None
                yield from arranged or [text]
            else:
                yield from lines(reader.chunks(piece))
            if piece.ends:
                yield self.tokenizer.end_of_document

    def _ids(self, items: Iterator[bytes | int]) -> Iterator[NDArray[Any]]:
        """Yield the tokens of the items in order, of several texts at once."""
        waiting: list[bytes | int] = []
        size = 0
        for item in items:
            waiting.append(item)
            size += len(item) if isinstance(item, bytes) else 1
            if size >= _AT_ONCE:
                yield self._encode(waiting)
                waiting, size = [], 0
        if waiting:
            yield self._encode(waiting)

    def _encode(self, items: Sequence[bytes | int]) -> NDArray[Any]:
        texts = iter(self.tokenizer.encode_all([item for item in items if isinstance(item, bytes)]))
        return np.concatenate([next(texts) if isinstance(item, bytes) else np.array([item]) for item in items])


def forget(tokens: NDArray[Any]) -> None:
    """Release the pages of a mapped file that were read.

    They stay in the system's cache, and no longer count as memory of this process, which would grow to the size of the
    corpus.
    """
    if isinstance(tokens.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tokens.base.madvise(mmap.MADV_DONTNEED)


# --- the corpus and its batches


def sequences(
    text: NDArray[Any], starts: NDArray[np.int64], seq_len: int
) -> tuple[Int[Tensor, "n {seq_len}"], Int[Tensor, "n {seq_len}"]]:
    """Return tokens and targets of the sequences that begin at these places.

    The text is a circle: a sequence that reaches its end continues at its beginning.
    """
    both = np.empty((len(starts), seq_len + 1), dtype=np.int64)
    for row, start in zip(both, starts.tolist(), strict=True):
        at_end = text[start : start + seq_len + 1]
        row[: len(at_end)] = at_end
        row[len(at_end) :] = text[: seq_len + 1 - len(at_end)]
    forget(text)
    tokens = torch.from_numpy(both)
    return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Corpus(CorpusFacts):
    """Token ids of the training and the held-out text, and their source."""

    train: NDArray[Any]
    val: NDArray[Any]
    end_of_document: int = ByteTokenizer.end_of_document
    """Token after every document."""
    cache: str = ""
    """Sentence that says where the tokens are stored."""

    def describe(self) -> dict[str, str | int | list[str]]:
        """Return the content of a run's corpus.json."""
        return plain({f.name: getattr(self, f.name) for f in dataclasses.fields(CorpusFacts)})

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes of a held-out token."""
        return 1.0 if self.val_bytes is None else self.val_bytes / len(self.val)

    def batch(
        self, first: int, n: int, seq_len: int, seed: int
    ) -> tuple[Int[Tensor, "{n} {seq_len}"], Int[Tensor, "{n} {seq_len}"]]:
        """Return tokens and targets of sequences first .. first + n - 1 of the endless stream."""
        return sequences(self.train, window_starts(first, n, len(self.train), seq_len, seed), seq_len)

    def documents(self, tokens: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
        """Return the number, from 0 in each row, of the document that a token belongs to; its end belongs to it."""
        ends = (tokens == self.end_of_document).long()
        return ends.cumsum(1) - ends

    def windows(self, seq_len: int, at_most: int | None = None) -> "Windows":
        """Cut the held-out split into windows of seq_len: each token is scored once, except a tail shorter than that.

        Args:
            at_most: for a quick look, take about this many tokens, in windows spread evenly.
        """
        n = (len(self.val) - 1) // seq_len
        numbers = np.arange(n)
        if at_most is not None and at_most < n * seq_len:
            numbers = np.linspace(0, n - 1, max(1, at_most // seq_len)).round().astype(np.int64)
        return Windows(text=self.val, starts=numbers * seq_len, seq_len=seq_len)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Held-out windows, read when needed."""

    text: NDArray[Any]
    starts: NDArray[np.int64]
    seq_len: int

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """Number of tokens that all windows score."""
        return len(self.starts) * self.seq_len

    def share(self, part: int, parts: int) -> tuple["Windows", int]:
        """Return every parts-th window, and how many of them count: all parts get as many, some one twice."""
        starts = self.starts[part::parts]
        missing = -(-len(self) // parts) - len(starts)
        return dataclasses.replace(self, starts=np.append(starts, self.starts[:missing])), len(starts)

    def blocks(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens and targets [at most `rows`, seq_len], block by block."""
        for i in range(0, len(self), rows):
            yield sequences(self.text, self.starts[i : i + rows], self.seq_len)


class Loader:
    """Prepares batches ahead of the training, in threads. Its results depend on the requests alone.

    Args:
        workers: number of threads; 0 prepares each batch when it is needed.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, workers: int) -> None:
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batch") if workers else None
        self._started: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]] = {}

    def take(self, requests: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return the batch of the first request, which is (first sequence, number of sequences).

        The others are started, and stored until a later call asks for them or no longer does. An error in a thread is
        raised by the call that takes its batch.
        """
        if self._pool is None:
            return self.prepared(requests[0])
        self._started = {
            request: self._started.get(request) or self._pool.submit(self.prepared, request) for request in requests
        }
        return self._started.pop(requests[0]).result()

    def prepared(self, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prepare a batch now."""
        return self.corpus.batch(*request, self.seq_len, self.seed)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def load_corpus(
    config: DataConfig, seq_len: int, vocab_size: int, cache: Path, seed: int = 0, progress: ProgressCallback = silent
) -> Corpus:
    """Return the corpus of a run, tokenized now or by an earlier run.

    Args:
        cache: folder of tokenized corpora; made where it is missing.
        seed: seed of the choice of documents for fill-in-the-middle.
        progress: told how far reading and tokenizing are.

    Raises: ValueError for a path that is missing, unreadable, empty, not text, or too short for one sequence in each
        part, and for a vocabulary or a fill-in-the-middle that the tokenizer does not have; OSError for a full disk.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    _check_vocabulary(config, tokenizer, vocab_size)
    source = find(config.path, leave_out=cache)
    where = source.words

    def check(train: int, val: int) -> None:
        for part, tokens in (("training", train), ("held-out", val)):
            if tokens < seq_len + 1:
                raise ValueError(
                    f"the {part} part of {where} has {tokens} tokens, too short for one sequence of {seq_len} and "
                    f"its targets; want at least {seq_len + 1}: use more text or a smaller train.seq_len"
                )

    found, parts, words = CorpusCache(cache, source, tokenizer, config, seed).open(check, progress)
    check(found.train_tokens, found.val_tokens)
    facts: dict[str, Any] = asdict(found) | {"source": source.words}  # as it is named now
    return Corpus(
        **facts, train=parts["train"], val=parts["val"], end_of_document=tokenizer.end_of_document, cache=words
    )


def _check_vocabulary(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    if config.tokenizer is None and vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is not that of bytes; use {tokenizer.vocab_size}, or name the tokenizer "
            "with --data.tokenizer"
        )
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is less than the {tokenizer.vocab_size} tokens of {config.tokenizer}; "
            f"use --model.vocab-size {tokenizer.vocab_size}"
        )
    if config.fim_rate and tokenizer.fim is None:
        raise ValueError(
            f"data.fim_rate={config.fim_rate} needs the tokens {' '.join(FIM_TOKENS)}, which {config.tokenizer} does "
            "not have; use a tokenizer.json with them, as python -m dsmini.tokenize makes, or leave data.fim_rate out"
        )
