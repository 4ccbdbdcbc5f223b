"""Drawing the next token: from logits to the sampling distribution, and the draw.

The distribution is a value of its own because speculative decoding needs it: a guess is accepted with a probability
that is the quotient of two of them.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The rule by which the next token is drawn: penalty, temperature, top-k, top-p and min-p, in this order.

    Among equally likely tokens the lowest ids are kept, on every device.

    Raises: ValueError for a value outside its range.
    """

    temperature: float = 0.0
    """Divisor of the logits. 0 takes the likeliest token, the lowest id among equals."""
    top_k: int | None = None
    """Number of likeliest tokens to draw from; None for all."""
    top_p: float | None = None
    """Least sum of the probabilities of the likeliest tokens to draw from; None for all."""
    min_p: float | None = None
    """Least probability of a token to draw, as a share of the likeliest token's; None for any."""
    repetition_penalty: float = 1.0
    """Divisor of the positive logits, and factor of the negative ones, of tokens that the row holds, prompt included.
    1 is off; above 1 there is less repetition. Source: CTRL, Keskar et al. 2019."""

    def __post_init__(self) -> None:
        t, k, p, m, r = self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        for ok, words in (
            (_is_number(t) and t >= 0, f"temperature={t} is not 0 or more; use 0 for the likeliest token"),
            (k is None or (is_whole(k) and k >= 1), f"top_k={k} is not a whole number from 1 on; leave it out for all"),
            (p is None or (_is_number(p) and 0 < p <= 1), f"top_p={p} is not above 0 and at most 1; use 0.95, say"),
            (m is None or (_is_number(m) and 0 <= m <= 1), f"min_p={m} is not from 0 to 1; use 0.05, say"),
            (_is_number(r) and r > 0, f"repetition_penalty={r} is not above 0; use 1 for none, 1.1 for a mild one"),
        ):
            if not ok:
                raise ValueError(words)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken, so that nothing is drawn."""
        return self.temperature == 0

    def penalised(self, logits: Float[Tensor, "*b v"], seen: Bool[Tensor, "*b v"] | None = None) -> Tensor:
        """Return the logits after the repetition penalty, in FP32 if there is one.

        Args:
            seen: mask of the tokens that each row holds; needed only for the penalty.

        Raises: ValueError for logits that are not finite.
        """
        _require_finite(logits)
        if self.repetition_penalty == 1:
            return logits
        assert seen is not None, "the repetition penalty needs the tokens so far"
        scores, floats = logits.float(), torch.finfo(torch.float32)
        r = min(max(self.repetition_penalty, floats.tiny), floats.max)
        penalised = torch.where(scores > 0, scores / r, scores * r).clamp(floats.min, floats.max)
        return torch.where(seen, penalised, scores)

    def likeliest(self, logits: Float[Tensor, "*b v"], seen: Bool[Tensor, "*b v"] | None = None) -> Int[Tensor, "*b"]:
        """Return the token of the largest logit after the penalty, the lowest id among equals.

        Args:
            seen: as in penalised, which raises for logits that are not finite.
        """
        return self.penalised(logits, seen).argmax(-1)

    def draw(
        self,
        logits: Float[Tensor, "b v"],
        seen: Bool[Tensor, "b v"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Int[Tensor, " b"], Tensor | None]:
        """Return the next token of each row, and the distribution that it was drawn from; None for the likeliest."""
        if self.greedy:
            return self.likeliest(logits, seen), None
        p = self.probabilities(logits, seen)
        return draw(p, generator), p

    def probabilities(self, logits: Float[Tensor, "*b v"], seen: Bool[Tensor, "*b v"] | None = None) -> Tensor:
        """Return the FP32 distribution [*b, v] of the next token of each row.

        At temperature 0 all probability lies on one token.

        Args:
            seen: as in penalised, which raises for logits that are not finite.
        """
        scores = self.penalised(logits, seen).float()
        if self.temperature == 0:
            return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        # the likeliest token at 0, which no filter drops; 0 / tiny is still 0, but 0 / 1e-50 in FP32 is 0 / 0
        scores = (scores - scores.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(~_top_k(scores, self.top_k), -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            scores = scores.masked_fill(~_top_p(scores.softmax(-1), self.top_p), -torch.inf)
        if self.min_p is not None:
            scores = scores.masked_fill(scores.exp() < self.min_p, -torch.inf)
        return scores.softmax(-1)


def log_probabilities(logits: Float[Tensor, "*b v"], tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Return the logarithm of each token's probability in the softmax of its logits, in nats, FP32."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def draw(probabilities: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
    """Draw one token for each row with a probability proportional to its weight.

    The draw is on the generator's device, so that a seed gives the same tokens on every device of the model.
    """
    device = probabilities.device if generator is None else generator.device
    p = probabilities.to(device)
    # a race of exponential waiting times, as torch.multinomial runs it for one draw, without its checks
    drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
    return drawn.to(probabilities.device)


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Return a mask of the k highest scores of each row."""
    return _highest(scores, k, scores.topk(k, -1).values[..., -1:])


def _top_p(probabilities: Tensor, p: float) -> Tensor:
    """Return a mask of the fewest likeliest tokens of each row that together reach p."""
    # a token with no more than its share of 1 - p is not needed: few are left to be sorted, unless rounding wants all
    size = int((probabilities > (1 - p) / probabilities.shape[-1]).sum(-1).max())
    for count in (max(1, size), probabilities.shape[-1]):
        likeliest = probabilities.topk(count, -1).values
        sums = likeliest.cumsum(-1)
        if bool((sums[..., -1] >= p).all()):
            break
    n = (F.pad(sums[..., :-1], (1, 0)) < p).sum(-1, keepdim=True).clamp(min=1)
    return _highest(probabilities, n, likeliest.gather(-1, n - 1))


def _highest(x: Tensor, n: Tensor | int, least: Tensor) -> Tensor:
    """Return a mask of the n highest numbers of each row, down to `least`, and the first of those that equal it."""
    above, level = x > least, x == least
    return above | (level & (level.cumsum(-1) <= n - above.sum(-1, keepdim=True)))


def _require_finite(scores: Float[Tensor, "*b v"]) -> None:
    """Raise ValueError for a logit that is NaN or infinite."""
    if not all(map(math.isfinite, map(float, scores.aminmax()))):  # NaN is the smallest and the largest number then
        row, *_, token = at = tuple(int(i) for i in (~scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"row {row}: the model gives token {token} the logit {scores[at].item()}, which is not finite; "
            "its weights are damaged, or too large for this dtype: try float32"
        )


def is_whole(value: object) -> bool:
    """Return True for an integer of Python or numpy, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
