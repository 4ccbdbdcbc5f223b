"""FP4 in DeepSeek-V4's blocks: exhaustive tables, and a second definition by fractions, one number after the other."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini import ops
from dsmini.numerics import E2M1, dequantize_fp4, dequantize_tiles, fp4_to_fp8, quantize, quantize_fp4, round_fp4
from tests.helpers.configs import refusal
from tests.helpers.quantizer import same

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
EVERY_CODE = torch.tensor([*VALUES, *(-v for v in VALUES)])


def defined(row: list[float]) -> tuple[list[int], int]:
    """Return the codes and the scale's byte of one block of FP32 numbers, by exact fractions."""
    amax = max(abs(Fraction(x)) for x in row)
    exponent = -126
    while 6 * Fraction(2) ** exponent < amax:
        exponent += 1
    codes = []
    for x in row:
        size = abs(Fraction(x)) / Fraction(2) ** exponent
        code = min(range(8), key=lambda i: (abs(size - Fraction(VALUES[i])), i % 2))
        codes.append(code + 8 * (math.copysign(1, x) < 0))
    return codes, exponent + 127


def codes_of(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def test_every_byte_decodes_as_the_table_does() -> None:
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    want = torch.stack((EVERY_CODE.repeat(16), EVERY_CODE.repeat_interleave(16)), -1)
    assert same(E2M1.decode(packed), want) and torch.equal(E2M1.encode(want), packed)
    assert same(E2M1.decode(packed.view(torch.int8)), want), "folders hold codes as int8"


def test_every_scale() -> None:
    """Bytes 0 to 254 are 2^-127 to 2^127, and 255 is NaN."""
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    packed = torch.full((256, 16), 0x22, dtype=torch.uint8)
    got = dequantize_fp4(packed, scales)
    assert torch.equal(got[:255, 0].double(), 2.0 ** torch.arange(-127, 128).double()) and got[255].isnan().all()
    assert torch.equal(dequantize_fp4(packed, scales, torch.bfloat16)[1:255].float(), got[1:255])


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
blocks = st.lists(
    finite | st.sampled_from([0.0, -0.0, 1e-45, 2.0**-126, 6 * 2.0**-126, 3.4e38]), min_size=8, max_size=8
)
quarters = st.lists(st.tuples(st.integers(-24, 24), st.integers(-1, 1)), min_size=8, max_size=8)
# blocks up to 6 times a power of two: codes, points halfway between two, and numbers of FP32 next to them
near = st.tuples(quarters, st.integers(-100, 120)).map(
    lambda drawn: [math.ldexp(n * 2**19 + beside, drawn[1] - 21) for n, beside in drawn[0]]
)


@given(st.lists(blocks | near, min_size=1, max_size=3), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_codes_scales_and_values_are_those_of_the_definition(rows: list[list[float]], dtype: str) -> None:
    x = torch.tensor(rows).clamp(-6e4, 6e4).to(torch.float16) if dtype == "float16" else torch.tensor(rows)
    x = x.to(getattr(torch, dtype)).view(1, -1)  # several blocks in a row
    if not x.isfinite().all():
        return
    want = [defined(row) for row in x.view(-1, 8).tolist()]
    for backend in ("reference", None):
        with ops.use(backend) if backend else ops.use("eager"):
            packed, scales = quantize_fp4(x, 8)
            rounded = round_fp4(x, 8)
        assert codes_of(packed).view(-1, 8).tolist() == [codes for codes, _ in want]
        assert scales.flatten().tolist() == [scale for _, scale in want]
        assert rounded.dtype == x.dtype and same(rounded, dequantize_fp4(packed, scales, x.dtype))


def test_a_block_with_nan_or_infinity_is_nan_alone() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 96)
        x[1, 40] = bad
        packed, scales = quantize_fp4(x)
        assert scales.tolist() == [[125] * 3, [125, 255, 125]]
        for got in (round_fp4(x), dequantize_fp4(packed, scales)):
            assert got[1, 32:64].isnan().all() and got.isnan().sum() == 32


@pytest.mark.parametrize("shape", [(64,), (0, 32), (3, 0), (2, 3, 64)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    packed, scales = quantize_fp4(x)
    assert packed.shape == (*shape[:-1], shape[-1] // 2) and scales.shape == (*shape[:-1], shape[-1] // 32)
    assert packed.dtype == scales.dtype == torch.uint8
    assert torch.equal(round_fp4(x), dequantize_fp4(packed, scales)) and round_fp4(x).shape == shape


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    weights = torch.randn(2, 32)
    (round_fp4(x) * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


def test_what_fp4_cannot_hold_is_refused() -> None:
    packed, scales = quantize_fp4(torch.ones(2, 64))
    for words, call, *arguments in (
        ("rows of 33 numbers have no whole blocks of 32 in FP4", round_fp4, torch.ones(2, 33)),
        ("want a multiple of it", quantize_fp4, torch.ones(2, 48)),
        ("3 in FP4", round_fp4, torch.ones(6), 3),
        ("float64", round_fp4, torch.ones(32).double()),
        ("do not fit", dequantize_fp4, packed, scales[:1]),
        ("do not fit", dequantize_fp4, packed, torch.ones(2, 3, dtype=torch.uint8)),
    ):
        assert words in refusal(call, *arguments)


# to FP8


@pytest.mark.parametrize("shape", [(256, 256), (130, 160), (3, 2, 32)])
def test_fp4_becomes_fp8_without_loss(shape: tuple[int, ...]) -> None:
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    for low, high in ((110, 117), (1, 8), (248, 255)):  # at most 2^6 apart
        scales = torch.randint(low, high, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8)
        codes, block_scales = fp4_to_fp8(packed, scales)
        assert codes.dtype == torch.float8_e4m3fn
        assert block_scales.shape[-2:] == (-(-shape[-2] // 128), -(-shape[-1] // 128))
        assert same(dequantize_tiles(codes, block_scales, (128, 128)), dequantize_fp4(packed, scales))


def test_fp4_whose_scales_are_too_far_apart_for_fp8() -> None:
    packed, scales = torch.full((128, 64), 0x11, dtype=torch.uint8), torch.full((128, 4), 100, dtype=torch.uint8)
    scales[5, 2] = 114
    assert same(dequantize_tiles(*fp4_to_fp8(packed, scales), (128, 128)), dequantize_fp4(packed, scales))
    scales[5, 2] = 115
    assert "more than 2^14 apart" in refusal(fp4_to_fp8, packed, scales)
    packed[5, 32:48] = 0  # zeros have any scale
    assert same(dequantize_tiles(*fp4_to_fp8(packed, scales), (128, 128)), dequantize_fp4(packed, scales))


def test_quantize_knows_the_format() -> None:
    x = torch.randn(4, 33)  # in general a last code may stand alone
    q = quantize(x, (1, 16), format="e2m1")
    assert q.codes.shape == (4, 17) and q.nbytes == 4 * 17 + 4 * 4 * 3
    assert (q.dequantize() - x).abs().max() <= q.scales.max()
