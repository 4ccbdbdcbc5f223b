"""Text as tokens, made once and stored next to the runs, so that later runs map them into memory.

    CACHE/0123456789abcdef/    the key: a hash of everything the tokens depend on
        train.bin, val.bin     uint8, uint16 or uint32 (little-endian), the smallest that holds the vocabulary
        meta.json              the facts of the corpus, with counts and the SHA-256 of the tokens

An entry is built in a hidden folder next to it and renamed when it is whole, so an entry that exists is complete. The
remains of an interrupted build are never read, and a later build removes them. The cache may be deleted at any time.

Fill-in-the-middle is a document rearranged so that predicting its next token fills a hole in it.

    <fim begin> prefix <fim hole> suffix <fim end> middle <end of document>

Prefix-suffix-middle (PSM), applied to whole documents before they are packed into sequences, to a share of them.
Source: DeepSeek-V3 report, section 4.1, which used a rate of 0.1.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmini.atomic import STALE_AFTER, as_json, finish_folder, lock, partial_folder, remove_leftovers
from dsmini.config import DataConfig
from dsmini.config.fields import build, check_types
from dsmini.data.documents import CHUNK, Piece, ProgressCallback, Reader, Source, Split, lines, measure, split
from dsmini.reading import read_bytes, read_table, refusing
from dsmini.text.tokenizer import Tokenizer

FORMAT = 5
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
    left_out: tuple[str, ...] = ()
    """Names of the files of a folder that are not text, each with the reason."""
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
        self.folder: Path = folder
        self.source: Source = source
        self.tokenizer: Tokenizer = tokenizer
        self.config: DataConfig = config
        self.seed: int = seed
        everything = {
            "format": FORMAT,
            "root": str(source.root.resolve()),  # two folders may hold files of equal names, sizes and times
            "files": [[document.name, document.stored, document.modified] for document in source.documents],
            "val_fraction": config.val_fraction,
            "tokenizer": config.tokenizer and hashlib.sha256(read_bytes(config.tokenizer)).hexdigest(),
            "fim": [config.fim_rate, seed] if config.fim_rate else None,
        }
        self.dtype: np.dtype[Any] = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
        """The smallest unsigned integers that hold every token, little-endian."""
        self.rearranged: int = 0
        """Number of documents that fill-in-the-middle has changed so far."""
        self.entry: Path = folder / hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]

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
            with refusing(f"cannot store the tokenized corpus in {self.folder}", "choose another place with --out"):
                remove_leftovers(self.folder, STALE_AFTER)
                partial = stack.enter_context(partial_folder(self.entry))
            try:
                facts = CorpusFacts(
                    source=self.source.words,
                    files=len(texts),
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
        path = self.folder / ".lock"
        with path.open("a") as file:
            lock(file, path, wait=True)  # else each of two builders might move the other's entry aside
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
