"""Findings: what is seen of a run besides its gains, and whether it is a fault: one that has a fix.

Copies. Repeated text is worth less than its size: up to four epochs are nearly as good as fresh text, and with more the
value of another epoch falls to nothing (Muennighoff et al., "Scaling Data-Constrained Language Models", 2023). Copied
tokens in passages of 200 bytes, measured in texts of up to 16 MB:

    Tiny Shakespeare                 0.0 %     Perl's library                   12 %
    Python's own standard library    4.8 %     SymPy                            13 %
    PyTorch's Python                  11 %     headers in /usr/include          27 %
    Transformers, whose models are copies of each other by design               56 %
    any text, written twice                                                    100 %

A passage is a number of tokens in a row, about 200 bytes of text. A token is copied if some passage that contains it
also occurs elsewhere. An occurrence may overlap another: 210 equal signs in a row hold the same 200 bytes eleven times.
The hash of the passage of n tokens at i is a polynomial in an odd base B, modulo 2^64, of its mixed tokens x:

    hash(i) = x[i] + x[i+1] B + ... + x[i+n-1] B^(n-1) = (S[i+n] - S[i]) B^-i,    S[i] = sum over j < i of x[j] B^j

Passages that differ in one token never share a hash, because B is odd and the mixing loses nothing. Others share one
with a chance of about 2^-64: in a text of 2^24 tokens there are 2^47 pairs, and the chance of a single false match is
2^-17, less than 1 in 100,000. In a longer text the first 2^24 tokens are read.

Targets. The target at position t is the token at t + 1, so targets[:, t] == tokens[:, t + 1] for all t but the last: a
loader that shifts or shuffles breaks it. A target is left out of the loss where it is IGNORE (-100). Positions before
the last target of a row that counts are the context of it. Positions after it reach no loss, as attention is causal:

    row        t0   t1   -100  t3   -100  -100
    counts      x    x          x
    context                x
    wasted                            x     x       2 of 6

Source: 50 tokens in a row are what Lee et al., "Deduplicating Training Data Makes Language Models Better", 2022,
section 4.2, call a duplicate; their tokens have about 4 bytes.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsmini.data.corpus import Corpus
from dsmini.data.tokenized import forget
from dsmini.diagnosis.arms import Axis, Work, percent
from dsmini.diagnosis.contention import STOP_OTHERS, Contention
from dsmini.measure.turns import Estimate
from dsmini.nn import max_violation
from dsmini.nn.transformer import IGNORE
from dsmini.training.trainer import StepResult

MUCH = 0.10
"""Share of a step, or of the targets, above which wasted work is a fault."""
IDLE_LOAD, MOST_IDLE = 0.1, 0.25
"""An expert is idle below this share of the mean load; more than this share of idle experts is a fault. At random
weights none of the toy's is idle, and in a collapsed gate all but those that it chooses are."""
PASSAGE_BYTES = 200
"""Bytes of a passage: 50 tokens of 4 bytes. Source: Lee et al. 2022, section 4.2. Bytes, so that tokenizers compare."""
MOST_READ = 1 << 24
"""Tokens that are compared: one to three seconds on one core."""
MOST_HELD_OUT = 1 << 20
"""Held-out tokens whose passages are looked for."""
DUPLICATES = 0.3
"""Share of copied training tokens that is a fault: above every text of the table that was not copied by design."""
LEAK = 0.1
"""Share of copied held-out tokens that is a fault: a model that knew them by heart would show a loss 10 % too low. The
default corpus has 2 %."""
BASE, MIX = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A measured figure, and a verdict on it."""

    axis: Axis
    """Part of a run that the figure is about."""
    name: str
    value: float
    sentence: str
    """Measurement in words, with numbers and units."""
    fix: str = ""
    """First thing to do about a fault; empty where nothing is wrong."""

    @property
    def is_fault(self) -> bool:
        """The figure is bad enough that a user should act."""
        return bool(self.fix)


# --- of the steps


def load(steps: Sequence[StepResult]) -> Finding | None:
    """Return the share of experts that hardly any token has chosen; None for a dense model."""
    counted = [step.counts for step in steps if step.counts is not None]
    if not counted:
        return None
    loads = torch.stack(counted).sum(0)
    idle = (loads < IDLE_LOAD * loads.double().mean(1, keepdim=True)).double().mean().item()
    vio = max_violation(loads).mean().item()
    sentence = (
        f"{percent(idle)} of the experts get less than a tenth of the mean load; "
        f"the fullest gets {1 + vio:.1f} times the mean (MaxVio {vio:.2f})."
    )
    fix = "Reset the routing bias, or raise train.bias_speed; a hash layer has no bias." if idle > MOST_IDLE else ""
    return Finding(axis="Algorithm", name="idle_experts", value=idle, sentence=sentence, fix=fix)


def other_programs(turns: Sequence[Contention], loss: Estimate, work: Work) -> Finding:
    """Return what other programs took of the machine. loss: share of a step's time that they cost."""
    busiest, delayed = (statistics.median(getattr(turn, name) for turn in turns) for name in ("others", "delayed"))
    seen = Contention(others=busiest, delayed=delayed).words
    sentence = (
        f"{seen[0].upper()}{seen[1:]}, and a thread of this run is {percent(delayed)} of the time without a core. "
        f"Others cost about {percent(loss.value)} of a step."
    )
    fix = STOP_OTHERS if work == "training" else "Stop other programs, or leave them a core."
    return Finding(
        axis="Machine",
        name="other_programs",
        value=loss.value,
        sentence=sentence,
        fix=fix if (loss.low if loss.is_clear else loss.value) > MUCH else "",
    )


# --- of the batches


def wrong_targets(batches: Sequence[tuple[Tensor, Tensor]]) -> Finding:
    """Return the share of targets [b, s] that are not the next token [b, s] of their sequence; one is a fault."""
    known = [y[:, :-1] != IGNORE for _, y in batches]
    checked = sum(int(each.sum()) for each in known)
    wrong = sum(int((each & (y[:, :-1] != x[:, 1:])).sum()) for each, (x, y) in zip(known, batches, strict=True))
    share = wrong / max(1, checked)
    sentence = f"{wrong:,} of {checked:,} targets ({percent(share, 2)}) are not the next token of their sequence."
    fix = "Correct the loader: targets[:, t] must be tokens[:, t + 1]; train nothing before that." if wrong else ""
    return Finding(axis="Data", name="wrong_targets", value=share, sentence=sentence, fix=fix)


def padding(targets: Sequence[Tensor]) -> Finding:
    """Return the share of targets [b, s] that do not count; a fault if too many stand after the last that does."""
    ignored = sum(int((y == IGNORE).sum()) for y in targets)
    after = sum(int(((y != IGNORE).flip(1).cumsum(1) == 0).sum()) for y in targets)
    n = sum(y.numel() for y in targets)
    said = f"{percent(ignored / n, 1)} of the {n:,} targets that were read do not count"
    if ignored:
        said += f"; {percent(after / n, 1)} stand after the last one of their row that does: their work is wasted"
    fix = "Pack several documents into a row, or put rows of like length into a batch." if after / n > MUCH else ""
    return Finding(axis="Algorithm", name="padding", value=ignored / n, sentence=f"{said}.", fix=fix)


# --- of the text


def duplicates(corpus: Corpus) -> Finding:
    """Return the share of the training tokens in passages that occur more than once."""
    length, text = passage_tokens(corpus), corpus.train[:MOST_READ]
    share = share_covered(repeated(passage_hashes(text, length)), length)
    forget(corpus.train)
    sentence = (
        f"{percent(share, 1)} of the training tokens lie in passages of {length} tokens that occur more than once; "
        f"{_read(text, corpus.train)} tokens were compared. A share above {percent(DUPLICATES)} is a fault."
    )
    fix = "Remove repeated documents from the text first: their passages are trained on more often than the rest."
    fix = fix if share > DUPLICATES else ""
    return Finding(axis="Data", name="duplicates", value=share, sentence=sentence, fix=fix)


def held_out_leak(corpus: Corpus) -> Finding:
    """Return the share of the held-out tokens in passages that also occur in the training text."""
    length, text, other = passage_tokens(corpus), corpus.val[:MOST_HELD_OUT], corpus.train[:MOST_READ]
    share = share_covered(occurring(passage_hashes(text, length), passage_hashes(other, length)), length)
    forget(corpus.train)
    sentence = (
        f"{percent(share, 1)} of the held-out tokens lie in passages of {length} tokens that also occur in the "
        f"training text; {_read(text, corpus.val)} tokens were looked for in {_read(other, corpus.train)}. A share "
        f"above {percent(LEAK)} is a fault."
    )
    fix = "Hold out text that has no copy in the training text first; the held-out loss is too low until then."
    fix = fix if share > LEAK else ""
    return Finding(axis="Data", name="held_out_leak", value=share, sentence=sentence, fix=fix)


def _read(part: NDArray[Any], whole: NDArray[Any]) -> str:
    return f"all {len(whole):,}" if len(part) == len(whole) else f"the first {len(part):,} of {len(whole):,}"


def passage_tokens(corpus: Corpus) -> int:
    """Return the number of tokens of a passage, which has about PASSAGE_BYTES bytes."""
    return max(1, round(PASSAGE_BYTES / corpus.bytes_per_token))


def passage_hashes(tokens: NDArray[Any], length: int) -> NDArray[np.uint64]:
    """Return the hash of each passage of this length: length - 1 fewer than tokens, or none."""
    if len(tokens) < length:
        return np.empty(0, dtype=np.uint64)
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * MIX
    mixed ^= mixed >> np.uint64(32)
    sums = np.cumsum(mixed * _powers(BASE, len(tokens)))
    hashes = sums[length - 1 :].copy()
    hashes[1:] -= sums[:-length]
    return hashes * _powers(pow(BASE, -1, 1 << 64), len(hashes))


def _powers(base: int, n: int) -> NDArray[np.uint64]:
    """Return base to the power of 0, 1, 2, ..., n - 1, modulo 2^64."""
    factors = np.full(n, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors, out=factors)


def repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each hash if another one is equal."""
    order = np.argsort(hashes)  # np.unique would take twice the memory
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    out = np.zeros(len(hashes), dtype=bool)
    out[order[1:][same]] = out[order[:-1][same]] = True
    return out


def occurring(hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each of some hashes if it is among many others."""
    if not len(others):
        return np.zeros(len(hashes), dtype=bool)
    others = np.sort(others)
    return others[np.searchsorted(others, hashes).clip(max=len(others) - 1)] == hashes


def share_covered(starts: NDArray[np.bool_], length: int) -> float:
    """Return the share of the tokens that are in one of the passages marked at their start; 0 for no passage."""
    if not len(starts):
        return 0.0
    begun = np.concatenate(([0], np.cumsum(starts, dtype=np.int32)))  # marked passages that begin before a token
    tokens = np.arange(len(starts) + length - 1, dtype=np.int32)
    inside = begun[(tokens + 1).clip(max=len(starts))] > begun[(tokens + 1 - length).clip(min=0)]
    return float(inside.mean())
