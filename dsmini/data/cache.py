"""A corpus tokenized once: files of token ids, next to the runs, that later runs map into memory.

    CACHE/0123456789abcdef/    the key: a hash of everything the tokens depend on
        train.bin, val.bin     uint8, uint16 or uint32 (little-endian), the smallest that holds the vocabulary
        meta.json              the facts of the corpus, with counts and the SHA-256 of the tokens

An entry is built in a hidden folder next to it and renamed when it is whole, so an entry that exists is complete. The
remains of an interrupted build are never read, and a later build removes them. The cache may be deleted at any time.
"""

import fcntl
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

from dsmini.atomic import STALE_AFTER, as_json, finish_folder, partial_folder, remove_leftovers
from dsmini.config import DataConfig
from dsmini.config.fields import build, check_types
from dsmini.data import fim
from dsmini.data.documents import CHUNK, Piece, ProgressCallback, Reader, Source, measure
from dsmini.data.split import Split, split
from dsmini.data.texts import lines
from dsmini.reading import read_bytes, read_table
from dsmini.text.tokenizer import Tokenizer

FORMAT = 3
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


@dataclass(frozen=True, kw_only=True)
class Meta(CorpusFacts):
    """The content of an entry's meta.json."""

    dtype: str

    def __post_init__(self) -> None:
        check_types(self)


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
        self.rearranged = 0
        """Number of documents that fill-in-the-middle has changed so far."""
        self.entry = folder / hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]

    def open(
        self, check: Callable[[int, int], None], progress: ProgressCallback
    ) -> tuple[Meta, Mapping[str, NDArray[Any]], str]:
        """Return the entry, built first if it is missing or damaged: its facts, both parts mapped into memory, and a
        sentence that says it was there, or why it had to be built.

        Args:
            check: called with the numbers of training and held-out tokens before anything is stored; may raise.

        Raises: ValueError for text that cannot be used; OSError where the tokens cannot be written.
        """
        missing, damage = not self.entry.exists(), _damage(self.entry)
        if damage is None:
            words = f"read from {self.entry}, where it was tokenized before"
        else:
            self._build(check, progress)
            again = f"tokenized again into {self.entry}, for {damage}"
            words = f"tokenized once into {self.entry}, read from there next time" if missing else again
        meta = _read_meta(self.entry)
        parts = {part: np.memmap(self.entry / f"{part}.bin", dtype=meta.dtype, mode="r") for part in ("train", "val")}
        return meta, parts, words

    def _build(self, check: Callable[[int, int], None], progress: ProgressCallback) -> None:
        texts, left_out = measure(self.source, progress)
        parts = split(texts, self.config.val_fraction, whole_characters=self.config.tokenizer is not None)
        if self.config.tokenizer is None:  # known before anything is written; fill-in-the-middle only adds
            check(*(sum(p.stop - p.start + p.ends for p in part) for part in (parts.train, parts.val)))
        self._check_fim(parts)
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
                about = {
                    "source": self.source.describe(len(texts)),
                    "files": len(texts),
                    "skipped": len(left_out),
                    "left_out": tuple(left_out),
                    "not_utf8": tuple(document.name for document in texts if not document.utf8),
                }
                meta = self._write(partial, parts, about, progress)
                check(meta.train_tokens, meta.val_tokens)
                (partial / "meta.json").write_text(as_json(asdict(meta)), encoding="utf-8")
                self._keep(partial)
            except OSError as error:
                raise OSError(f"cannot tokenize the corpus into {self.folder}: {error.strerror or error}") from None

    def _check_fim(self, parts: Split) -> None:
        rate, sizes = self.config.fim_rate, [piece.stop - piece.start for piece in parts.train]
        if rate and min(sizes, default=0) > fim.LARGEST:
            raise ValueError(
                f"data.fim_rate={rate} would rearrange nothing: the {len(sizes)} training documents of "
                f"{self.source.words} are all larger than {fim.LARGEST:,} bytes; cut them into more files, or leave "
                "data.fim_rate out"
            )

    def _keep(self, partial: Path) -> None:
        """Rename the finished folder to the entry, replacing a damaged one, unless another process was first."""
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else each of two builders might move the other's entry aside
            if _damage(self.entry) is not None:
                finish_folder(partial, self.entry, replace=True)

    def _write(self, folder: Path, parts: Split, about: dict[str, Any], progress: ProgressCallback) -> Meta:
        """Write the tokens of both parts into a folder, and return the content of its meta.json."""
        dtype = token_dtype(self.tokenizer.vocab_size)
        digest = hashlib.sha256()
        reader = Reader([*parts.train, *parts.val], "tokenizing", progress)
        tokens: dict[str, int] = {}
        for name, pieces, rate in (("train", parts.train, self.config.fim_rate), ("val", parts.val, 0.0)):
            tokens[name] = 0
            with (folder / f"{name}.bin").open("wb") as file:
                for ids in self._ids(self._items(pieces, reader, rate)):
                    data = ids.astype(dtype, copy=False).data
                    file.write(data)
                    digest.update(data)
                    tokens[name] += len(ids)
        return Meta(
            **about,
            split=parts.words,
            train_tokens=tokens["train"],
            val_tokens=tokens["val"],
            val_bytes=sum(piece.stop - piece.start + piece.ends for piece in parts.val),
            rearranged=self.rearranged,
            sha256=digest.hexdigest(),
            dtype=dtype,
        )

    def _items(self, pieces: Sequence[Piece], reader: Reader, fim_rate: float) -> Iterator[bytes | int]:
        """Yield the texts to be tokenized each for itself, and the tokens between them, in order."""
        for piece in pieces:
            if fim_rate and piece.stop - piece.start <= fim.LARGEST:
                text = b"".join(reader.chunks(piece))
                arranged = fim.arrange(text, piece.document.name, fim_rate, self.seed, self.tokenizer)
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


def token_dtype(vocab_size: int) -> str:
    """Return numpy's name of the smallest unsigned integer that holds every token, little-endian."""
    if vocab_size <= 1 << 8:
        return "<u1"
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def forget(tokens: NDArray[Any]) -> None:
    """Release the pages of a mapped file that were read.

    They stay in the system's cache, and no longer count as memory of this process, which would grow to the size of the
    corpus.
    """
    if isinstance(tokens.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tokens.base.madvise(mmap.MADV_DONTNEED)


def _read_meta(entry: Path) -> Meta:
    return build(Meta, read_table(entry / "meta.json"), "meta.json", "")


def _damage(entry: Path) -> str | None:
    """Return why an entry cannot be used; None if it can."""
    if not entry.exists():
        return "it is not there"
    try:
        meta = _read_meta(entry)
        digest, total = hashlib.sha256(), 0
        for part, count in (("train", meta.train_tokens), ("val", meta.val_tokens)):
            size, want = (entry / f"{part}.bin").stat().st_size, count * np.dtype(meta.dtype).itemsize
            if size != want:
                return f"{entry / part}.bin had {size:,} bytes, want {want:,}"
            total += size
        if total <= _HASHED_ON_LOAD:
            for part in ("train", "val"):
                digest.update((entry / f"{part}.bin").read_bytes())
            if digest.hexdigest() != meta.sha256:
                return f"the tokens in {entry} were not those of its meta.json"
    except (OSError, ValueError, TypeError) as error:
        return f"{entry} could not be read ({error})"
    return None
