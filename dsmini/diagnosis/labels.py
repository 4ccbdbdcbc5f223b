"""Targets that do not follow from their tokens: a loader that shifts wrongly, or a text whose order is lost.

Two checks, on the batches that a loader gives:

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

from dsmini.diagnosis.findings import Finding, finding
from dsmini.measure.turns import Estimate

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


def label_damage(batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> Finding:
    """Return the information between tokens and targets [b, s]; a fault if there is none or a target is wrong.

    Reads the batches until they have PAIRS targets. Targets below 0 count as masked and are left out.

    Args:
        seed: seed of the shuffles.
    """
    tokens, targets, wrong, checked = _read(batches)
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


def _read(
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
