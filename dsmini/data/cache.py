"""A corpus tokenised once: files of token ids, beside the runs, that later runs map into memory.

    CACHE/0123456789abcdef/    the key: a hash of everything the tokens depend on
        train.bin, val.bin     uint8, uint16 or uint32 (little-endian), the smallest that holds the vocabulary
        meta.json              counts, sizes and the SHA-256 of the tokens

An entry is built in a folder of its own beside it and renamed when it is whole, so one that exists was finished.
What an interrupted build left is never read, and removed by a later build. All of it may be deleted at any time.

Memory stays small whatever the size of the corpus: text is read a chunk at a time, and a large document is tokenised
in pieces of about 1 MiB, cut where a line begins with a letter or sign, or else a word. (Byte-pair encodings whose own
splitting of text stops there, such as GPT-2's and DeepSeek's, give the tokens of the uncut text.)
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmini.config import DataConfig
from dsmini.data import fim
from dsmini.data.documents import CHUNK, Piece, Progress, Reader, Source, Split, measure, split
from dsmini.text.tokenizer import Tokenizer

FORMAT = 1
"""Changes whenever the same corpus would be written otherwise."""
_AT_ONCE = 4 * CHUNK
_HASHED_ON_LOAD = 256 << 20
_STALE_AFTER = 3600.0
_SPACE = b" \t\r\n\f\v"


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What an entry's meta.json says."""

    format: int
    files: int
    skipped: int
    """Files that are empty or not text."""
    split: str
    train_tokens: int
    val_tokens: int
    val_bytes: int
    """Of text, the end of a document counted as one."""
    rearranged: int
    """Documents rearranged for fill-in-the-middle."""
    dtype: str
    sha256: str
    """Of the training tokens followed by the held-out ones."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A whole entry of the cache, mapped into memory."""

    meta: Meta
    train: NDArray[Any]
    val: NDArray[Any]
    words: str
    """Whether it was there, or why it had to be built."""


class Cache:
    """The entries for one source, tokenizer and config in a folder.

    Args:
        seed: of what fill-in-the-middle rearranges.
    """

    def __init__(self, folder: Path, source: Source, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self.folder, self.source, self.tokenizer, self.config, self.seed = folder, source, tokenizer, config, seed
        self.entry = folder / self._key()

    def open(self, check: Callable[[int, int], None], progress: Progress) -> Entry:
        """The entry, built first if it is missing or damaged.

        Args:
            check: called with the numbers of training and held-out tokens before anything is kept; may raise.

        Raises: ValueError for text that cannot be used; OSError where the tokens cannot be written.
        """
        missing, damage = not self.entry.exists(), _damage(self.entry)
        if damage is None:
            words = f"read from {self.entry}, where it was tokenised before"
        else:
            self._build(check, progress)
            again = f"tokenised again into {self.entry}, for {damage}"
            words = f"tokenised once into {self.entry}, read from there next time" if missing else again
        meta = _read_meta(self.entry)
        parts = {part: np.memmap(self.entry / f"{part}.bin", dtype=meta.dtype, mode="r") for part in ("train", "val")}
        return Entry(meta=meta, words=words, **parts)

    def _key(self) -> str:
        tokenizer = self.config.tokenizer
        files = [[document.name, document.stored, document.modified] for document in self.source.documents]
        everything = {
            "format": FORMAT,
            "root": str(self.source.root.resolve()),  # two folders may hold files of equal names, sizes and times
            "files": files,
            "val_fraction": self.config.val_fraction,
            "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
            "fim": [self.config.fim_rate, self.seed] if self.config.fim_rate else None,
        }
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]

    def _build(self, check: Callable[[int, int], None], progress: Progress) -> None:
        texts = measure(self.source, progress)
        parts = split(texts, self.config.val_fraction, whole_characters=self.config.tokenizer is not None)
        if self.config.tokenizer is None:  # known before anything is written; fill-in-the-middle only adds
            check(*(sum(p.stop - p.start + p.ends for p in part) for part in (parts.train, parts.val)))
        rate, sizes = self.config.fim_rate, [piece.stop - piece.start for piece in parts.train]
        if rate and min(sizes, default=0) > fim.LARGEST:
            raise ValueError(
                f"data.fim_rate={rate} would rearrange nothing: the {len(sizes)} training documents of "
                f"{self.source.words} are all larger than {fim.LARGEST:,} bytes; cut them into more files, or leave "
                "data.fim_rate out"
            )
        partial = self._new_partial()
        try:
            meta = self._write(partial, len(texts), parts, progress)
            check(meta.train_tokens, meta.val_tokens)
            with (partial / "meta.json").open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(meta), indent=2) + "\n")
                _to_disk(file)
            self._keep(partial)
        except OSError as error:
            raise OSError(f"cannot tokenise the corpus into {self.folder}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _new_partial(self) -> Path:
        """A folder to build in; those that builds left which nobody has touched for an hour are removed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob("*.partial-*"):
                if time.time() - max(path.stat().st_mtime for path in (old, *old.iterdir())) > _STALE_AFTER:
                    shutil.rmtree(old, ignore_errors=True)
            return Path(tempfile.mkdtemp(prefix=f"{self.entry.name}.partial-", dir=self.folder))
        except FileNotFoundError:  # another build has just ended
            return self._new_partial()
        except OSError as error:
            raise ValueError(
                f"cannot keep the tokenised corpus in {self.folder}: {error.strerror}; choose another place with --out"
            ) from None

    def _keep(self, partial: Path) -> None:
        """Make the finished partial the entry, in the place of a damaged one, unless another process was first."""
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else each of two builders might move the other's entry aside
            if _damage(self.entry) is None:
                return
            if self.entry.exists():
                aside = Path(tempfile.mkdtemp(prefix=f"{self.entry.name}.partial-", dir=self.folder))
                self.entry.rename(aside / "damaged")
                shutil.rmtree(aside, ignore_errors=True)
            partial.rename(self.entry)

    def _write(self, folder: Path, files: int, parts: Split, progress: Progress) -> Meta:
        vocab_size = self.tokenizer.vocab_size
        dtype = "<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4"
        digest = hashlib.sha256()
        reader = Reader([*parts.train, *parts.val], "tokenising", progress)
        tokens: dict[str, int] = {}
        rearranged: list[str] = []
        for name, pieces, rate in (("train", parts.train, self.config.fim_rate), ("val", parts.val, 0.0)):
            tokens[name] = 0
            with (folder / f"{name}.bin").open("wb") as file:
                for ids in self._encode(self._items(pieces, rate, reader, rearranged)):
                    data = ids.astype(dtype, copy=False).data
                    file.write(data)
                    digest.update(data)
                    tokens[name] += len(ids)
                _to_disk(file)
        return Meta(
            format=FORMAT,
            files=files,
            skipped=len(self.source.documents) - files,
            split=parts.words,
            train_tokens=tokens["train"],
            val_tokens=tokens["val"],
            val_bytes=sum(piece.stop - piece.start + piece.ends for piece in parts.val),
            rearranged=len(rearranged),
            dtype=dtype,
            sha256=digest.hexdigest(),
        )

    def _items(self, pieces: list[Piece], rate: float, reader: Reader, rearranged: list[str]) -> Iterator[bytes | int]:
        """Texts to be tokenised each for itself, and the tokens between them, in order. Adds to `rearranged` the
        names of the documents that fill-in-the-middle changed."""
        for piece in pieces:
            if rate and piece.stop - piece.start <= fim.LARGEST:
                text = b"".join(reader.chunks(piece))
                arranged = fim.arrange(text, piece.document.name, rate, self.seed, self.tokenizer)
                rearranged += [] if arranged is None else [piece.document.name]
                yield from arranged or [text]
            else:
                yield from lines(reader.chunks(piece))
            if piece.ends:
                yield self.tokenizer.end_of_document

    def _encode(self, items: Iterator[bytes | int]) -> Iterator[NDArray[Any]]:
        """Their tokens, several texts at once."""
        waiting: list[bytes | int] = []
        size = 0
        for item in items:
            waiting.append(item)
            size += len(item) if isinstance(item, bytes) else 1
            if size >= _AT_ONCE:
                yield self._encode_now(waiting)
                waiting, size = [], 0
        if waiting:
            yield self._encode_now(waiting)

    def _encode_now(self, items: list[bytes | int]) -> NDArray[Any]:
        texts = iter(self.tokenizer.encode_all([item for item in items if isinstance(item, bytes)]))
        return np.concatenate([next(texts) if isinstance(item, bytes) else np.array([item]) for item in items])


def lines(chunks: Iterator[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """The same text in pieces that end where a line or a word does.

    Args:
        chunks: of at most `size` bytes; so are most pieces, and none is as long as two.
    """
    rest = b""
    for chunk in chunks:
        text = rest + chunk
        at = len(text) if len(text) < size else _last_border(text)
        if len(text) >= size:
            yield text[:at]
            text = text[at:]
        rest = text
    if rest:
        yield rest


def _last_border(text: bytes) -> int:
    """Behind the last single line break, or before the last single space; without one where a character begins."""
    for separator, behind in ((b"\n", 1), (b" ", 0)):
        at = len(text) - 1
        for _ in range(1000):
            at = text.rfind(separator, 1, at)
            if at < 0:
                break
            if text[at - 1] not in _SPACE and text[at + 1] not in _SPACE:
                return at + behind
    at = len(text)
    while at > len(text) - 4 and text[at - 1] & 0xC0 == 0x80:
        at -= 1
    return at - 1 if text[at - 1] >= 0xC0 else len(text)


def forget(tokens: NDArray[Any]) -> None:
    """Let go of the pages of a mapped file that were read: they stay in the system's cache, but no longer count as
    this process's memory, which would otherwise grow to the size of the corpus."""
    if isinstance(tokens.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tokens.base.madvise(mmap.MADV_DONTNEED)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_meta(entry: Path) -> Meta:
    return Meta(**json.loads((entry / "meta.json").read_text(encoding="utf-8")))


def _damage(entry: Path) -> str | None:
    """Why an entry cannot be used; None if it can. The tokens are hashed where that takes less than a second."""
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
