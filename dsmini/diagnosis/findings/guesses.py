"""Guesses: how often would multi-token prediction be accepted in speculative decoding?

The block of depth k guesses at position i the token i + k + 1. The model itself predicts that token at position i + k.
In greedy decoding a guess is accepted if both say the same, and if all guesses before it were. A step that reads the
last token and all guesses then makes

    tokens of a step = 1 + sum over depths k of the share of positions where depths 1 to k agree

Worked example: one depth that agrees at 85 % of positions makes 1.85 tokens of a step (DeepSeek-V3 report, section
5.4.3: 85 to 90 %).

Simulated: blocks see the tokens of the text, not those that the model would write.
"""

import torch
from torch import Tensor

from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings.passages import Z_95
from dsmini.nn import Transformer
from dsmini.nn.losses import rows_at_a_time


@torch.no_grad()
def acceptance(model: Transformer, tokens: Tensor, documents: Tensor | None = None, steps: int = 1) -> Finding | None:
    """Return the share of guesses that agree with the model; None for a model without multi-token prediction.

    Args:
        tokens: [b, s] of a text.
        documents: number of each position's document, as in Transformer.losses.
        steps: steps that the model was trained for.
    """
    depths, s = len(model.mtp), tokens.shape[1]
    if not depths or s <= depths:
        return None
    was_training = model.training
    model.eval()
    try:
        states = model.states(tokens, documents=documents)
        said = _likeliest(model, states.normed)
        hidden, _ = model.mtp(tokens, states.given, model.embedded, documents)
        guesses = [_likeliest(model, h) for h in hidden]
    finally:
        model.train(was_training)
    # at each position that all depths guess from, [b, s - depths]: do depths 1 to k agree?
    n = s - depths
    agree = torch.stack([guess[:, :n] == said[:, k : k + n] for k, guess in enumerate(guesses, 1)])
    rows = agree.cumprod(0).double().mean(2)  # [depths, b]
    first, per_step = rows[0].mean().item(), 1 + rows.sum(0).mean().item()
    half = Z_95 * rows[0].std().item() / rows.shape[1] ** 0.5 if rows.shape[1] > 1 else 1.0
    deeper = "".join(f", {share:.0%} with all {k}" for k, share in enumerate(rows[1:].mean(1).tolist(), 2))
    words = "" if steps else " Its weights are random still, so that this says nothing about the trained model."
    return Finding(
        axis="Algorithm",
        name="acceptance",
        value=first,
        unit="share of guesses",
        low=max(0.0, first - half),
        high=min(1.0, first + half),
        is_fault=False,
        sentence=(
            f"The model agrees with {first:.0%} of the guesses of multi-token prediction{deeper}, so that a step of "
            f"speculative decoding would make {per_step:.2f} tokens.{words}"
        ),
    )


def _likeliest(model: Transformer, hidden: Tensor) -> Tensor:
    """Return the likeliest token at each position, [b, s], without all logits at a time."""
    chunks = hidden.flatten(0, 1).split(rows_at_a_time(None, model.config.vocab_size))
    return torch.cat([model.head(chunk).argmax(-1) for chunk in chunks]).view(hidden.shape[:2])
