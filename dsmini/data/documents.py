"""Where text comes from: a file, a folder of files, plain or .gz, or Python's own library; and what is held out of it.

Nothing here holds more than a chunk of a file. Reading is done twice, once to measure and to find what is not text,
once by whoever wants the text: which documents are held out depends on the size of all of them.
"""

import dataclasses
import gzip
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20
"""Bytes read at a time."""

# Tests, generated tables and packages that not every Python carries: out, so that the corpus is alike everywhere.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip"),
    *("encodings", "pydoc_data", "distutils", "__pycache__"),
}

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes on disk of how many are through."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress of library use."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file as a document."""

    name: str
    """Relative to the corpus, without .gz."""
    path: Path
    stored: int
    """Bytes on disk."""
    modified: int
    """Nanoseconds."""
    size: int = 0
    """Bytes of text, once measured."""

    def chunks(self, start: int = 0) -> Iterator[tuple[bytes, int]]:
        """The text from byte `start` on, and with each chunk how many bytes on disk were read so far.

        Raises: ValueError for a file that cannot be read, or is a damaged .gz.
        """
        try:
            with self.path.open("rb") as stored:
                text = gzip.GzipFile(fileobj=stored) if self.path.name.endswith(".gz") else stored
                text.seek(start)
                while chunk := text.read(CHUNK):
                    yield chunk, stored.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path} is a damaged .gz file: {error}; fetch it again, or remove it") from None
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror}; check its permissions") from None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a corpus, by document name, not yet read."""

    root: Path
    words: str
    kind: str
    """file, folder or library."""
    documents: list[Document]

    def describe(self, texts: int) -> str:
        """In words, once it is known how many of the files are text."""
        return f"{self.words} ({texts} files)" if self.kind == "folder" else self.words


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes start to stop of a document; `ends`: with the end of the document behind them."""

    document: Document
    start: int
    stop: int
    ends: bool

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """As those of the document.

        Raises: ValueError if the file no longer has the size that was measured.
        """
        at = self.start
        for chunk, stored in self.document.chunks(self.start):
            yield chunk[: self.stop - at], stored
            at += len(chunk)
            if at >= self.stop and self.stop < self.document.size:
                return
        if at != self.document.size:
            raise ValueError(f"{self.document.path} changed while it was read; run the command again")


class Reader:
    """Reads pieces one after the other, and tells how far it is."""

    def __init__(self, pieces: Sequence[Piece], what: str, progress: Progress) -> None:
        self._what, self._progress = what, progress
        self._done, self._total = 0, sum(piece.document.stored for piece in pieces)

    def chunks(self, piece: Piece) -> Iterator[bytes]:
        """The text of the next piece."""
        for chunk, stored in piece.chunks():
            self._progress(self._what, self._done + stored, self._total)
            yield chunk
        self._done += piece.document.stored


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is trained on and what is held out."""

    train: list[Piece]
    val: list[Piece]
    words: str
    """How the held-out part was chosen."""


def find(path: Path | None, leave_out: Path | None = None) -> Source:
    """The files of a corpus: all visible ones below a folder, but for those below leave_out and those of training runs
    and tokenised corpora, which would change with every run.

    Raises: ValueError for a path that is neither a file nor a folder.
    """
    if path is None:
        return _standard_library()
    try:
        exists = path.exists()
    except OSError as error:
        raise ValueError(f"data.path={path} cannot be a path: {error.strerror}; name a text file or a folder") from None
    if not exists:
        raise ValueError(f"data.path={path} does not exist; name a text file or a folder of text files")
    if path.is_file():
        return Source(root=path.parent, words=str(path), kind="file", documents=[_document(path.parent, path)])
    if not path.is_dir():
        raise ValueError(f"data.path={path} is neither a file nor a folder; name a text file or a folder of text files")
    documents = [_document(path, p) for p in _files(path, leave_out and leave_out.resolve())]
    documents.sort(key=lambda document: (document.name, document.path))
    return Source(root=path, words=str(path), kind="folder", documents=documents)


def _files(root: Path, leave_out: Path | None) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        here = Path(folder)
        if here != root and _made_by_training({*inner, *names}):
            inner.clear()
            continue
        inner[:] = [name for name in inner if not name.startswith(".") and (here / name).resolve() != leave_out]
        yield from (here / name for name in names if not name.startswith(".") and (here / name).is_file())


def _made_by_training(names: set[str]) -> bool:
    """Whether a folder with these in it is a training run or a tokenised corpus."""
    run = "config.toml" in names and not names.isdisjoint(("corpus.json", "metrics.jsonl", "checkpoints"))
    return run or {"meta.json", "train.bin", "val.bin"} <= names


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_STDLIB]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        documents += [_document(root, path) for path in paths if path.is_file()]
    if not documents:
        raise ValueError(f"this Python has no library source in {root}; name a text with --data.path FILE_OR_FOLDER")
    documents.sort(key=lambda document: document.name)
    words = f"Python {sysconfig.get_python_version()}'s standard library"
    return Source(root=root, words=words, kind="library", documents=documents)


def _document(root: Path, path: Path) -> Document:
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    name = path.relative_to(root).as_posix().removesuffix(".gz")
    return Document(name=name, path=path, stored=stat.st_size, modified=stat.st_mtime_ns)


def measure(source: Source, progress: Progress = silent) -> list[Document]:
    """The documents that are text, with their sizes.

    Raises: ValueError if there is none.
    """
    total, done = sum(document.stored for document in source.documents), 0
    texts = []
    for document in source.documents:
        size, binary = 0, False
        for chunk, stored in document.chunks():
            size += len(chunk)
            progress("reading", done + stored, total)
            if b"\0" in chunk and source.kind != "library":
                binary = True
                break
        done += document.stored
        if source.kind == "file" and binary:
            raise ValueError(f"data.path={document.path} holds NUL bytes, so it is not text; name a text file")
        if source.kind == "file" and not size:
            raise ValueError(f"data.path={document.path} is empty; name a file with text in it")
        if source.kind == "library" or (size and not binary):
            texts.append(dataclasses.replace(document, size=size))
    if not texts:
        raise ValueError(
            f"data.path={source.root} has no text: {len(source.documents)} files, all empty or not text; "
            "name a folder with text files"
        )
    return texts


def split(documents: Sequence[Document], val_fraction: float, whole_characters: bool) -> Split:
    """Hold out whole documents, picked by the hash of their names, up to the fraction; if they are too few or too
    uneven for that, hold out the end of the whole text.

    Args:
        whole_characters: move that cut up to three bytes on, to where a UTF-8 character begins.
    """
    budget = int(val_fraction * sum(document.size + 1 for document in documents))
    held_out: set[int] = set()
    size = 0
    for i in sorted(range(len(documents)), key=lambda i: _name_hash(documents[i].name)):
        if size + documents[i].size + 1 <= budget:
            held_out.add(i)
            size += documents[i].size + 1
    if size >= 0.8 * budget and held_out:
        whole = [Piece(document=document, start=0, stop=document.size, ends=True) for document in documents]
        return Split(
            train=[piece for i, piece in enumerate(whole) if i not in held_out],
            val=[piece for i, piece in enumerate(whole) if i in held_out],
            words=f"{len(held_out)} whole files",
        )
    return _cut(documents, val_fraction, whole_characters)


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _cut(documents: Sequence[Document], val_fraction: float, whole_characters: bool) -> Split:
    """The documents with an end between each two, cut once."""
    cut = int((1 - val_fraction) * (sum(document.size + 1 for document in documents) - 1))
    train: list[Piece] = []
    val: list[Piece] = []
    at = 0
    for document in documents:
        size, ends = document.size, document is not documents[-1]
        here = min(max(cut - at, 0), size + ends)
        if whole_characters and 0 < here < size:
            here += _continuation_bytes(document, here)
        if here:
            train.append(Piece(document=document, start=0, stop=min(here, size), ends=here > size))
        if here < size + ends:
            val.append(Piece(document=document, start=min(here, size), stop=size, ends=ends))
        at += size + 1
    return Split(train=train, val=val, words=f"the last {val_fraction:.0%} of the text")


def _continuation_bytes(document: Document, at: int) -> int:
    """How many bytes from here on, at most 3, belong to a character that began before."""
    rest = Piece(document=document, start=at, stop=min(at + 3, document.size), ends=False)
    following = b"".join(chunk for chunk, _ in rest.chunks())
    return next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
