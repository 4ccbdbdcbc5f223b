"""Drafts: multi-token prediction guesses ahead, and the model checks all guesses in one step.

With n blocks a step takes 1 + n tokens of each sequence and keeps the guesses that are accepted, and one token more:

    seconds of a token = seconds of a step with guesses / (1 + accepted guesses a step)

Worked example: a step of 10 ms, and 13 ms with one guess, of which 60 % are accepted. A token takes 13 / 1.6 = 8.1 ms:
guessing gains 19 %. At 20 % accepted it takes 10.8 ms, and guessing loses 8 %.

The share of accepted guesses depends on the text and on the training, not on the machine. So it is counted on its own,
in a short greedy generation, and enters the prediction.

Source: DeepSeek-V3 report, section 5.4.3 (85 to 90 % accepted).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsmini.diagnosis.decoding.steps import Point, Run, fill, tokens_of
from dsmini.diagnosis.finding import Finding
from dsmini.inference import Generation
from dsmini.inference.fused.decoder import Decoder
from dsmini.inference.sampling import Sampling, likeliest
from dsmini.inference.speculative import Drafter, agreed
from dsmini.measure.workloads import ROOM
from dsmini.nn import Transformer

PROMPT, NEW_TOKENS, SECONDS = 64, 96, 4.0
"""Most tokens of a prompt, most new tokens, and seconds after which the counting of accepted guesses ends."""
Z_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Guesses that were made and accepted."""

    drafted: int
    accepted: int
    tokens_per_step: float
    """New tokens of a sequence in a step."""

    @property
    def share(self) -> float:
        return self.accepted / max(1, self.drafted)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share: it holds for few guesses and for shares near 0 and 1."""
        n, p, z2 = max(1, self.drafted), self.share, Z_95**2
        middle, half = p + z2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def acceptance(model: Transformer, rows: Sequence[Sequence[int]], seconds: float = SECONDS) -> Acceptance:
    """Count the accepted guesses of a short greedy generation after these texts."""
    room = model.config.max_seq_len
    prompts = [row[: min(PROMPT, room // 2)] for row in rows]
    new = min(NEW_TOKENS, room - max(map(len, prompts)))
    generation = Generation(model, prompts, new, speculative=True)
    start = time.perf_counter()
    for _ in generation:
        if time.perf_counter() - start > seconds:
            break
    stats = generation.stats
    steps = max(1, stats.drafted // len(model.mtp))
    return Acceptance(drafted=stats.drafted, accepted=stats.accepted, tokens_per_step=1 + stats.accepted / steps)


def acceptance_finding(found: Acceptance, trained: bool) -> Finding:
    """Return the share of accepted guesses; a figure, never a fault."""
    low, high = found.interval
    words = (
        f"Of {found.drafted:,} guesses of multi-token prediction {found.share:.0%} are accepted ({low:.0%} to "
        f"{high:.0%}), in greedy decoding: {found.tokens_per_step:.2f} tokens a step."
    )
    if not trained:
        words += " The weights are random, so that this says nothing about a trained model."
    return Finding(
        axis="Algorithm",
        name="accepted_guesses",
        value=found.share,
        unit="",
        low=min(low, found.share),
        high=max(high, found.share),
        is_fault=False,
        sentence=words,
    )


def guessing_steps(model: Transformer, point: Point) -> Run:
    """Return steps in which multi-token prediction guesses and the model checks; each is back at the point."""
    decoder, tokens = Decoder(model), tokens_of(model, point)
    room = min(ROOM, model.config.max_seq_len - point.context)
    cache = model.new_cache(point.batch, point.context + room, mtp=True)
    mtp = cache.mtp
    assert mtp is not None, "the cache was made with mtp=True"
    fill([*cache.stores, *mtp.stores], point.context)
    lengths = torch.full((point.batch,), point.context)
    live, hidden = [True] * point.batch, [torch.randn_like(each) for each in mtp.last]

    @torch.no_grad()
    def step() -> object:
        cache.lengths, mtp.lengths, mtp.last = lengths.clone(), lengths.clone(), list(hidden)
        guesses, _ = Drafter(decoder, cache, Sampling()).guess(tokens, live, None)
        states = decoder.states(torch.cat((tokens, guesses), 1), cache)
        best = likeliest(model.head(states.normed))
        return [agreed(*row) for row in zip(guesses.tolist(), best.tolist(), strict=True)]

    return step
