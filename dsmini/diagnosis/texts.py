"""Findings in the text of a run: copies inside it, copies that were held out, and targets that do not follow from it.

Repeated text is worth less than its size: up to four epochs are nearly as good as fresh text, and with more the value
of another epoch falls to nothing (Muennighoff et al., "Scaling Data-Constrained Language Models", 2023). A copied
passage is trained on more often than the rest, without being counted.

Copied tokens in passages of 200 bytes, measured in texts of up to 16 MB:

    Tiny Shakespeare                 0.0%     Perl's library                   12%
    Python's own standard library    4.8%     SymPy                            13%
    PyTorch's Python                  11%     headers in /usr/include          27%
    Transformers, whose models are copies of each other by design              56%
    any text, written twice                                                   100%

A passage is a number of tokens in a row, about 200 bytes of text. A token is copied if some passage that contains it
also occurs elsewhere, and the share of copied tokens is the figure. An occurrence may overlap another: 210 equal signs
in a row hold the same 200 bytes eleven times.

The hash of the passage of n tokens at i is a polynomial in an odd base B, modulo 2^64, of its mixed tokens x:

    hash(i) = x[i] + x[i+1] B + ... + x[i+n-1] B^(n-1)

A passage of a + b tokens is one of a and one of b: hash_(a+b)(i) = hash_a(i) + B^a hash_b(i+a). So passages of 1, 2, 4,
8, ... tokens give all others. Passages that differ in one token never share a hash, because B is odd and the
mixing loses nothing. Others share one with a chance of about 2^-64: in a text of 2^24 tokens there are 2^47 pairs, and
the chance of a single false match is 2^-17, less than 1 in 100,000. Of a longer text the first 2^24 tokens are read.

Source: 50 tokens in a row are what Lee et al., "Deduplicating Training Data Makes Language Models Better", 2022,
section 4.2, call a duplicate; their tokens have about 4 bytes.

Targets may not follow from their tokens: a loader shifts wrongly, or the order of a text is lost. Two checks, on the
batches that a loader gives:

1. The contract. The target at position t is the token at t + 1, so targets[:, t] == tokens[:, t + 1] for all t but the
   last. One violation is a fault.
2. The information. In a text a token says something about the next one: their mutual information, in nats,

       I = sum over pairs of p(x, y) log( p(x, y) / p(x) p(y) )

   If the order of a text is lost, the contract still holds, and the information is gone.

Counted frequencies give too much information: n pairs of unrelated tokens in K x K cells give about (K - 1)^2 / 2n nats
(Miller 1955), 0.25 nats for K = 256 and n = 2^17. The same pairs with their targets shuffled inside each row show this
bias, with the same frequencies, so their mean is subtracted. Shuffling inside rows leaves what a row's topic tells. The
information is there if the pairs give more than the mean of 32 shuffles and 4 standard deviations: by chance that
happens about once in 5,000 times (Student's t of 31 degrees of freedom).

The tokens are sorted into K bins, the frequent half of the bins for one token each, the others shared. A bin is a
function of a token, and a function of x can say no more about y than x does (data-processing inequality), so bins only
lower the information. What is found is there.

Not seen: text whose neighbours say nothing about each other in truth, such as compressed bytes, is taken for damaged.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsmini.data.corpus import Corpus, forget
from dsmini.diagnosis.findings import Finding, finding
from dsmini.measure.turns import Estimate

PASSAGE_BYTES = 200
"""Bytes of a passage: 50 tokens of 4 bytes. Source: Lee et al. 2022, section 4.2. Bytes, so that tokenizers compare."""
MOST_READ = 1 << 24
"""Tokens that are compared: one to three seconds and 440 MB on one core."""
MOST_HELD_OUT = 1 << 20
"""Held-out tokens whose passages are looked for."""
DUPLICATES = 0.3
"""Share of copied training tokens that is a fault: above every text of the table that was not copied by design."""
LEAK = 0.1
"""Share of copied held-out tokens that is a fault: a model that knew them by heart would show a loss 10% too low. The
default corpus has 2%."""
PAIRS = 1 << 17
"""Pairs of token and target that are read: a quarter of a second for all shuffles."""
ENOUGH = 1 << 11
"""Pairs below which nothing is said about the information."""
BINS = 256
"""Bins of tokens; fewer for few pairs, so that a cell has two pairs on average."""
SHUFFLES = 32
Z_95 = 1.96
BAND = 4.0
"""Standard deviations of the shuffles above their mean that chance does not reach."""
_GROUPS = 32
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def passage_tokens(corpus: Corpus) -> int:
    """Return the number of tokens of a passage, which has about PASSAGE_BYTES bytes."""
    return max(1, round(PASSAGE_BYTES / corpus.bytes_per_token))


def duplicates(corpus: Corpus) -> Finding:
    """Return the share of the training tokens in passages that occur more than once."""
    length, text = passage_tokens(corpus), corpus.train[:MOST_READ]
    sentence = f"The training text has {len(text):,} tokens, less than one passage of {length}: nothing to compare."
    share = 0.0
    if len(text) >= length:
        share = float(covered(repeated(passage_hashes(text, length)), length).mean())
        sentence = (
            f"{share:.1%} of the training tokens lie in passages of {length} tokens that occur more than once; "
            f"{_read(text, corpus.train)} tokens were compared. A share above {DUPLICATES:.0%} is a fault."
        )
    fix = "Remove repeated documents from the text first: their passages are trained on more often than the rest."
    forget(corpus.train)
    return finding("Data", "duplicates", share, sentence, fix, "share of tokens", is_fault=share > DUPLICATES)


def held_out_leak(corpus: Corpus) -> Finding:
    """Return the share of the held-out tokens in passages that also occur in the training text."""
    length, text, other = passage_tokens(corpus), corpus.val[:MOST_HELD_OUT], corpus.train[:MOST_READ]
    few = f"one less than a passage of {length}: nothing to compare."
    sentence = f"The texts have {len(other):,} and {len(text):,} tokens, {few}"
    share = 0.0
    if min(len(text), len(other)) >= length:
        found = occurring(passage_hashes(text, length), passage_hashes(other, length))
        share = float(covered(found, length).mean())
        sentence = (
            f"{share:.1%} of the held-out tokens lie in passages of {length} tokens that also occur in the training "
            f"text; {_read(text, corpus.val)} tokens were looked for in {_read(other, corpus.train)}. A share above "
            f"{LEAK:.0%} is a fault."
        )
    fix = "Hold out text that has no copy in the training text first; the held-out loss is too low until then."
    forget(corpus.train)
    return finding("Data", "held_out_leak", share, sentence, fix, "share of tokens", is_fault=share > LEAK)


def _read(part: NDArray[Any], whole: NDArray[Any]) -> str:
    if len(part) == len(whole):
        return f"all {len(whole):,}"
    return f"the first {len(part):,} of {len(whole):,}"


# --- passages


def passage_hashes(tokens: NDArray[Any], length: int) -> NDArray[np.uint64]:
    """Return the hash of each passage of this length: length - 1 fewer than tokens, or none."""
    if len(tokens) < length:
        return np.empty(0, dtype=np.uint64)
    piece = (tokens.astype(np.uint64) + np.uint64(1)) * _MIX  # of `span` tokens: 1, 2, 4, ...
    piece ^= piece >> np.uint64(32)
    whole, done, span = np.zeros(len(tokens) + 1, dtype=np.uint64), 0, 1  # of `done` tokens
    while True:
        if length & span:
            whole = whole[: len(piece) - done] + piece[done:] * np.uint64(pow(_BASE, done, 1 << 64))
            done += span
        if done == length:
            return whole
        piece = piece[:-span] + piece[span:] * np.uint64(pow(_BASE, span, 1 << 64))
        span *= 2


def repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each hash if another one is equal."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    out = np.zeros(len(hashes), dtype=bool)
    out[order[1:][same]] = out[order[:-1][same]] = True
    return out


def occurring(hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each of some hashes if it is among many others."""
    shift = np.uint64(60 - len(hashes).bit_length())
    filled = np.zeros(1 << (len(hashes).bit_length() + 4), dtype=bool)  # at most one slot in 16
    filled[hashes >> shift] = True
    return np.isin(hashes, others[filled[others >> shift]])


def covered(starts: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """Return for each token of a text if one of the passages that are marked at their start contains it."""
    n = len(starts) + length - 1
    begun = np.full(n + 1, starts.sum(), dtype=np.int32)  # marked passages that begin before a token
    begun[0] = 0
    np.cumsum(starts, out=begun[1 : len(starts) + 1])
    ended = np.zeros(n, dtype=np.int32)
    ended[length:] = begun[1 : n - length + 1]
    return begun[1:] > ended


# --- targets


def label_damage(batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> Finding:
    """Return the information between tokens and targets [b, s]; a fault if there is none or a target is wrong.

    Reads the batches until they have PAIRS targets. Targets below 0 count as masked and are left out.

    Args:
        seed: seed of the shuffles.
    """
    tokens, targets, wrong, checked = _rows(batches)
    n = sum(len(row) for row in targets if len(row) > 1)  # a row of one target cannot be shuffled
    if n < ENOUGH and not wrong:
        sentence = f"{n:,} targets were read, too few to measure what their tokens say about them (want {ENOUGH:,})."
        unknown = Estimate(value=0.0, low=0.0, high=float(np.log(BINS)), turns=n)
        return finding("Data", "label_damage", unknown, sentence, unit="nats a token")
    value, error, band = _information(tokens, targets, np.random.default_rng(seed))
    sentence = f"A token says {value:.3f} nats about its target; shuffled targets reach {band:.3f}."
    if wrong:
        at = f"{wrong:,} of {checked:,} targets ({wrong / checked:.2%}) are not the next token of their sequence. "
        sentence = at + sentence
        fix = "Correct the loader: targets[:, t] must be tokens[:, t + 1]; train nothing before that."
    elif value <= band:
        sentence += f" The {min(n, PAIRS):,} targets follow from their tokens no better than by chance."
        fix = "Look at one batch as text: the order of the tokens was lost before the loader cut its sequences."
    else:
        sentence += f" All {checked:,} targets that can be checked are the next token."
        fix = ""
    interval = Estimate(value=value, low=value - Z_95 * error, high=value + Z_95 * error, turns=n)
    return finding("Data", "label_damage", interval, sentence, fix, "nats a token")


def _rows(
    batches: Iterable[tuple[Tensor, Tensor]],
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], int, int]:
    """Return the tokens and targets of each row, the number of wrong targets, and the number that can be checked."""
    tokens: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    wrong = checked = pairs = 0
    for batch_tokens, batch_targets in batches:
        for x, y in zip(batch_tokens.cpu().numpy(), batch_targets.cpu().numpy(), strict=True):
            known = y >= 0
            checked += int(known[:-1].sum())
            wrong += int((known[:-1] & (y[:-1] != x[1:])).sum())
            tokens.append(x[known].astype(np.int64))
            targets.append(y[known].astype(np.int64))
            pairs += len(targets[-1])
        if pairs >= PAIRS:
            break
    return tokens, targets, wrong, checked


def _information(
    tokens: list[NDArray[np.int64]], targets: list[NDArray[np.int64]], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the information without its bias, its standard error, and the most that chance gives; all in nats."""
    x, y = np.concatenate(tokens)[:PAIRS], np.concatenate(targets)[:PAIRS]
    ends = np.cumsum([0, *map(len, tokens)]).clip(max=len(x))
    bins = int(min(BINS, max(2, (len(x) / 2) ** 0.5)))
    x, y = _binned(x, bins), _binned(y, bins)
    shuffled = []
    for _ in range(SHUFFLES):
        mixed = y.copy()
        for start, end in pairwise(ends.tolist()):
            rng.shuffle(mixed[start:end])
        shuffled.append(_pointwise(x, mixed, bins).mean())
    bias, spread = float(np.mean(shuffled)), float(np.std(shuffled, ddof=1))
    pointwise = _pointwise(x, y, bins)
    means = [group.mean() for group in np.array_split(pointwise, min(_GROUPS, len(pointwise)))]
    error = float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return float(pointwise.mean()) - bias, error, BAND * spread


def _binned(ids: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """Give each of the most frequent tokens a bin of its own, and share the other half of the bins by the id."""
    values, place, counts = np.unique(ids, return_inverse=True, return_counts=True)
    if len(values) <= bins:
        return place
    own = bins // 2
    numbers = own + values % (bins - own)
    numbers[np.argsort(-counts, kind="stable")[:own]] = np.arange(own)
    return numbers[place]


def _pointwise(x: NDArray[np.int64], y: NDArray[np.int64], bins: int) -> NDArray[np.float64]:
    """Return log( p(x, y) / p(x) p(y) ) of each pair, with counted frequencies; its mean is the information."""
    cell = x * bins + y
    joint = np.bincount(cell, minlength=bins * bins)
    at_x, at_y = np.bincount(x, minlength=bins), np.bincount(y, minlength=bins)
    return np.log(joint[cell] * (len(x) / (at_x[x] * at_y[y])))
