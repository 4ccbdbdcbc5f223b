"""Guessing ahead with multi-token prediction: how often guesses are right, what a step costs, what is gained.

A step without guesses makes one token. A step with guesses of depth d reads d + 1 tokens at once, and keeps as many as
the trunk agrees with. Guessing pays where tokens a step are more than a step costs in steps without.
"""

import itertools
import operator

import torch
from torch import Tensor

from dsmini.inference.generation import Generation, Stats, generate
from dsmini.measure import prediction
from dsmini.measure.counting import count
from dsmini.measure.rates import Roofs
from dsmini.nn import Transformer


def step_seconds(model: Transformer, prompt: Tensor, speculative: bool, roofs: Roofs) -> float:
    """Predict the seconds of a decoding step, from the operations that it counts."""
    generation = Generation(model, [prompt.tolist()], 8, speculative=speculative)
    for _ in range(2):  # reads the prompt; prepares what later steps reuse
        next(generation)
    return prediction.seconds(count(lambda: next(generation), roofs.cache_bytes), roofs)


def tokens_per_step(kept: list[float]) -> float:
    """Compute the expected tokens of a step: one, and for each depth the chance that all guesses up to it are kept.

    Args:
        kept: at k - 1 the probability that the guess of depth k is kept if those before it were.
    """
    return 1.0 + sum(itertools.accumulate(kept, operator.mul))


@torch.inference_mode()
def expected_acceptance(model: Transformer, tokens: Tensor, temperature: float) -> list[float]:
    """Compute for each depth how probably its guess is kept after real text, if the guesses before it were right.

    That is the sum of min(p, q) over the vocabulary; in greedy decoding, the share of places where both prefer the
    same token.
    """
    out = model.run(tokens, mtp=True)
    kept: list[float] = []
    for k, logits in enumerate(out.mtp_logits, 1):
        pair = out.logits[:, k:].float(), logits.float()  # both of token i + k + 1
        if temperature:
            p, q = ((each / temperature).softmax(-1) for each in pair)
            kept.append(torch.minimum(p, q).sum(-1).mean().item())
        else:
            p, q = (each.argmax(-1) for each in pair)
            kept.append((p == q).float().mean().item())
    return kept


def in_turns(
    model: Transformer, prompts: list[Tensor], temperature: float, new_tokens: int
) -> tuple[list[Stats], list[Stats]]:
    """Continue each prompt without and with guesses, in turns; one more at first, which does not count."""
    stats: dict[bool, list[Stats]] = {False: [], True: []}
    for i, prompt in enumerate([prompts[0], *prompts]):
        rows: list[Tensor] = []
        for speculative in (False, True):
            generator = torch.Generator(prompt.device).manual_seed(i)
            how = {"temperature": temperature, "speculative": speculative, "generator": generator}
            done = generate(model, prompt[None], new_tokens, **how)
            rows.append(done.tokens)
            if i:
                stats[speculative].append(done.stats)
        assert temperature or torch.equal(*rows), f"guesses changed the greedy continuation of prompt {i}"
    return stats[False], stats[True]
