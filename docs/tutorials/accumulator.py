"""Sum products as the tensor cores of Hopper do, in few bits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

GROUP = 32
"""Number of products that an emulated accumulator adds at once."""
AT_A_TIME = 1 << 22
"""Maximum number of products in memory."""


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """Precision of a sum of products: the narrow accumulator of Hopper's tensor cores, emulated.

    H800 tensor cores add FP8 products at about 14 bits, not in FP32 (report, section 3.5.2). They shift 32 products at
    a time to the exponent of the largest and drop the bits that fall off the end. A growing sum loses bits in the same
    way. At K = 4096 DeepSeek saw errors of nearly 2 %. Their cure is to move the partial sum into an FP32 register
    every N_C = 128 products (section 3.3.2, figure 7b).

    Simulated: the hardware is not documented to the bit. This code truncates where the report says that bits are lost,
    and reproduces the errors that it reports. It is slow, and only for looking at errors.
    """

    bits: int = 14
    """Bits of the significand of a partial sum."""
    promote_every: int | None = 128
    """Number of products after which the partial sum moves into FP32 (N_C), a multiple of 32; None: only at the end."""

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 24:
            raise ValueError(f"bits={self.bits} is not a width of an accumulator; use 2 to 24")
        if self.promote_every is not None and (self.promote_every < GROUP or self.promote_every % GROUP):
            raise ValueError(
                f"promote_every={self.promote_every} is not a multiple of {GROUP}, in which products are added"
            )

    def matmul(self, a: Float[Tensor, "n k"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n m"]:
        """Return a b^T in FP32, each sum computed in this accumulator."""
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(f"a is {list(a.shape)}, b is {list(b.shape)}; want [n, k] and [m, k]")
        rows = max(1, AT_A_TIME // max(1, b.shape[0] * GROUP))
        parts = [self._matmul(part.float(), b.float()) for part in a.split(rows)]
        return torch.cat(parts) if parts else a.new_zeros(0, b.shape[0], dtype=torch.float32)

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], b.shape[0])
        partial = torch.zeros_like(total, dtype=torch.float64)
        for start in range(0, a.shape[1], GROUP):
            products = a[:, None, start : start + GROUP].double() * b[None, :, start : start + GROUP].double()
            exponent = _exponent(products.abs().amax(-1).maximum(partial.abs()))
            aligned = _cut(products, exponent[..., None], self.bits).sum(-1) + _cut(partial, exponent, self.bits)
            partial = _cut(aligned, _exponent(aligned.abs()), self.bits)
            if self.promote_every is not None and (start + GROUP) % self.promote_every == 0:
                total += partial.float()
                partial.zero_()
        return total + partial.float()


def _exponent(magnitude: Tensor) -> Tensor:
    """Return floor(log2), exactly; -1 for zero, of which nothing is cut."""
    return torch.frexp(magnitude).exponent - 1


def _cut(x: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """Truncate x below the last of `bits` bits of a number with that exponent."""
    step = (exponent.long() - bits + 1 + 1023 << 52).view(torch.float64)  # a power of two, by its exponent field
    return (x / step).trunc() * step
