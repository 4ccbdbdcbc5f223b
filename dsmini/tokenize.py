"""python -m dsmini.tokenize: train a byte-pair encoding on a corpus."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dsmini.atomic import write_text
from dsmini.config import DataConfig
from dsmini.console import parse, run
from dsmini.data.documents import Piece, Progress, Reader, find, measure, silent
from dsmini.data.split import split
from dsmini.data.tokenising import lines
from dsmini.text.tokenizer import END_TOKENS, FIM_TOKENS, BPETokenizer
from dsmini.training.report import ReadingProgress

# DeepSeek's, in the order of their ids: begin and end of sentence, padding, fill-in-the-middle
SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", END_TOKENS[0], "<｜▁pad▁｜>", *FIM_TOKENS)
SMALLEST = 256 + len(SPECIAL_TOKENS)
LARGEST = 1_000_000
MEASURED = 8 << 20
"""Bytes of held-out text that are tokenised to see how short the encoding makes it."""
PIECE = 1 << 16
"""Bytes of text that the library is given at a time."""

# DeepSeek-V3's: numbers in threes, Chinese and Japanese apart, a sign with its word, signs with line breaks after them
SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True, kw_only=True)
class TokenizeCommand:
    """Train a tokenizer on a text: a byte-pair encoding over bytes with DeepSeek's way of splitting words.

    It learns from the documents that python -m dsmini.train would train on, none of those held out. The result is a
    tokenizer.json of the tokenizers library, for --data.tokenizer.
    """

    corpus: Annotated[Path | None, tyro.conf.Positional] = None
    """A text file, or a folder of them, plain or .gz; left out: the source code of Python's own standard library."""
    vocab_size: int = 4096
    """Number of token ids, special tokens and the 256 bytes included."""
    out: Path = Path("tokenizer.json")
    """Where to write it; must not exist."""
    val_fraction: float = 0.1
    """Share of the corpus that training holds out, as in --data.val-fraction."""
    json: bool = False
    """Print the figures as a line of JSON, and all else to the standard error."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    command = parse(TokenizeCommand, "tokenize", args)
    console = Console(stderr=command.json)
    _check(command)
    config = DataConfig(path=command.corpus, val_fraction=command.val_fraction)
    with ReadingProgress(console) as progress:
        source = find(config.path)
        documents = measure(source, progress.show)
        parts = split(documents, config.val_fraction, whole_characters=True)
        write_text(command.out, train_bpe(parts.train, command.vocab_size, progress.show))
    tokenizer = BPETokenizer(command.out)
    held_out = _some(_texts(parts.val, silent))
    tokens = sum(map(len, tokenizer.encode_all(held_out)))
    figures = {
        "tokenizer": str(command.out),
        "vocab_size": tokenizer.vocab_size,
        "documents": len(documents),
        "bytes": sum(document.size for document in documents),
        "held_out_bytes": sum(map(len, held_out)),
        "held_out_tokens": tokens,
        "bytes_per_token": sum(map(len, held_out)) / tokens,
    }
    _show(console, source.describe(len(documents)), figures, config)
    if command.json:
        print(json.dumps(figures))
    return 0


def _check(command: TokenizeCommand) -> None:
    if not SMALLEST <= command.vocab_size <= LARGEST:
        raise ValueError(
            f"--vocab-size {command.vocab_size} is not from {SMALLEST} (the bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens) to {LARGEST}; use for example 4096"
        )
    if command.out.exists():
        raise ValueError(f"--out {command.out} exists; choose a new name, or remove it")
    if not command.out.parent.is_dir():
        raise ValueError(f"there is no folder {command.out.parent} for --out {command.out}; make it first")


def train_bpe(pieces: Sequence[Piece], vocab_size: int, progress: Progress = silent) -> str:
    """The text of a tokenizer.json trained on these documents; smaller than vocab_size where they are too short to
    have so many pairs. The same documents give the same file.

    Raises: ValueError where the tokenizers library is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            "training a tokenizer needs the tokenizers library; install it with: pip install 'tokenizers>=0.20'"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text.decode("utf-8", errors="replace") for text in _texts(pieces, progress))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True) + "\n"


def _texts(pieces: Sequence[Piece], progress: Progress) -> Iterator[bytes]:
    """Their text in pieces: the library holds 256 of them."""
    reader = Reader(pieces, "counting pairs in", progress)
    for piece in pieces:
        chunks = (chunk[i : i + PIECE] for chunk in reader.chunks(piece) for i in range(0, len(chunk), PIECE))
        yield from lines(chunks, PIECE)


def _some(texts: Iterator[bytes]) -> list[bytes]:
    """The first of them, up to about MEASURED bytes."""
    taken: list[bytes] = []
    size = 0
    while size < MEASURED and (text := next(texts, None)) is not None:
        taken.append(text)
        size += len(text)
    return taken


def _show(console: Console, source: str, figures: dict[str, Any], config: DataConfig) -> None:
    path = "" if config.path is None else f" --data.path {config.path}"
    fraction = "" if config.val_fraction == DataConfig().val_fraction else f" --data.val-fraction {config.val_fraction}"
    for line in (
        f"corpus     {source}: {figures['documents']:,} documents, {figures['bytes']:,} bytes",
        f"tokenizer  {figures['tokenizer']}, {figures['vocab_size']:,} tokens",
        f"held out   {figures['held_out_bytes']:,} bytes are {figures['held_out_tokens']:,} tokens: "
        f"{figures['bytes_per_token']:.2f} bytes a token, where bytes have 1.00",
        "",
        f"Train with it: python -m dsmini.train --data.tokenizer {figures['tokenizer']} "
        f"--model.vocab-size {figures['vocab_size']}{path}{fraction}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
