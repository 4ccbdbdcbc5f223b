"""Text as token ids: bytes, which need no file, or the byte-pair encoding of a tokenizer.json.

Text that is tokenized is data, never markup. A document that spells out a special token, such as DeepSeek's end of
sentence, gets the tokens of those characters; it cannot end a document or open a hole.
"""

import codecs
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsmini.reading import brief, is_there, read_bytes, read_table, readable

if TYPE_CHECKING:
    import tokenizers

# the token that ends a document, by the names of published tokenizers; the first of these that a file has
END_TOKENS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
NOT_A_TOKENIZER = "is not a tokenizer.json of the tokenizers library"
LARGEST_GROWTH = 64
"""Largest factor by which a file's steps may lengthen a text; published files stay below 10."""
IN_A_RUN = range(8, 12)
"""Numbers of newest tokens that tell whether a run of U+FFFD continues."""
OTHER = "name another tokenizer.json, such as DeepSeek publishes"


class Fim(NamedTuple):
    """The token ids that mark a document rearranged for fill-in-the-middle."""

    begin: int
    hole: int
    end: int


class ByteTokenizer:
    """UTF-8 bytes as token ids 0 to 255.

    The NUL byte, which no text contains, ends a document. 0xFD, 0xFE and 0xFF, which UTF-8 never uses, mark
    fill-in-the-middle.
    """

    vocab_size = 256
    end_of_document = 0
    fim: Fim | None = Fim(0xFD, 0xFE, 0xFF)
    """The ids for fill-in-the-middle; None for a vocabulary without such tokens."""

    def encode(self, text: str | bytes) -> NDArray[np.uint8]:
        """Return the UTF-8 bytes of a text. Bytes that Python could not decode in an argument stay as they were."""
        if isinstance(text, str):
            text = text.encode("utf-8", errors="surrogateescape")
        return np.frombuffer(text, dtype=np.uint8)

    def encode_all(self, texts: Sequence[bytes]) -> list[NDArray[np.uint8]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the bytes, with U+FFFD for invalid UTF-8 and for ids of 256 and more."""
        return _bytes(tokens).decode("utf-8", errors="replace")

    def stream(self) -> "ByteStream":
        return ByteStream()


class ByteStream:
    """A decoder for bytes that come one by one. It holds the first bytes of a character back until its last one."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, tokens: Sequence[int], final: bool = False) -> str:
        """Return the text that is complete with these tokens; `final` gives out the incomplete rest as U+FFFD."""
        return self._decoder.decode(_bytes(tokens), final)


def _bytes(tokens: Sequence[int]) -> bytes:
    """Return the ids as bytes, with 0xFF, which UTF-8 never uses, for ids of 256 and more."""
    return bytes(min(token, 0xFF) for token in tokens)


class BPETokenizer:
    """The tokenizer.json of the tokenizers library, as DeepSeek and others publish it.

    Invalid UTF-8 becomes U+FFFD before it is encoded. Decoding shows special tokens by name.

    Args:
        markup: more added tokens that no text may spell. The file's special tokens, those that end documents or mark
            fill-in-the-middle, and all of the form <｜...｜> are always markup.

    Raises: ValueError for a file that is missing, unreadable or refused by the tokenizers library, if that is not
        installed, and in each method for a text or ids that the file's tokenizer fails on.
    """

    def __init__(self, path: Path, *, markup: Collection[str] = ()) -> None:
        self.path = path
        self._tokenizer = _load(path, (*END_TOKENS, *markup))
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self._ends = [ids[name] for name in END_TOKENS if name in ids]
        self.vocab_size: int = max(ids.values(), default=-1) + 1  # ids may have gaps
        self.fim: Fim | None = (
            Fim(*(ids[name] for name in FIM_TOKENS)) if all(name in ids for name in FIM_TOKENS) else None
        )

    @property
    def end_of_document(self) -> int:
        """The id that ends a document.

        Raises: ValueError if the file has none; only reading documents needs it.
        """
        if not self._ends:
            raise ValueError(
                f"{self.path} has no token that ends a document; want one of {', '.join(END_TOKENS)}: "
                "use another tokenizer.json, or make one with python -m dsmini.tokenize"
            )
        return self._ends[0]

    @property
    def added(self) -> dict[str, int]:
        """The ids of all added tokens by name, whether a text can spell them or not."""
        return {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}

    @property
    def markup(self) -> dict[str, int]:
        """The ids of the added tokens that no text can spell, by name."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    @property
    def beginning(self) -> list[int]:
        """The ids that the file itself puts before every text."""
        with _named(self.path, "fails on the text 'a'"):
            encoding = self._tokenizer.encode("a", add_special_tokens=True)
        at = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
        return encoding.ids[:at]

    def encode(self, text: str | bytes) -> NDArray[np.uint32]:
        """Return the ids of a text, or of its UTF-8 bytes, without special tokens, whatever the text spells."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str | bytes]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, computed on all cores."""
        # a str from a command line may hold bytes that are not UTF-8, as lone surrogates
        raw = [text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text for text in texts]
        clean = [text.decode("utf-8", errors="replace") for text in raw]
        with _named(self.path, "fails on a text"):
            encoded = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        with _named(self.path, "fails on token ids"):
            return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def name_of(self, token: int) -> str:
        """Return the entry of the vocabulary with this id; "" if there is none."""
        return self._tokenizer.id_to_token(token) or ""

    def stream(self) -> "BPEStream":
        return BPEStream(self)


class BPEStream:
    """A decoder for tokens that come one by one. It gives out the part of the text that can no longer change.

    The newest tokens are decoded together with those before them, because some decoders treat the first token of a
    text differently.
    """

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown = 0

    def decode(self, tokens: Sequence[int], final: bool = False) -> str:
        """Return the text that is complete with these tokens; `final` gives out the incomplete rest as U+FFFD."""
        out = ""
        for token in tokens:
            self._pending.append(token)
            if not self._continues_a_run():
                out += self._take(final=False)
        return out + self._take(final=True) if final else out

    def _continues_a_run(self) -> bool:
        """Return True if the newest tokens are U+FFFD and nothing else, so that no more text is certain.

        A run of it is not decoded again for each of its tokens. Where a character begins among them is not known, but
        it has at most four tokens, so one of four beginnings is right.
        """
        if len(self._pending) <= IN_A_RUN.stop:
            return False
        return all(not self._tokenizer.decode(self._pending[-n:]).strip("\ufffd") for n in IN_A_RUN)

    def _take(self, final: bool) -> str:
        before = len(self._tokenizer.decode(self._context))
        text = self._tokenizer.decode([*self._context, *self._pending])[before:]
        held = 0 if final else len(text) - len(text.rstrip("\ufffd"))  # an incomplete character
        out = text[self._shown : len(text) - held]
        self._shown = max(self._shown, len(text) - held)
        if text and held == 0:
            self._context, self._pending, self._shown = self._pending, [], 0
        return out


def _load(path: Path, markup: Collection[str]) -> "tokenizers.Tokenizer":
    """Read a tokenizer.json. The added tokens of `markup` and those of the form <｜...｜> become special."""
    library = _library(f"reading {path}").Tokenizer
    if not is_there(path):
        raise ValueError(f"there is no tokenizer file {path}; name a tokenizer.json, or leave it out for bytes")
    with _named(path, NOT_A_TOKENIZER):
        content = read_table(path)
        for token in content.get("added_tokens", []):
            # DeepSeek's file calls <｜User｜> and others of that form ordinary, so that a text could spell them
            name = token["content"]
            token["special"] |= name in markup or re.fullmatch("<｜.*｜>", name) is not None
        tokenizer = library.from_str(json.dumps(content))
        growth = {name: _growth(content.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    if dropout := content["model"].get("dropout"):
        raise ValueError(
            f"{path} has dropout {brief(dropout)}, which gives a text other tokens each time; want null; {OTHER}"
        )
    for name, factor in growth.items():
        if factor > LARGEST_GROWTH:
            raise ValueError(
                f"{path} has a {name} that can make a text {factor:,.0f} times as long; want at most {LARGEST_GROWTH}; "
                f"{OTHER}"
            )
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _growth(step: Any) -> float:
    """Return the largest factor by which a step of a tokenizer.json, with all steps in it, may lengthen a text.

    A regular expression, and an empty text, may match between any two characters. The table of a Precompiled step is
    not looked at.
    """
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Replace":
        replaced, by = (len(text.encode()) for text in (step["pattern"].get("String", ""), step["content"]))
        return max(1.0, by / replaced) if replaced else 1.0 + by
    own = 2.0 if step.get("type") == "ByteLevel" else 1.0
    return own * math.prod(map(_growth, step.values()))


def _library(work: str) -> Any:
    """Return the tokenizers library. Raises: ValueError if it is not installed, naming the work that needs it."""
    try:
        import tokenizers
    except ImportError:
        reason = f"{work} needs the tokenizers library; install it with: pip install 'tokenizers>=0.20'"
        raise ValueError(reason) from None
    return tokenizers


@contextmanager
def _named(path: Path, fault: str) -> Iterator[None]:
    """Raise ValueError with the file's name for an error of the tokenizers library, its panics included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, of no public class
            raise
        raise ValueError(f"{path} {fault}: {readable(' '.join(str(error).split()))}; {OTHER}") from None


Tokenizer = ByteTokenizer | BPETokenizer
TextStream = ByteStream | BPEStream


def load_tokenizer(path: Path | None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json for reading documents; for None the tokenizer of bytes.

    Raises: ValueError as BPETokenizer does, and for a file without a token that ends a document.
    """
    tokenizer = ByteTokenizer() if path is None else BPETokenizer(path)
    _ = tokenizer.end_of_document  # refused now, not when the corpus is half read
    return tokenizer


def compressed_ids(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int64]:
    """Return an id for each token, one for all texts that differ in case, accents, width or spaces alone.

    Ids count texts in the order of first appearance. A token that is a part of a character has its own name as text.
    Bytes stay as they are.

    Source: Engram (arXiv 2601.07372), section 2.2; the paper's demo.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return np.arange(vocab_size, dtype=np.int64)
    seen: dict[str, int] = {}
    keys = (_compressed(tokenizer.decode([token]), tokenizer.name_of(token)) for token in range(vocab_size))
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def _compressed(text: str, name: str) -> str:
    if "\ufffd" in text:
        return name
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    letters = (letter.lower() for letter in plain if not unicodedata.category(letter).startswith("M"))
    plain = re.sub(r"[ \t\r\n]+", " ", "".join(letters))
    return (plain if plain == " " else plain.strip()) or text


def byte_tokenizer_json() -> str:
    """Return the vocabulary of ByteTokenizer as a tokenizer.json of the tokenizers library: byte i is id i.

    The library writes bytes as printable characters. A printable byte stands for itself, the others begin at U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(0x100 + i) for i, byte in enumerate(others)} | {byte: chr(byte) for byte in printable}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        "vocab": {characters[byte]: byte for byte in range(256)},
        "merges": [],
    }
    content = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None},
        **{"pre_tokenizer": as_bytes, "post_processor": None, "decoder": as_bytes, "model": model},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def is_byte_tokenizer(path: Path) -> bool:
    """Return True for a file that holds byte_tokenizer_json(), which ByteTokenizer reads without any library."""
    content = byte_tokenizer_json().encode()
    return path.is_file() and path.stat().st_size == len(content) and read_bytes(path) == content


# --- training: a tokenizer.json over bytes that splits words as DeepSeek does


# DeepSeek's special tokens in the order of their ids: begin and end of sentence, padding, fill-in-the-middle
SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", END_TOKENS[0], "<｜▁pad▁｜>", *FIM_TOKENS)
SMALLEST = 256 + len(SPECIAL_TOKENS)
"""Smallest number of token ids: the bytes and the special tokens."""

# as in DeepSeek-V3: up to three digits; Chinese and Japanese; a sign with its word; signs with their line breaks
SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> str:
    """Return the text of a tokenizer.json trained on these texts. The same texts give the same file.

    The vocabulary is smaller than vocab_size if the texts are too short to have that many pairs.

    Raises: ValueError if the tokenizers library is not installed.
    """
    library = _library("training a tokenizer")
    pre_tokenizers = library.pre_tokenizers
    tokenizer = library.Tokenizer(library.models.BPE())
    splits = [pre_tokenizers.Split(library.Regex(pattern), behavior="isolated") for pattern in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("utf-8", errors="replace") for text in texts), trainer)
    return tokenizer.to_str(pretty=True) + "\n"
