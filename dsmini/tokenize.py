"""python -m dsmini.tokenize: train a byte-pair encoding on a corpus.

Usage, then examples:

    python -m dsmini.tokenize [FILE_OR_FOLDER] [FLAGS]

    python -m dsmini.tokenize book.txt --vocab-size 1024
    python -m dsmini.tokenize notes --out notes.json
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsmini.atomic import try_writing, write_text
from dsmini.config import DataConfig
from dsmini.config.fields import require
from dsmini.console.command import interruptible, run
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress, patience
from dsmini.data.documents import find, measure, notes, read_first, read_texts, split
from dsmini.reading import is_there, refusing
from dsmini.text.tokenizer import SMALLEST, SPECIAL_TOKENS, BPETokenizer, train_bpe

LARGEST = 1_000_000
"""Largest vocabulary."""
MEASURED = 8 << 20
"""Number of bytes of held-out text that are tokenized to measure the bytes per token."""


@dataclass(frozen=True, kw_only=True)
class TokenizeCommand:
    """Train a tokenizer on a text: a byte-pair encoding over bytes with DeepSeek's way of splitting words.

    It learns from the documents that python -m dsmini.train would train on, without those held out. The result is a
    tokenizer.json of the tokenizers library, for --data.tokenizer.
    """

    corpus: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE_OR_FOLDER]")] = None
    """A text file, or a folder of them, plain or .gz. Left out: the source code of Python's own standard library."""
    vocab_size: int = 4096
    """Number of token ids, with the special tokens and the 256 bytes."""
    out: Path = Path("tokenizer.json")
    """The file to write; it must not exist."""
    val_fraction: float = 0.1
    """Share of the corpus that training holds out, as in --data.val-fraction."""
    json: bool = False
    """Print the figures as a line of JSON, and everything else to the standard error."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(TokenizeCommand, "dsmini.tokenize", args)
    console = Console(stderr=command.json)
    config = DataConfig(path=command.corpus, val_fraction=command.val_fraction)
    source = find(config.path)
    _check(command)
    with Progress(console, label="the corpus", unit="bytes") as progress:
        documents, left_out = measure(source, progress.stage)
        parts = split(documents, config.val_fraction, whole_characters=True)
        held_out = read_first(parts.val, MEASURED)
        short = f"{source.words} is too short to hold out a part of it; use more text or a larger --val-fraction"
        require(bool(held_out), short)
        texts = read_texts(parts.train, "counting pairs in", progress.stage)
        with patience(console, f"finding {command.vocab_size:,} tokens"):
            content = interruptible(partial(train_bpe, texts, command.vocab_size))
        write_text(command.out, content)
    tokenizer = BPETokenizer(command.out)
    with patience(console, "tokenizing held-out text"):
        tokens = sum(map(len, interruptible(partial(tokenizer.encode_all, held_out))))
    nbytes, size = sum(map(len, held_out)), sum(document.size for document in documents)
    per_token = nbytes / tokens
    not_utf8 = [document.name for document in documents if not document.utf8]
    train = ["python", "-m", "dsmini.train", "--data.tokenizer", str(command.out)]
    train += ["--model.vocab-size", str(tokenizer.vocab_size)]
    train += [] if command.corpus is None else ["--data.path", str(command.corpus)]
    if command.val_fraction != DataConfig().val_fraction:
        train += ["--data.val-fraction", str(command.val_fraction)]
    for line in (
        *notes(left_out, not_utf8, "the figures of --json", as_bytes=False),
        f"corpus     {source.words}: {len(documents):,} document{'s' * (len(documents) != 1)}, {size:,} bytes",
        f"tokenizer  {command.out}, {tokenizer.vocab_size:,} tokens",
        f"held out   {nbytes:,} bytes are {tokens:,} tokens: {per_token:.2f} bytes a token, where bytes have 1.00",
        "",
        f"Train with it: {shlex.join(train)}",
    ):
        say(console, line)
    if command.json:
        figures = {"tokenizer": str(command.out), "vocab_size": tokenizer.vocab_size, "documents": len(documents)}
        figures |= {"bytes": size, "held_out_bytes": nbytes, "held_out_tokens": tokens}
        print(json.dumps({**figures, "bytes_per_token": per_token, "left_out": left_out, "not_utf8": not_utf8}))
    return 0


def _check(command: TokenizeCommand) -> None:
    if not SMALLEST <= command.vocab_size <= LARGEST:
        raise ValueError(
            f"--vocab-size {command.vocab_size} is not from {SMALLEST} (the bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens) to {LARGEST}; use for example 4096"
        )
    if is_there(command.out):
        raise ValueError(f"--out {command.out} exists; choose a new name, or remove it")
    if not command.out.parent.is_dir():
        raise ValueError(f"there is no folder {command.out.parent} for --out {command.out}; make it first")
    with refusing(f"--out {command.out} cannot be written", "choose another place"):
        try_writing(command.out)


if __name__ == "__main__":
    run(main)
