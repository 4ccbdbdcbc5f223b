"""Define number formats shorter than BF16: a sign, a few bits of exponent, a few of fraction.

    e4m3   S.EEEE.FFF      reaches 448, steps of 1/8 to 1/16 of a value; nearly everything in DeepSeek-V3's FP8
    e5m2   S.EEEEE.FF      reaches 57344 with half the precision; others use it for gradients
    e5m6   S.EEEEE.FFFFFF  12 bits, reaches 65024; DeepSeek-V3 keeps the input of the Linear after attention in it
    e2m1   S.EE.F          4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6; DeepSeek-V4's experts
    ue8m0  EEEEEEEE        powers of two, for scales: multiplying by one rounds nothing

With exponent field e, fraction f and m fraction bits a value is (1 + f / 2^m) 2^(e - bias), and for e = 0, where the
format runs out of exponents, (f / 2^m) 2^(1 - bias).

Source: Micikevicius et al. 2022 (E4M3, E5M2); OCP microscaling formats 1.0 (E2M1, UE8M0); DeepSeek-V3 report, section
3.3 (E5M6).
"""

import functools
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Format:
    """A signed format of at most 16 bits."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    """Bits of fraction; the leading one is not stored."""
    bias: int
    max: float
    """Largest finite value."""
    nan: int
    """Code of NaN, without sign; 0 in E2M1, which has none."""
    dtype: torch.dtype
    """Type of codes. Where torch has none it is uint8, with eight codes packed in twelve bytes, or two in one."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def packing(self) -> tuple[int, int]:
        """Number of codes that are stored together, and of elements of dtype that hold them."""
        return {12: (8, 12), 4: (2, 1)}.get(self.bits, (1, 1))

    @property
    def packed(self) -> bool:
        """True if codes share elements."""
        return self.packing != (1, 1)

    def width(self, columns: int) -> int:
        """Return the number of elements that hold the codes of this many columns."""
        codes, elements = self.packing
        return -(-columns // codes) * elements

    def round(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the nearest value in FP32, ties to an even last bit.

        Values beyond max and infinities become max; NaN stays NaN.

        Raises: ValueError for FP64, which would be rounded twice.
        """
        x = _single(x).clamp(-self.max, self.max)
        if not self.packed:
            return x.to(self.dtype).float()
        # a number so large that adding it in FP32 rounds to the format's last bit
        exponent = (x.abs().view(torch.int32) >> 23).clamp(min=128 - self.bias)
        magic = (exponent + 23 - self.mantissa_bits << 23).view(torch.float32)
        return torch.copysign((x.abs() + magic) - magic, x)

    def encode(self, x: Float[Tensor, "*batch c"]) -> Tensor:
        """Return the codes of `round(x)`, in the format's dtype and x's shape; packed, [*batch, width(c)] bytes.

        Packed code 2i of E5M6 is the first of three bytes and the low four bits of the second; code 2i + 1 is the rest.
        In E2M1 it is the low four bits of a byte. Zeros fill up the last bytes.

        Raises: ValueError for FP64, which would be rounded twice.
        """
        x = _single(x).clamp(-self.max, self.max)  # before torch 2.12 the cast does not saturate
        x = torch.where(x.isnan(), torch.nan, x)  # one code for NaN, whatever its sign
        if not self.packed:
            return x.to(self.dtype)
        # with FP16's bias and without its last bits of fraction it is FP16
        half = (self.round(x).abs() * 2.0 ** (self.bias - 15)).half().view(torch.int16).int()
        code = half >> 10 - self.mantissa_bits | x.signbit().int() << self.bits - 1
        code = F.pad(torch.where(x.isnan(), self.nan, code), (0, -code.shape[-1] % self.packing[0]))
        even, odd = code.unflatten(-1, (-1, 2)).unbind(-1)
        pair = even | odd << self.bits
        stored = [(pair >> at & 0xFF).to(torch.uint8) for at in range(0, 2 * self.bits, 8)]
        return torch.stack(stored, -1).flatten(-2)

    def decode(self, codes: Tensor, columns: int | None = None) -> Float[Tensor, "*batch c"]:
        """Return the FP32 values of codes.

        Args:
            columns: c; needed if codes are packed and do not fill the last bytes.
        """
        if not self.packed:
            return codes.view(self.dtype).float()
        codes = codes.view(self.dtype)
        places = range(0, 2 * self.bits, 8)
        stored = codes.unflatten(-1, (-1, len(places))).int().unbind(-1)
        pair = functools.reduce(torch.add, (byte << at for byte, at in zip(stored, places, strict=True)))
        sign = 1 << self.bits - 1
        code = torch.stack((pair & 2 * sign - 1, pair >> self.bits), -1).flatten(-2)[..., :columns]
        half = ((code & sign - 1) << 10 - self.mantissa_bits).to(torch.int16).view(torch.float16)
        values = torch.where(code < sign, half, -half).float() * 2.0 ** (15 - self.bias)
        return values.masked_fill(values.isinf(), torch.nan)  # E5M6 has none


E4M3 = Format(name="e4m3", exponent_bits=4, mantissa_bits=3, bias=7, max=448.0, nan=0x7F, dtype=torch.float8_e4m3fn)
"""E4M3 without infinities: only the topmost code is not a number."""
E5M2 = Format(name="e5m2", exponent_bits=5, mantissa_bits=2, bias=15, max=57344.0, nan=0x7F, dtype=torch.float8_e5m2)
E5M6 = Format(name="e5m6", exponent_bits=5, mantissa_bits=6, bias=15, max=65024.0, nan=0x7FF, dtype=torch.uint8)
E2M1 = Format(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, max=6.0, nan=0, dtype=torch.uint8)
"""E2M1 without infinities and NaN."""
FORMATS = MappingProxyType({f.name: f for f in (E4M3, E5M2, E5M6, E2M1)})


def next_power_of_two(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return the smallest power of two, 2^-126 or more, that is not below x, for FP32 x >= 0: a scale in UE8M0.

    Zero, infinity and NaN stay. Computed by bits: a logarithm is wrong next to powers of two. Rounding is up, so that a
    number divided by its scale still fits.
    """
    up = ((x.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(x.isnan(), x, up)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in FP32, or in FP64 if it is that already: the least precision of norms, softmax, gates and losses."""
    return x if x.dtype == torch.float64 else x.float()


def _single(x: Tensor) -> Tensor:
    """Return x in FP32, for a rounding to come."""
    if x.dtype == torch.float64:
        raise ValueError(
            "x is torch.float64; want float32, bfloat16 or float16: FP64 would be rounded twice; "
            "use x.float() to accept that"
        )
    return x.float()
