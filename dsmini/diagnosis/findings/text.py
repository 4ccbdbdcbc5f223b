"""Findings in the text of a run: copies inside it, copies that were held out, what its frequencies alone tell.

Repeated text is worth less than its size: up to four epochs are nearly as good as fresh text, and with more the value
of another epoch falls to nothing (Muennighoff et al., "Scaling Data-Constrained Language Models", 2023). A copied
passage is trained on more often than the rest, without being counted. A run of many epochs over a small text is another
matter: `epochs` counts them.

Copied tokens in passages of 200 bytes, measured in texts of up to 16 MB:

    Tiny Shakespeare                 0.0%     Perl's library                   12%
    Python's own standard library    4.8%     SymPy                            13%
    PyTorch's Python                  11%     headers in /usr/include          27%
    Transformers, whose models are copies of each other by design              56%
    any text, written twice                                                   100%
"""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from dsmini.data.cache import forget
from dsmini.data.corpus import Corpus
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings.labels import label_damage
from dsmini.diagnosis.findings.passages import (
    BLOCK,
    EXACT,
    PASSAGE_BYTES,
    Z_95,
    CopiedShare,
    blocks_to_read,
    copied_from,
    copied_within,
)

DUPLICATES = 0.3
"""Share of copied training tokens that is a fault: above every text of the table that was not copied by design."""
LEAK = 0.1
"""Share of copied held-out tokens that is a fault: a model that knew them by heart would show a loss 10% too low. The
default corpus has 2%."""
_COUNTED = 1 << 22


def text_findings(
    corpus: Corpus,
    batches: Iterable[tuple[Tensor, Tensor]],
    seed: int = 0,
    trained: int | None = None,
    loss: float | None = None,
) -> list[Finding]:
    """Return all findings of a text and its batches.

    Args:
        trained: tokens that the run trains on, for its epochs; None leaves that finding out.
        loss: held-out loss in nats a token, to compare with the frequencies; None leaves that finding out.
    """
    found = [duplicates(corpus, seed), held_out_leak(corpus, seed), label_damage(batches, seed)]
    found.append(unigram_entropy(corpus, seed))
    if trained is not None:
        found.append(epochs(corpus, trained))
    if loss is not None:
        found.append(loss_above_frequencies(corpus, loss, seed))
    return found


def passage_tokens(corpus: Corpus) -> int:
    """Return the number of tokens of a passage, which has about PASSAGE_BYTES bytes."""
    return max(1, round(PASSAGE_BYTES / corpus.bytes_per_token))


def duplicates(corpus: Corpus, seed: int = 0) -> Finding:
    """Return the share of the training tokens in passages that occur more than once."""
    length = passage_tokens(corpus)
    share = None
    if len(corpus.train) >= length:
        share = copied_within(corpus.train, length, seed)
    return _copies(
        "duplicates",
        share,
        f"training tokens lie in passages of {length} tokens that occur more than once",
        f"The training text has {len(corpus.train):,} tokens, less than one passage of {length}",
        limit=DUPLICATES,
        fix="Remove repeated documents from the text first: their passages are trained on more often than the rest.",
    )


def held_out_leak(corpus: Corpus, seed: int = 0) -> Finding:
    """Return the share of the held-out tokens in passages that also occur in the training text."""
    length = passage_tokens(corpus)
    share = None
    if min(len(corpus.train), len(corpus.val)) >= length:
        share = copied_from(corpus.val, corpus.train, length, seed)
    return _copies(
        "held_out_leak",
        share,
        f"held-out tokens lie in passages of {length} tokens that also occur in the training text",
        f"The texts have {len(corpus.train):,} and {len(corpus.val):,} tokens, one less than a passage of {length}",
        limit=LEAK,
        fix="Hold out text that has no copy in the training text first; the held-out loss is too low until then.",
    )


def _copies(name: str, share: CopiedShare | None, words: str, too_short: str, limit: float, fix: str) -> Finding:
    if share is None:
        sentence = f"{too_short}: nothing to compare."
        share = CopiedShare(value=0.0, low=0.0, high=0.0, how="")
    else:
        interval = ""
        if share.low < share.high:
            interval = f" (95% interval {share.low:.1%} to {share.high:.1%})"
        sentence = f"{share.value:.1%}{interval} of the {words}; {share.how}. A share above {limit:.0%} is a fault."
    is_fault = share.value > limit
    return Finding(
        axis="Data",
        name=name,
        value=share.value,
        unit="share of tokens",
        low=share.low,
        high=share.high,
        is_fault=is_fault,
        sentence=sentence,
        fix=fix if is_fault else "",
    )


def epochs(corpus: Corpus, trained: int) -> Finding:
    """Return how often a run reads its training text; a figure, never a fault."""
    times = trained / len(corpus.train)
    return Finding(
        axis="Data",
        name="epochs",
        value=times,
        unit="epochs",
        low=times,
        high=times,
        is_fault=False,
        sentence=f"The run trains on {trained:,} tokens, {times:.3g} times the {len(corpus.train):,} of its text.",
    )


def unigram_entropy(corpus: Corpus, seed: int = 0) -> Finding:
    """Return the entropy of the training tokens' frequencies in nats a token; a figure, never a fault.

    A model that knows these frequencies and nothing else has this loss. Counts of n tokens of K kinds give about
    (K - 1) / 2n nats too little, which is added (Miller 1955).
    """
    text, n = corpus.train, len(corpus.train)
    starts = blocks_to_read(n, EXACT if n <= EXACT else _COUNTED, np.random.default_rng(seed))
    blocks = [np.asarray(text[start : start + BLOCK]) for start in starts.tolist()]
    read = np.concatenate(blocks)
    forget(text)
    counts = np.bincount(read)
    nats = np.log(len(read)) - np.log(np.maximum(counts, 1))  # of each kind of token
    value = float((counts * nats).sum() / len(read)) + (np.count_nonzero(counts) - 1) / (2 * len(read))
    half = 0.0
    if len(read) < n:
        half = Z_95 * float(np.std([nats[block].mean() for block in blocks], ddof=1)) / len(blocks) ** 0.5
    return Finding(
        axis="Data",
        name="unigram_entropy",
        value=value,
        unit="nats a token",
        low=value - half,
        high=value + half,
        is_fault=False,
        sentence=f"A model that knows only how frequent each token is would have a loss of {value:.3f} nats a token "
        f"(counted in {len(read):,} of {n:,} training tokens).",
    )


def loss_above_frequencies(corpus: Corpus, loss: float, seed: int = 0) -> Finding:
    """Return how far a loss in nats a token is above the entropy of the tokens' frequencies; a fault if it is above."""
    if not np.isfinite(loss):
        raise ValueError(f"loss={loss!r} cannot be compared with an entropy; want a finite loss in nats a token")
    entropy = unigram_entropy(corpus, seed)
    above = loss - entropy.value
    is_fault = loss > entropy.high
    words = f"{-above:.3f} below the {entropy.value:.3f} of the tokens' frequencies: the model knows more than these"
    fix = ""
    if is_fault:
        words = f"{above:.3f} above the {entropy.value:.3f} of the tokens' frequencies: the model knows less than these"
        fix = "Look at the first steps: the learning rate, the loss of step 1, and if the gradient reaches the head."
    return Finding(
        axis="Algorithm",
        name="loss_above_frequencies",
        value=above,
        unit="nats a token",
        low=loss - entropy.high,
        high=loss - entropy.low,
        is_fault=is_fault,
        sentence=f"The loss of {loss:.3f} nats a token is {words}.",
        fix=fix,
    )
