"""Speculative decoding with multi-token prediction as the draft (DeepSeek-V3 report, section 5.4.3).

The multi-token prediction blocks guess the tokens after a row's last one. The model sees the last token and all guesses
in one forward. A guess x drawn from q is accepted with probability min(1, p(x) / q(x)) (Leviathan et al. 2023). The
first one that is rejected is drawn again from max(p - q, 0), normalised. The result is distributed as without guesses.
In greedy decoding, p and q lie on one token each, and the tokens are the same.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini.inference.fused import Decoder
from dsmini.inference.sampling import Sampling, draw
from dsmini.nn import Cache
from dsmini.nn.cache import MTPCache, last_valid

if TYPE_CHECKING:
    from dsmini.nn.transformer import Transformer


class Unseen(NamedTuple):
    """Tokens of the last step, which the blocks of multi-token prediction have not seen."""

    tokens: Int[Tensor, "b n"]
    """Padded on the right."""
    before: Float[Tensor, "b n *streams m"]
    """The model's hidden state at the position before each token, States.given."""
    counts: list[int]
    """Number of tokens of each row; 0 in rows that have ended."""


class Drafter:
    """The guesses of multi-token prediction, and its state between the steps of a generation.

    The blocks run later than the model: they see a step's tokens only when the next guesses are made.

    Args:
        cache: the generation's cache, made with mtp=True.
    """

    def __init__(
        self, decoder: Decoder, cache: Cache, sampling: Sampling, generator: torch.Generator | None = None
    ) -> None:
        assert cache.mtp is not None, "the cache was made with mtp=True"
        self.decoder: Decoder = decoder
        self.model: Transformer = decoder.model
        self.sampling: Sampling = sampling
        self.generator: torch.Generator | None = generator
        self.cache: Cache = cache
        self.mtp: MTPCache = cache.mtp
        self.depths: int = len(self.model.mtp)
        self._unseen: Unseen | None = None
        """None: the one token after those that were read."""

    def read(
        self, tokens: Int[Tensor, "b s"], given: Float[Tensor, "b s m"], lengths: Int[Tensor, " b"] | None
    ) -> None:
        """Show tokens of the prompts to the blocks.

        Args:
            given: the model's hidden states at these tokens, States.given.
            lengths: number of tokens in each row; None: all columns.
        """
        before = self.mtp.shift(0, given, lengths)
        self.decoder.mtp(self.model.embedded(tokens), before, self.mtp, lengths, tokens)
        self._unseen = None

    def guess(
        self, last: Int[Tensor, "b 1"], live: list[bool], seen: Bool[Tensor, "b v"] | None
    ) -> tuple[Int[Tensor, "b depths"], list[Any]]:
        """Return a guess of each depth and the distributions of the guesses; no guess if the cache is full.

        In greedy decoding a distribution is None.

        Args:
            last: the last token of each row.
            live: rows that have not ended.
            seen: tokens that each row holds, for the repetition penalty.
        """
        # 1. show the certain tokens to all depths; each then has a state for the next token: [b, m]
        tokens, before, counts = self._unseen or Unseen(last, self.mtp.last[0][:, None], [1] * len(last))
        whole = all(live) and all(n == tokens.shape[1] for n in counts)
        new = None if whole else torch.tensor(counts, device="cpu") * torch.tensor(live, device="cpu")
        has_room = int(self.cache.lengths.max()) + 1 + self.depths <= self.cache.max_seq_len
        normed = self.decoder.mtp(self.model.embedded(tokens), before, self.mtp, new, tokens)
        if not has_room:
            return last[:, :0], []
        states = [last_valid(hidden, new, hidden[:, 0]) for hidden in normed]
        # 2. draw one guess of each depth, [b], and show it to the deeper ones
        given = list(self.mtp.last)
        guesses: list[Tensor] = []
        distributions: list[Any] = []
        for k in range(self.depths):
            token, p = self.sampling.draw(self.decoder.logits(states[k]), seen, self.generator)
            guesses.append(token)
            distributions.append(p)
            if seen is not None:
                seen = seen.scatter(1, guesses[k][:, None], True)
            self._show(k, guesses[k], states, given)
        return torch.stack(guesses, 1), distributions

    def _show(self, k: int, guess: Int[Tensor, " b"], states: list[Tensor], given: list[Tensor]) -> None:
        """Show the guess of depth k to the deeper ones, and update their states and inputs in place.

        The cache rows of guesses are overwritten later by those of certain tokens.
        """
        if k + 1 == self.depths:
            return
        token, window, before = guess[:, None], self.mtp.place(1, skipped=k), list(given)
        embedding = self.model.embedded(token)
        for deeper in range(k + 1, self.depths):
            inputs = deeper, embedding, before[deeper][:, None]
            normed, gives = self.decoder.mtp_depth(*inputs, self.mtp, window, token)
            states[deeper] = normed[:, 0]
            if deeper + 1 < self.depths:
                given[deeper + 1] = gives[:, 0]

    def drop_rejected(
        self,
        start: Int[Tensor, " b"],
        tokens: Int[Tensor, "b n"],
        counts: list[int],
        given: Float[Tensor, "b s m"],
    ) -> None:
        """Drop the rejected guesses from the cache, and store the tokens that the blocks see next.

        Args:
            start: valid length of each row before the step.
            tokens: the new tokens of each row, padded on the right.
            counts: number of new tokens of each row; 0 in rows that have ended.
            given: the model's hidden states at the last token and the guesses, States.given.
        """
        if any(0 < n < given.shape[1] for n in counts):
            self.cache.truncate(start + torch.tensor(counts, device="cpu"))
        self._unseen = Unseen(tokens, given[:, : tokens.shape[1]], counts)

    def select(self, rows: list[int]) -> None:
        """Select these rows, in this order. The cache's owner selects the rows of the cache."""
        if self._unseen is not None:
            tokens, before, counts = self._unseen
            self._unseen = Unseen(tokens[rows], before[rows], [counts[row] for row in rows])


def accept_greedy(guesses: list[int], likeliest: list[int]) -> list[int]:
    """Return what greedy decoding takes of one row: the guesses that are the model's own tokens, and one more token.

    Args:
        likeliest: the model's tokens after the last one and after each guess.
    """
    same = [guess == token for guess, token in zip(guesses, likeliest, strict=False)]
    return likeliest[: [*same, False].index(False) + 1]


def accept(
    guesses: list[int], q: list[Tensor], p: Float[Tensor, "n v"], generator: torch.Generator | None
) -> list[int]:
    """Return the accepted guesses of one row, and one more token.

    Args:
        q: the distribution [v] of each guess.
        p: the model's distributions after the last token and after each guess.
    """
    device = "cpu" if generator is None else generator.device
    for i, guess in enumerate(guesses):
        if torch.rand((), generator=generator, device=device).item() * q[i][guess].item() >= p[i, guess].item():
            rest = (p[i] - q[i]).clamp(min=0)
            return [*guesses[:i], int(draw((rest if rest.any() else p[i])[None], generator))]
    return [*guesses, int(draw(p[len(guesses)][None], generator))]
