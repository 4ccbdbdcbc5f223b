"""Rotary position embedding, interleaved as DeepSeek has it, and YaRN for a context longer than the trained one.

A head's dimensions are rotated in adjacent pairs (x0, x1), (x2, x3), ... and stay where they are. Pair j at position p
is rotated by p * theta^(-2j/d). Only differences of positions reach the attention logit q.k.

YaRN (Peng et al. 2023) stretches a context by `factor`: pairs that turn often within the original context keep their
frequency, pairs that hardly turn are slowed by the factor, a linear ramp blends those between. The logits are also made
sharper, by m(a)^2 with m(a) = 0.1 a ln(factor) + 1.
"""

import math
from dataclasses import dataclass, fields

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dsmini.config import ModelConfig

CosSin = tuple[Float[Tensor, "*#b s pairs"], Float[Tensor, "*#b s pairs"]]
"""Cosine and sine of every position's angles, in FP32."""


def apply_rope(x: Float[Tensor, "b s h r"], cos_sin: CosSin) -> Float[Tensor, "b s h r"]:
    """Rotate adjacent pairs of x's last dimension. The result is computed in FP32 and returned in x's dtype.

    A pair (x0, x1) is the complex number x0 + i x1, multiplied by cos + i sin.

    Source: Su et al. 2021; DeepSeek's released code for the interleaved pairs.
    """
    cos, sin = (t.unsqueeze(-2) for t in cos_sin)
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def apply_rope_to_halves(x: Float[Tensor, "b s h r"], cos_sin: CosSin) -> Float[Tensor, "b s h r"]:
    """Rotate pairs of x's two halves, (x_j, x_{j + r/2}), by the same angles as apply_rope the adjacent ones.

    Source: DeepSeek-V3.2's indexer; GPT-NeoX, whose order most other models have.
    """
    pairs = rearrange(x, "b s h (two p) -> b s h (p two)", two=2)
    return rearrange(apply_rope(pairs, cos_sin), "b s h (p two) -> b s h (two p)", two=2)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding of `dim` dimensions, with options of ModelConfig; it holds no tensors.

    original_seq_len None turns YaRN off.
    """

    dim: int
    rope_theta: float = 10000.0
    original_seq_len: int | None = None
    rope_factor: float = 40.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    @classmethod
    def from_config(cls, config: ModelConfig) -> "Rope":
        """Make the rotary embedding of a model's heads; YaRN only if its context is extended."""
        own = {field.name: getattr(config, field.name) for field in fields(cls) if field.name != "dim"}
        dim = config.qk_nope_head_dim if config.is_baseline else config.qk_rope_head_dim
        return cls(**own | {"dim": dim, "original_seq_len": config.original_seq_len if config.extended else None})

    def frequencies(self, device: torch.device | None = None) -> Float[Tensor, " pairs"]:
        """Return the radians per position of each pair. FP32, as the released models were trained."""
        pair = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device)
        base = 1.0 / self.rope_theta ** (pair / self.dim)
        if self.original_seq_len is None:
            return base
        low = max(math.floor(self._pair_turning(self.beta_fast)), 0)
        high = min(math.ceil(self._pair_turning(self.beta_slow)), self.dim - 1)
        ramp = (torch.arange(self.dim // 2, dtype=torch.float32, device=device) - low) / (high - low or 0.001)
        stretched = ramp.clamp(0, 1)
        return base / self.rope_factor * stretched + base * (1 - stretched)

    def _pair_turning(self, turns: float) -> float:
        """Return the (fractional) pair that makes this many turns within the original context."""
        assert self.original_seq_len is not None
        return self.dim * math.log(self.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

    def cos_sin(self, positions: Int[Tensor, "*b s"]) -> CosSin:
        """Return cos and sin of each position's angles, FP32; with YaRN, times m(mscale) / m(mscale_all_dim)."""
        angles = positions[..., None].float() * self.frequencies(positions.device)
        if self.original_seq_len is None:
            return angles.cos(), angles.sin()
        ratio = self._m(self.mscale) / self._m(self.mscale_all_dim)
        return angles.cos() * ratio, angles.sin() * ratio

    def softmax_scale(self, qk_head_dim: int) -> float:
        """Return the factor on the whole logit q.k: 1/sqrt(d), with YaRN times m(mscale_all_dim)^2."""
        return qk_head_dim**-0.5 * self._m(self.mscale_all_dim) ** 2

    def _m(self, a: float) -> float:
        return 1.0 if self.original_seq_len is None else 0.1 * a * math.log(self.rope_factor) + 1.0
