"""The short formats: every code against a table of exact fractions, every rounding against a search in it."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmini.numerics import E4M3, E5M2, E5M6, FORMATS, UE8M0, Format
from dsmini.numerics.formats import PowersOfTwo
from tests.helpers.configs import refusal
from tests.helpers.quantizer import LAYOUT, meant, midpoints, nearest, raw, same, stored, table

FIGURES = {  # largest, smallest normal, smallest of all: as the papers have them
    "e4m3": (448, Fraction(1, 2**6), Fraction(1, 2**9)),
    "e5m2": (57344, Fraction(1, 2**14), Fraction(1, 2**16)),
    "e5m6": (65024, Fraction(1, 2**14), Fraction(1, 2**20)),
}
EVERY = pytest.mark.parametrize("f", [E4M3, E5M2, E5M6], ids=lambda f: f.name)
ONE_BYTE = pytest.mark.parametrize("f", [E4M3, E5M2], ids=lambda f: f.name)


def all_bf16() -> Tensor:
    return torch.arange(65536).to(torch.uint16).view(torch.bfloat16)


def critical(f: Format) -> Tensor:
    """Return each value, midpoint and zero with both FP32 neighbours, in both signs; the extremes; and noise."""
    points = np.concatenate([[float(v) for v in table(f.name)], midpoints(f.name)]).astype(np.float32)
    points = np.concatenate(
        [np.nextafter(points, np.float32(-np.inf)), points, np.nextafter(points, np.float32(np.inf))]
    )
    beyond = f.max * torch.tensor([1.01, 1.03, 1.04, 1.07, 1.2, 2.0, 1e30, torch.inf, torch.nan])
    noise = torch.randn(20000) * torch.randn(20000).mul(6).exp()
    bits = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([torch.from_numpy(points), beyond, noise, bits, torch.tensor([0.0, 1e-45, 1e-38, 3.4e38])])
    return torch.cat([x, -x])


def codes_of(f: Format, x: Tensor) -> Any:
    """Return x's codes as the format stores them."""
    return raw(f.encode(x))


@EVERY
def test_range(f: Format) -> None:
    largest, normal, smallest = FIGURES[f.name]
    exponent_bits, fraction_bits, last, nan = LAYOUT[f.name]
    assert (f.max, f.min_normal, f.min_subnormal) == (largest, normal, smallest)
    assert (f.bits, f.exponent_bits, f.mantissa_bits) == (
        1 + exponent_bits + fraction_bits,
        exponent_bits,
        fraction_bits,
    )
    assert (f.nan, f.packed) == (nan, f.bits == 12)
    assert f is FORMATS[f.name]
    assert table(f.name)[-1] == largest
    assert len(table(f.name)) == last + 1
    assert min(v for v in table(f.name) if v) == smallest


def test_formats_are_immutable() -> None:
    assert list(FORMATS) == ["e4m3", "e5m2", "e5m6"]
    with pytest.raises(AttributeError):
        E4M3.max = 1.0  # pyright: ignore
    with pytest.raises(TypeError):
        FORMATS["e4m3"] = E5M2  # pyright: ignore


@EVERY
def test_values_equal_the_table(f: Format) -> None:
    values = f.values()
    assert values.dtype == torch.float32
    assert [Fraction(v) for v in values.tolist()] == list(table(f.name))


@ONE_BYTE
def test_every_byte_decodes_as_torch_and_the_table_do(f: Format) -> None:
    codes = torch.arange(256).to(torch.uint8)
    got = f.decode(codes.view(f.dtype))
    assert got.dtype == torch.float32
    assert same(got, codes.view(f.dtype).float())
    assert same(f.decode(codes), got)
    finite = got.isfinite()
    assert same(got[finite], meant(codes[finite].long().numpy(), f.name))
    assert (~finite).sum() == {"e4m3": 2, "e5m2": 8}[f.name]


def test_every_twelve_bits_decode_as_the_table_does() -> None:
    codes = np.arange(4096)
    packed = torch.from_numpy(stored(codes, "e5m6"))
    assert packed.shape == (4096 * 12 // 8,)
    want = meant(codes, "e5m6")
    assert same(E5M6.decode(packed), want)
    assert np.isnan(want).sum() == 2 * 64  # the last exponent, IEEE's for infinities, is NaN
    finite = codes[np.isfinite(want)].reshape(-1, 32)
    assert np.array_equal(raw(E5M6.encode(torch.from_numpy(meant(finite, "e5m6")))), stored(finite, "e5m6"))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_to_nearest_and_ties_to_even(f: Format, dtype: torch.dtype) -> None:
    x = {torch.bfloat16: all_bf16(), torch.float16: all_bf16().view(torch.float16), torch.float32: critical(f)}[dtype]
    want = nearest(x.float().numpy(), f.name)
    assert np.array_equal(codes_of(f, x), stored(want, f.name))
    assert f.round(x).dtype == torch.float32
    assert same(f.round(x), meant(want, f.name))
    assert same(f.decode(f.encode(x), len(x)), f.round(x))
    assert same(f.round(f.round(x)), f.round(x))


@ONE_BYTE
def test_codes_equal_those_of_torch(f: Format) -> None:
    x = torch.cat([critical(f), all_bf16().float()])
    x = x[x.abs() <= f.max]
    assert np.array_equal(codes_of(f, x), raw(x.to(f.dtype)))


@EVERY
def test_zeros_infinities_and_nan(f: Format) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1e-45])
    x[5] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN with its sign and every other bit
    sign, last = 1 << (f.bits - 1), LAYOUT[f.name][2]
    want = np.array([0, sign, last, sign + last, f.nan, f.nan, 0, sign])
    assert np.array_equal(codes_of(f, x), stored(want, f.name))
    assert same(f.round(x), [0.0, -0.0, f.max, -f.max, torch.nan, torch.nan, 0.0, -0.0])


@EVERY
def test_fp64_is_refused_since_it_would_be_rounded_twice(f: Format) -> None:
    """Check that FP64 is refused: rounded to FP32 first, a number just above a midpoint becomes a tie."""
    above = torch.tensor([1 + f.unit + 2.0**-40], dtype=torch.float64)
    assert f.round(above.float()) == 1.0, "the tie goes to the even value, and the nearest is above"
    for function in (f.encode, f.round):
        with pytest.raises(ValueError, match="FP64 would be rounded twice"):
            function(above)


@EVERY
def test_step_is_the_distance_of_the_neighbours(f: Format) -> None:
    values = np.array([float(v) for v in table(f.name)])
    x = critical(f)
    x = x[~x.isnan()]
    below = np.searchsorted(values, x.abs().double().numpy(), side="right") - 1
    below = np.minimum(below, len(values) - 2)
    got = f.step(x)
    assert got.dtype == torch.float32
    assert same(got, np.diff(values)[below])
    assert same(f.step(x.bfloat16()), f.step(x.bfloat16().float()))
    normal = x[(x.abs() >= f.min_normal) & (x.abs() <= f.max)].abs().double()
    share = f.step(normal) / normal
    assert share.max() == 2.0**-f.mantissa_bits
    assert share.min() > 2.0 ** -(f.mantissa_bits + 1)


@EVERY
def test_unit_bounds_the_relative_error(f: Format) -> None:
    x = critical(f)
    x = x[(x.abs() >= f.min_normal) & (x.abs() <= f.max)]
    errors = ((f.round(x).double() - x.double()) / x.double()).abs()
    assert f.unit == {"e4m3": 1 / 16, "e5m2": 1 / 8, "e5m6": 1 / 128}[f.name]
    # halfway above a power of two the error is u of the power, so u / (1 + u) of the number
    assert errors.max() == pytest.approx(f.unit / (1 + f.unit), rel=1e-12)


def test_packed_codes_have_the_documented_layout() -> None:
    # 1.0 is exponent 15, no fraction: 0x3C0. -2.03125 is sign, exponent 16, fraction 1: 0xC01.
    packed = E5M6.encode(torch.tensor([1.0, -2.03125, 65024.0]))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0xC0, 0x13, 0xC0, 0xBF, 0x07, 0x00, *[0] * 6]


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 15, 16, 17, 130])
def test_columns_that_do_not_fill_twelve_bytes(columns: int) -> None:
    x = torch.randn(2, 3, columns) * 100
    codes = E5M6.encode(x)
    assert codes.shape == (2, 3, 12 * ((columns + 7) // 8))
    want = nearest(x.numpy(), "e5m6")
    assert np.array_equal(codes.numpy(), stored(want, "e5m6"))
    assert same(E5M6.decode(codes, columns), meant(want, "e5m6"))
    full = E5M6.decode(codes)
    assert full.shape[-1] == codes.shape[-1] // 12 * 8
    assert same(full[..., columns:], torch.zeros_like(full[..., columns:]))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
@EVERY
def test_empty_tensors(f: Format, shape: tuple[int, ...]) -> None:
    codes = f.encode(torch.empty(shape))
    assert codes.shape == ((*shape[:-1], 12 * -(-shape[-1] // 8)) if f.packed else shape)
    assert f.decode(codes, shape[-1]).shape == shape
    assert f.round(torch.empty(shape)).shape == shape


# UE8M0


def beside_powers_of_two() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 2^-126 to 2^127, their FP32 neighbours below and above, and the exponents."""
    exponents = torch.arange(-126, 128)
    powers = torch.ldexp(torch.ones(254), exponents)
    below, above = (torch.nextafter(powers, torch.tensor(to)) for to in (0.0, torch.inf))
    assert (below < powers).all() and (powers < above).all()
    return powers, below, above, exponents


def test_scales_are_rounded_up_to_powers_of_two() -> None:
    powers, below, above, _ = beside_powers_of_two()
    assert same(UE8M0.round_up(powers), powers)
    assert same(UE8M0.round_up(below), powers)
    assert same(UE8M0.round_up(above), torch.cat([powers[1:], torch.tensor([torch.inf])]))
    assert same(UE8M0.round_up(powers[:-1] * 1.5), powers[1:])
    small = torch.tensor([1e-45, 2.0**-127, 2.0**-127 * 1.5])
    assert same(UE8M0.round_up(small), [2.0**-126] * 3)


def test_round_up_keeps_zero_infinity_and_nan() -> None:
    x = torch.tensor([0.0, torch.inf, torch.nan, torch.tensor(-1, dtype=torch.int32).view(torch.float32)])
    assert same(UE8M0.round_up(x), x)
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        assert refusal(UE8M0.round_up, x.to(dtype)) == f"scales of {dtype}; want torch.float32"


def test_codes_of_powers_of_two_equal_those_of_torch() -> None:
    codes = torch.arange(256).to(torch.uint8)
    values = UE8M0.decode(codes)
    assert same(values, codes.view(torch.float8_e8m0fnu).float())
    assert same(UE8M0.decode(codes.view(torch.float8_e8m0fnu)), values)
    assert [Fraction(v) for v in values[:-1].tolist()] == [Fraction(2) ** (e - 127) for e in range(255)]
    assert torch.equal(UE8M0.encode(values), codes)
    assert values[-1].isnan() and codes[-1] == UE8M0.nan
    assert (values[0], values[-2]) == (UE8M0.min, UE8M0.max)
    assert (UE8M0.bits, UE8M0.bias, PowersOfTwo()) == (8, 127, UE8M0)


def test_codes_are_rounded_up() -> None:
    powers, below, above, exponents = beside_powers_of_two()
    code = (exponents + 127).to(torch.uint8)
    assert UE8M0.encode(powers).dtype == torch.uint8
    assert torch.equal(UE8M0.encode(powers), code)
    assert torch.equal(UE8M0.encode(below), code)
    assert torch.equal(UE8M0.encode(above), code + 1)  # above 2^127: 255, which is NaN
    small = torch.tensor([1e-45, 2.0**-128, 2.0**-127, 2.0**-127 + 2.0**-149])
    assert UE8M0.encode(small).tolist() == [0, 0, 0, 1]
    assert UE8M0.encode(torch.tensor([torch.inf, torch.nan])).tolist() == [255, 255]


@pytest.mark.parametrize("x", [0.0, -0.0, -1.0, -torch.inf])
def test_encode_refuses_zero_and_negative_numbers(x: float) -> None:
    said = refusal(UE8M0.encode, torch.tensor([2.0, torch.nan, x]))
    assert said == f"ue8m0 has no code for {x}; want numbers above zero"


def test_cast_of_torch_rounds_scales_to_nearest() -> None:
    """Show why round_up exists: the cast rounds to the nearest power, and tiles divided by it do not fit."""
    amax = torch.rand(4000).add(0.01)
    raw_scales = amax / E4M3.max
    assert (amax / UE8M0.round_up(raw_scales) <= E4M3.max).all()
    assert (amax / UE8M0.round_up(raw_scales) > E4M3.max / 2).all()
    cast = raw_scales.to(torch.float8_e8m0fnu).float()
    assert 0.4 < (amax / cast > E4M3.max).float().mean() < 0.7
