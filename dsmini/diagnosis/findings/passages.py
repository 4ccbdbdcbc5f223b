"""Passages that occur more than once, counted by their hashes.

A passage is a number of tokens in a row, about 200 bytes of text. A token is copied if some passage that contains it
also occurs elsewhere, and the share of copied tokens is the figure. An occurrence may overlap another: 210 equal signs
in a row hold the same 200 bytes eleven times.

The hash of the passage of n tokens at i is a polynomial in an odd base B, modulo 2^64, of its mixed tokens x:

    hash(i) = x[i] + x[i+1] B + ... + x[i+n-1] B^(n-1)  =  (P[i+n] - P[i]) B^-i     P[i] = sum of x[j] B^j, j < i

So one running sum gives all hashes. Passages that differ in one token never share a hash, because B is odd and the
mixing loses nothing. Others share one with a chance of about 2^-64: in a text of 2^24 tokens there are 2^47 pairs, and
the chance of a single false match is 2^-17, less than 1 in 100,000.

A text of more than 2^24 tokens is sampled. 2^11 random tokens ask for their passages, and blocks of the text, 2^25
tokens in all, are read to count these. In a text of at most 2^25 tokens all blocks are read, and the share has the
error of a sample of 2^11 tokens, at most 0.022 at 95% confidence. In a larger text a fraction f is read, and a copied
token is seen only if another copy was read too. The chance of that is f for two copies and more for others, so the true
share lies between the seen share s and s / f. Worked example: a text of 2^29 tokens written twice has f = 1/32, so s is
1/32 and s / f is 1. For the estimate between the two, see `_unseen`.

Source: 50 tokens in a row are what Lee et al., "Deduplicating Training Data Makes Language Models Better", 2022,
section 4.2, call a duplicate; their tokens have about 4 bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmini.data.cache import forget

PASSAGE_BYTES = 200
"""Bytes of a passage: 50 tokens of 4 bytes. Source: Lee et al. 2022, section 4.2. Bytes, so that tokenizers compare."""
EXACT = 1 << 24
"""Tokens of the largest text that is compared whole: one to three seconds and 440 MB on one core."""
READ = 1 << 25
"""Tokens of a larger text that are read: about a second."""
ASKED = 1 << 11
"""Tokens of a larger text whose passages are looked for."""
ALL_ASKED = 1 << 20
"""Tokens of the largest held-out text whose passages are all looked for."""
BLOCK = 1 << 14
"""Tokens that are read and hashed together: they fit in the processor's cache."""
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xBF58476D1CE4E5B9)
Z_95 = 1.96


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedShare:
    """Share of the tokens of a text that lie in copied passages."""

    value: float
    low: float
    high: float
    how: str
    """Words that say how much of the text was compared."""


def passage_hashes(tokens: NDArray[Any], length: int) -> NDArray[np.uint64]:
    """Return the hash of each passage of this length: length - 1 fewer than tokens, or none."""
    out = np.empty(max(0, len(tokens) - length + 1), dtype=np.uint64)
    for at in range(0, len(out), BLOCK):
        part = _hash_block(tokens[at : at + BLOCK + length - 1], length)
        out[at : at + len(part)] = part
    return out


def repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each hash if another one is equal.

    The hashes are first sorted by their top byte, so that the tables of a part fit in the processor's cache.
    """
    top = (hashes >> np.uint64(56)).astype(np.uint8)
    order = np.argsort(top, kind="stable")  # a radix sort
    out = np.empty(len(hashes), dtype=bool)
    for part in np.split(order, np.cumsum(np.bincount(top, minlength=256))[:-1]):
        out[part] = _repeated_part(hashes[part])
    return out


def covered(starts: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """Return for each token of a text if one of the passages that are marked at their start contains it."""
    n = len(starts) + length - 1
    begun = np.full(n + 1, starts.sum(), dtype=np.int32)  # marked passages that begin before a token
    begun[0] = 0
    np.cumsum(starts, out=begun[1 : len(starts) + 1])
    ended = np.zeros(n, dtype=np.int32)
    ended[length:] = begun[1 : n - length + 1]
    return begun[1:] > ended


def copied_within(text: NDArray[Any], length: int, seed: int) -> CopiedShare:
    """Return the share of a text's tokens in passages that occur in it more than once.

    Args:
        text: token ids; at least one passage.
        seed: seed of the sample of a text of more than EXACT tokens.
    """
    n = len(text)
    if n <= EXACT:
        value = float(covered(repeated(passage_hashes(text, length)), length).mean())
        forget(text)
        return CopiedShare(value=value, low=value, high=value, how=f"all {n:,} tokens were compared")
    rng = np.random.default_rng(seed)
    blocks = blocks_to_read(n, READ, rng)
    first = rng.choice(blocks, ASKED)
    asked = np.minimum(first + rng.integers(0, BLOCK, ASKED), n - 1)
    # passages that begin in the token's own block, which is read; tokens at its beginning lose a few
    asked_for = _hashes_around(text, asked, first, length)
    copies = _count(asked_for, text, blocks, length) - 1  # but for the passage itself
    return _sampled(copies.max(axis=1), len(blocks), n)


def copied_from(text: NDArray[Any], other: NDArray[Any], length: int, seed: int) -> CopiedShare:
    """Return the share of a text's tokens in passages that also occur in another text; each has at least one."""
    rng = np.random.default_rng(seed)
    blocks = blocks_to_read(len(other), READ, rng)
    n = len(text)
    if n <= ALL_ASKED and len(other) <= READ:
        value = float(covered(_count(passage_hashes(text, length), other, blocks, length) > 0, length).mean())
        how = f"all {n:,} tokens were looked for in all {len(other):,}"
        return CopiedShare(value=value, low=value, high=value, how=how)
    asked = rng.integers(0, n, ASKED)
    asked_for = _hashes_around(text, asked, np.zeros_like(asked), length)
    return _sampled(_count(asked_for, other, blocks, length).max(axis=1), len(blocks), len(other))


def _hash_block(tokens: NDArray[Any], length: int) -> NDArray[np.uint64]:
    powers, inverse = _powers(BLOCK + length)
    x = tokens.astype(np.uint64) + np.uint64(1)
    x *= _MIX
    x ^= x >> np.uint64(32)
    x *= powers[: len(x)]
    total = np.zeros(len(x) + 1, dtype=np.uint64)
    np.cumsum(x, out=total[1:])
    return (total[length:] - total[:-length]) * inverse[: len(total) - length]


@cache
def _powers(n: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the powers 0 .. n - 1 of the base and of its inverse, modulo 2^64."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(n, base, dtype=np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors))
    return both[0], both[1]


def _repeated_part(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Each hash writes its place into a slot of a table. All equal hashes share a slot, and read there who wrote last.

    A slot may hold several hashes: those that were not equal to the last one meet again in another table.
    """
    out = np.zeros(len(hashes), dtype=bool)
    places, left, factor = np.arange(len(hashes)), hashes, _BASE
    while len(places):
        bits = len(places).bit_length() + 1
        slots = ((left * np.uint64(factor)) >> np.uint64(64 - bits)).astype(np.int64)
        table = np.empty(1 << bits, dtype=np.int64)
        table[slots] = places
        others = np.flatnonzero(table[slots] != places)
        last = table[slots[others]]
        equal = hashes[last] == left[others]
        out[last[equal]] = True
        out[places[others[equal]]] = True
        others = others[~equal]
        places, left, factor = places[others], left[others], factor + 2
    return out


def _hashes_around(
    text: NDArray[Any], tokens: NDArray[np.int64], first: NDArray[np.int64], length: int
) -> NDArray[np.uint64]:
    """Return [tokens, length] hashes of the passages that contain each token, none before its `first`.

    Near an end of the text or at `first` there are fewer, and some are given twice.
    """
    starts = (tokens[:, None] - np.arange(length)).clip(first[:, None], len(text) - length)
    out = np.empty(starts.shape, dtype=np.uint64)
    for row, places in zip(out, starts, strict=True):
        row[:] = _hash_block(text[places[-1] : places[0] + length], length)[places - places[-1]]
    return out


def blocks_to_read(n: int, at_most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return where the blocks to read begin, in order: all of n tokens, or random ones of `at_most` tokens together."""
    if n <= at_most:
        return np.arange(0, n, BLOCK)
    return np.sort(rng.choice(n // BLOCK, at_most // BLOCK, replace=False)) * BLOCK


def _count(asked: NDArray[np.uint64], text: NDArray[Any], blocks: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Return how often the passage of each hash begins in these blocks of a text."""
    keys, place = np.unique(asked, return_inverse=True)
    counts = np.zeros(len(keys), dtype=np.int64)
    shift = np.uint64(64 - len(keys).bit_length() - 4)
    filled = np.zeros(1 << (len(keys).bit_length() + 4), dtype=bool)  # at most one slot in 16
    filled[keys >> shift] = True
    for hashes in _read(text, blocks, length):
        near = hashes[filled[hashes >> shift]]
        at = np.searchsorted(keys, near).clip(max=len(keys) - 1)
        np.add.at(counts, at[keys[at] == near], 1)
    forget(text)
    return counts[place].reshape(asked.shape)


def _read(text: NDArray[Any], blocks: NDArray[np.int64], length: int) -> Iterator[NDArray[np.uint64]]:
    for start in blocks.tolist():
        part = np.asarray(text[start : start + BLOCK + length - 1])
        if len(part) >= length:
            yield _hash_block(part, length)


def _sampled(copies: NDArray[np.int64], blocks: int, n: int) -> CopiedShare:
    """Return the share of tokens with a copy.

    Where a part of the text is read, tokens of one block, and of the block with their copies, are seen or missed
    together. Twice `asked / blocks` such neighbours leave as many independent draws as `_wilson` is given.

    Args:
        copies: for each asked token the number of copies that were read.
        blocks: number of blocks of the text that were read.
        n: tokens of the text.
    """
    asked, fraction = len(copies), min(1.0, blocks * BLOCK / n)
    seen = float((copies > 0).mean())
    how = f"{asked:,} random tokens were looked for in {fraction:.3g} of {n:,} tokens"
    if fraction == 1.0:
        low, high = _wilson(seen, asked)
        return CopiedShare(value=seen, low=low, high=high, how=how)
    low, high = _wilson(seen, asked / (1 + 2 * asked / blocks))
    value = min(1.0, seen + _unseen(copies, fraction) / asked)
    return CopiedShare(value=value, low=min(low, value), high=max(value, min(1.0, high / fraction)), how=how)


def _unseen(copies: NDArray[np.int64], fraction: float) -> float:
    """Estimate how many of the asked tokens have copies of which none was read.

    If each had k copies, and each copy were read with chance f, the expected ratio of tokens with two seen copies to
    tokens with one would be (k - 1) f / 2 (1 - f), which gives k. For each token with one copy there would be
    (1 - f) / k f unseen ones. Where k differs from token to token this is a lower bound.

    Source: Chao, "Estimating the Population Size for Capture-Recapture Data with Unequal Catchability", 1987.
    """
    once, twice = int((copies == 1).sum()), int((copies == 2).sum())
    if not once:
        return 0.0
    k = 1 + 2 * (twice / once) * (1 - fraction) / fraction
    return once * (1 - fraction) / (k * fraction)


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95% interval of a share of n independent draws. Source: Wilson 1927."""
    centre = share + Z_95**2 / (2 * n)
    half = Z_95 * np.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return min(share, float((centre - half) / scale)), max(share, float((centre + half) / scale))
