"""The sources of text: a file, a folder of files, plain or .gz, or Python's own library.

No function here holds more than a chunk of a file. Files are read twice: once to measure them and to find those that
are not text, once for the text itself. The held-out documents depend on the sizes of all.

Texts are read in pieces that end where a line or a word does, so that no more than a piece is held.
Byte-pair encodings whose own splitting of text stops at such places, such as GPT-2's and DeepSeek's, give the tokens of
the uncut text.

The held-out part is whole documents picked by their names, or else the end of the text.
"""

import codecs
import dataclasses
import gzip
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmini.reading import is_there, listed, open_regular, read_bytes, refusing

NAMED = 3
"""Number of files that are named where some are left out."""
CHUNK = 1 << 20
"""Bytes read at a time."""

# bytes that begin a text of another encoding; those of UTF-32 begin with those of UTF-16
MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}

# Tests, generated tables, and packages that some Pythons lack: without them the corpus is the same everywhere.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip"),
    *("encodings", "pydoc_data", "distutils", "__pycache__"),
}

ProgressCallback = Callable[[str, int, int], None]
"""Function that is told the name of the work, and the bytes on disk that are done, and their total."""


def silent(what: str, done: int, total: int) -> None:
    """Ignore progress, as library use does."""


class DamagedError(ValueError):
    """A .gz file that is cut short or no such file."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file as a document."""

    name: str
    """Path relative to the corpus, without .gz."""
    path: Path
    stored: int
    """Bytes on disk."""
    modified: tuple[int, int]
    """Times of the last change, in nanoseconds: the one that tools may set, and the system's own."""
    inode: tuple[int, int] = (0, 0)
    """Device and number of the file. A link has those of its target."""
    size: int = 0
    """Bytes of text, once measured."""
    utf8: bool = True
    """True if the text is UTF-8, once measured."""

    def chunks(self, start: int = 0) -> Iterator[tuple[bytes, int]]:
        """Yield the text from byte `start` on, and with each chunk how many bytes on disk were read so far.

        Raises: ValueError for a file that cannot be read; DamagedError for a damaged .gz.
        """
        with open_regular(self.path) as stored, refusing(f"cannot read {self.path}", "check its permissions"):
            text = gzip.GzipFile(fileobj=stored) if self.path.name.endswith(".gz") else stored
            try:
                text.seek(start)
                while chunk := text.read(CHUNK):
                    yield chunk, stored.tell()
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                words = f"{self.path} is a damaged .gz file: {error}; fetch it again, or remove it"
                raise DamagedError(words) from None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a corpus, by document name, not yet read."""

    root: Path
    words: str
    kind: str
    """file, folder or library."""
    documents: list[Document]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes start to stop of a document; `ends`: followed by the end of the document."""

    document: Document
    start: int
    stop: int
    ends: bool

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """Yield the text of the piece, as Document.chunks does.

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
    """Reads pieces one after the other, and reports its progress."""

    def __init__(self, pieces: Sequence[Piece], what: str, progress: ProgressCallback) -> None:
        self._what, self._progress = what, progress
        self._done, self._total = 0, sum(piece.document.stored for piece in pieces)

    def chunks(self, piece: Piece) -> Iterator[bytes]:
        """Yield the text of the next piece."""
        for chunk, stored in piece.chunks():
            self._progress(self._what, self._done + stored, self._total)
            yield chunk
        self._done += piece.document.stored


def find(path: Path | None, leave_out: Path | None = None, tokenizer: Path | None = None) -> Source:
    """Find the files of a corpus: one file, or all visible ones below a folder. Links are followed, each file once.

    Files below leave_out are skipped, and so are training runs and tokenized corpora, which change with every run.

    Args:
        tokenizer: file of the tokenizer, which is skipped too, and so are copies of it.

    Raises: ValueError for a path that is neither a file nor a folder, and for a folder that may not be looked into.
    """
    if path is None:
        return _standard_library()
    if not is_there(path):
        raise ValueError(f"data.path={path} does not exist; name a text file or a folder of text files")
    if path.is_file():
        return Source(root=path.parent, words=str(path), kind="file", documents=[_document(path.parent, path)])
    if not path.is_dir():
        raise ValueError(f"data.path={path} is neither a file nor a folder; name a text file or a folder of text files")
    documents = [_document(path, p) for p in _files(path, leave_out and leave_out.resolve())]
    if tokenizer is not None:
        content = read_bytes(tokenizer)
        documents = [d for d in documents if d.stored != len(content) or read_bytes(d.path) != content]
    files: dict[Any, Document] = {}
    for document in sorted(documents, key=lambda document: (document.name, document.path)):
        packed = document.path.name.endswith(".gz")  # of a link to a blob, its own name alone may say so
        same = document.inode if document.inode[1] else document.path  # some file systems have no numbers
        files.setdefault((same, packed), document)  # by two names it could be trained on and held out
    return Source(root=path, words=str(path), kind="folder", documents=list(files.values()))


def _files(root: Path, leave_out: Path | None) -> Iterator[Path]:
    seen = set[tuple[int, int]]()  # a link may lead to a folder that was looked at, or to one that it lies in
    for folder, inner, names in os.walk(root, onerror=_refuse_unreadable, followlinks=True):
        here = Path(folder)
        place = (stat := here.stat()).st_dev, stat.st_ino
        if place in seen:
            inner.clear()
            continue
        seen.add(place)
        inner.sort()
        if here != root and _made_by_training({*inner, *names}):
            inner.clear()
            continue
        inner[:] = [name for name in inner if not name.startswith(".") and (here / name).resolve() != leave_out]
        try:
            yield from [here / name for name in names if not name.startswith(".") and (here / name).is_file()]
        except OSError as error:
            _refuse_unreadable(error)


def _refuse_unreadable(error: OSError) -> None:
    """Refuse a corpus with a part that may not be looked at: without it the same command trains on another text."""
    raise ValueError(
        f"cannot look at {error.filename}: {error.strerror}; check the permissions of its folder, or move it away"
    ) from None


def _made_by_training(names: set[str]) -> bool:
    """Return whether a folder with these entries is a training run or a tokenized corpus."""
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
    with refusing(f"cannot read {path}", "check its permissions"):
        stat = path.stat()
    name = path.relative_to(root).as_posix().removesuffix(".gz")
    modified, inode = (stat.st_mtime_ns, stat.st_ctime_ns), (stat.st_dev, stat.st_ino)
    return Document(name=name, path=path, stored=stat.st_size, modified=modified, inode=inode)


def measure(source: Source, progress: ProgressCallback = silent) -> tuple[list[Document], list[str]]:
    """Return the documents that are text, with their sizes, and the names of the files that are left out.

    A name has the reason after it: empty, not text, damaged .gz, UTF-16 or UTF-32 for a text of that encoding, or that
    a.txt is there, for a.txt.gz.

    Raises: ValueError if none is text; DamagedError for a single file that is a damaged .gz.
    """
    total, done = sum(document.stored for document in source.documents), 0
    texts: list[Document] = []
    left_out: list[str] = []
    for document in source.documents:
        try:
            measured, fault = _measured(
                document, source.kind == "library", lambda n, before=done: progress("reading", before + n, total)
            )
        except DamagedError:
            if source.kind == "file":
                raise
            measured, fault = document, "damaged .gz"
        done += document.stored
        if not fault and texts and texts[-1].name == document.name:
            left_out.append(f"{document.name}.gz ({document.name} is there)")
        elif not fault:
            texts.append(measured)
        elif source.kind == "file":
            such = f", such as iconv -f {fault} -t UTF-8 makes" if fault.startswith("UTF") else ""
            raise ValueError(f"data.path={document.path} is {fault}; name a text file in UTF-8{such}")
        else:
            left_out.append(f"{document.name} ({fault})")
    if not texts:
        named = f": {listed(left_out, NAMED)}" if left_out else ""
        raise ValueError(
            f"data.path={source.root} has no text: {len(source.documents)} files, all empty or not text{named}; "
            "name a folder with text files"
        )
    return texts, left_out


def _measured(document: Document, trusted: bool, read: Callable[[int], None]) -> tuple[Document, str]:
    """Return a document with its size, and why it is not text; "" if it is. Text has no NUL byte.

    Args:
        trusted: it is text in UTF-8, whatever it holds.
        read: told how many of its bytes on disk are read.
    """
    size, utf8, decoder = 0, True, codecs.getincrementaldecoder("utf-8")()
    for chunk, stored in document.chunks():
        read(stored)
        marks = () if trusted or size else MARKS.items()  # no text in UTF-8 begins so
        if found := next((name for name, begin in marks if chunk.startswith(begin)), None):
            return document, found
        if not trusted and b"\0" in chunk:
            return document, "not text"
        utf8 = utf8 and (trusted or _decodes(decoder, chunk))
        size += len(chunk)
    utf8 = utf8 and _decodes(decoder, b"", final=True)
    return dataclasses.replace(document, size=size, utf8=utf8), "" if size or trusted else "empty"


def _decodes(decoder: codecs.IncrementalDecoder, chunk: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError:
        return False
    return True


def notes(left_out: Sequence[str], not_utf8: Sequence[str], where: str, as_bytes: bool) -> list[str]:
    """Return lines about the files of a corpus that were left out, and about texts that are not UTF-8.

    Bytes hold any text of single bytes, so such files are read, but a model learns two spellings of one letter.

    Args:
        left_out: names with the reason, all of them.
        where: place that names all, for a list that is cut.
        as_bytes: a token is a byte; False: a tokenizer reads characters.
    """

    def first(names: Sequence[str]) -> str:
        return listed(names, NAMED) + (f" (all are in {where})" if len(names) > NAMED else "")

    lines = [f"{len(left_out):,} left out: {first(left_out)}"] if left_out else []
    if not_utf8:
        how = "read byte by byte as they are" if as_bytes else "read with U+FFFD for each other byte"
        fix = "to convert Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE"
        lines.append(f"{len(not_utf8):,} not UTF-8, {how}: {first(not_utf8)}; {fix}")
    return lines


# --- texts in pieces


SIZE = 1 << 16
"""Bytes of a text: the tokenizers library holds 256 of them."""
_SPACE = b" \t\r\n\f\v"


def read_texts(pieces: Sequence[Piece], what: str = "reading", progress: ProgressCallback = silent) -> Iterator[bytes]:
    """Yield the pieces of documents as texts of about SIZE bytes that end where a line or a word does.

    Args:
        what: name of the work, for `progress`.
    """
    reader = Reader(pieces, what, progress)
    for piece in pieces:
        chunks = (chunk[i : i + SIZE] for chunk in reader.chunks(piece) for i in range(0, len(chunk), SIZE))
        yield from lines(chunks, SIZE)


def read_first(pieces: Sequence[Piece], nbytes: int) -> list[bytes]:
    """Return the first texts of documents, up to about this many bytes."""
    taken: list[bytes] = []
    size = 0
    texts = read_texts(pieces)
    while size < nbytes and (text := next(texts, None)) is not None:
        taken.append(text)
        size += len(text)
    return taken


def lines(chunks: Iterator[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """Yield the same text in pieces that end where a line or a word does.

    Args:
        chunks: text in parts of at most `size` bytes. Most pieces are as short, and none is as long as three: the rest
            after a line may be cut at a word, and the rest after that have neither.
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
    """Return the place after the last single line break, or before the last single space, or before a character."""
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


# --- the held-out part


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training part and the held-out part of a corpus."""

    train: list[Piece]
    val: list[Piece]
    words: str
    """Sentence that says how the held-out part was chosen."""


def split(documents: Sequence[Document], val_fraction: float, whole_characters: bool) -> Split:
    """Hold out whole documents, picked by the hash of their names, up to the fraction; if they are too few or too
    uneven for that, hold out the end of the whole text.

    Args:
        whole_characters: move that cut up to three bytes on, to where a UTF-8 character begins.
    """
    budget = int(val_fraction * sum(document.size + 1 for document in documents))
    held_out: set[int] = set()
    size = 0
    hashes = [hashlib.sha256(each.name.encode("utf-8", "surrogateescape")).digest() for each in documents]
    for i in sorted(range(len(documents)), key=hashes.__getitem__):
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
    return cut_once(documents, val_fraction, whole_characters)


def cut_once(documents: Sequence[Document], val_fraction: float, whole_characters: bool) -> Split:
    """Cut the documents, with an end between each two, in one place."""
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
    """Return how many bytes from here on, at most 3, belong to a character that began before."""
    rest = Piece(document=document, start=at, stop=min(at + 3, document.size), ends=False)
    following = b"".join(chunk for chunk, _ in rest.chunks())
    return next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
