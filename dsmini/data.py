"""The corpus: text files read as tokens, split by whole files, and cut into batches.

The default corpus is real text that every machine has: the source code of Python's own standard library.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsmini.config import DataConfig
from dsmini.tokenizer import ByteTokenizer

# Tests, generated tables and packages that not every Python carries: out, so that the corpus is alike everywhere.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip"),
    *("encodings", "pydoc_data", "distutils", "__pycache__"),
}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of the training and the held-out text, and where they are from. Documents are separated by a NUL."""

    train: NDArray[np.uint8]
    val: NDArray[np.uint8]
    source: str
    """What was read, in words."""
    files: int
    skipped: int
    """Files of a folder that were left out because they are not text."""
    split: str
    """How the held-out part was chosen, in words."""
    sha256: str
    """Of the training tokens followed by the held-out ones."""

    def describe(self) -> dict[str, str | int]:
        """What a run folder keeps of the corpus."""
        return {
            "source": self.source,
            "files": self.files,
            "skipped": self.skipped,
            "split": self.split,
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "sha256": self.sha256,
        }

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets [batch_size, seq_len] of a step: random windows that depend on seed and step alone."""
        starts = np.random.default_rng((seed, step)).integers(len(self.train) - seq_len, size=batch_size)
        windows = np.stack([self.train[start : start + seq_len + 1] for start in starts])
        both = torch.from_numpy(windows).long()
        return both[:, :-1], both[:, 1:]

    def windows(self, seq_len: int, at_most: int | None = None) -> tuple[Tensor, Tensor]:
        """The held-out split in windows [n, seq_len] and their targets: each token scored once, but for a tail that
        fills no window. Or, for a quick look, about at_most tokens of it in windows spread evenly."""
        n = (len(self.val) - 1) // seq_len
        tokens = torch.from_numpy(self.val[: n * seq_len + 1].astype(np.int64))
        x, y = tokens[:-1].view(n, seq_len), tokens[1:].view(n, seq_len)
        if at_most is not None and at_most < n * seq_len:
            rows = torch.linspace(0, n - 1, max(1, at_most // seq_len)).round().long()
            x, y = x[rows], y[rows]
        return x, y


def load_corpus(config: DataConfig, seq_len: int, vocab_size: int) -> Corpus:
    """Read the corpus of a run.

    Raises: ValueError for a path that is missing, unreadable, empty, not text, or too short for one
        sequence in each part, and for a vocabulary that is not the tokenizer's.
    """
    if vocab_size != ByteTokenizer.vocab_size:
        raise ValueError(f"model.vocab_size={vocab_size} is not that of bytes; use {ByteTokenizer.vocab_size}")
    if config.path is None:
        source, documents, skipped = _standard_library()
    else:
        source, documents, skipped = _read(config.path)
    train, val, split = _split(documents, config.val_fraction)
    for part, tokens in (("training", train), ("held-out", val)):
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"the {part} part of {source} has {len(tokens)} tokens, too short for one sequence of {seq_len} and "
                f"its targets; want at least {seq_len + 1}: use more text or a smaller train.seq_len"
            )
    digest = hashlib.sha256(train)
    digest.update(val)
    return Corpus(
        train=np.frombuffer(train, dtype=np.uint8),
        val=np.frombuffer(val, dtype=np.uint8),
        source=source,
        files=len(documents),
        skipped=skipped,
        split=split,
        sha256=digest.hexdigest(),
    )


Documents = dict[str, bytes]
"""Text by its name, in order."""


def _standard_library() -> tuple[str, Documents, int]:
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root) for p in root.rglob("*.py") if p.is_file()]
    wanted = sorted(name.as_posix() for name in names if not _NOT_STDLIB & set(name.parts))
    if not wanted:
        raise ValueError(f"this Python has no library source in {root}; name a text with --data.path FILE_OR_FOLDER")
    version = sysconfig.get_python_version()
    return f"Python {version}'s standard library", {name: (root / name).read_bytes() for name in wanted}, 0


def _read(path: Path) -> tuple[str, Documents, int]:
    try:
        exists = path.exists()
    except OSError as error:
        raise ValueError(f"data.path={path} cannot be a path: {error.strerror}; name a text file or a folder") from None
    if not exists:
        raise ValueError(f"data.path={path} does not exist; name a text file or a folder of text files")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"data.path={path} is neither a file nor a folder; name a text file or a folder of text files")
    if path.is_file():
        text = _read_file(path)
        if not text:
            raise ValueError(f"data.path={path} is empty; name a file with text in it")
        if b"\0" in text:
            raise ValueError(f"data.path={path} holds NUL bytes, so it is not text; name a text file")
        return str(path), {path.name: text}, 0
    found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    visible = [name for name in found if not any(part.startswith(".") for part in name.split("/"))]
    texts = {name: _read_file(path / name) for name in visible}
    documents = {name: text for name, text in texts.items() if text and b"\0" not in text}
    if not documents:
        raise ValueError(
            f"data.path={path} has no text: {len(visible)} files, all empty or not text; name a folder with text files"
        )
    return f"{path} ({len(documents)} files)", documents, len(texts) - len(documents)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check its permissions") from None


def _split(documents: Documents, val_fraction: float) -> tuple[bytes, bytes, str]:
    """Hold out whole documents, picked by the hash of their names, up to the fraction; if they are
    too few or too uneven for that, hold out the end of the whole text."""
    budget = int(val_fraction * sum(len(text) + 1 for text in documents.values()))
    held_out: set[str] = set()
    size = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()):
        if size + len(documents[name]) + 1 <= budget:
            held_out.add(name)
            size += len(documents[name]) + 1
    if size >= 0.8 * budget and held_out:
        train = b"".join(text + b"\0" for name, text in documents.items() if name not in held_out)
        val = b"".join(documents[name] + b"\0" for name in documents if name in held_out)
        return train, val, f"{len(held_out)} whole files"
    text = b"\0".join(documents.values())
    cut = len(text) - int(val_fraction * len(text))
    return text[:cut], text[cut:], f"the last {val_fraction:.0%} of the text"
