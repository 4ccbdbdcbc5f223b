"""Fill-in-the-middle: a document rearranged so that predicting its next token fills a hole in it.

    <fim begin> prefix <fim hole> suffix <fim end> middle <end of document>

Prefix-suffix-middle (PSM), applied to whole documents before they are packed into sequences, to a share of them.
Source: DeepSeek-V3 report, section 4.1, which used a rate of 0.1.
"""

import hashlib

import numpy as np

from dsmini.text.tokenizer import Tokenizer

LARGEST = 1 << 20
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
