"""The short formats: every code against a table of exact fractions, every rounding against a search in it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmini.numerics import E4M3, E5M2, E5M6, Format
from tests.helpers.quantizer import UNIT, meant, midpoints, nearest, raw, same, stored, table

EVERY = pytest.mark.parametrize("f", [E4M3, E5M2, E5M6], ids=lambda f: f.name)


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


@pytest.mark.parametrize("f", [E4M3, E5M2], ids=lambda f: f.name)
def test_every_byte_decodes_as_torch_and_the_table_do(f: Format) -> None:
    codes = torch.arange(256).to(torch.uint8)
    got = f.decode(codes.view(f.dtype))
    assert got.dtype == torch.float32
    assert same(got, codes.view(f.dtype).float()) and same(f.decode(codes), got)
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
    # 1.0 is exponent 15, no fraction: 0x3C0. -2.03125 is sign, exponent 16, fraction 1: 0xC01.
    packed = E5M6.encode(torch.tensor([1.0, -2.03125, 65024.0]))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0xC0, 0x13, 0xC0, 0xBF, 0x07, 0x00, *[0] * 6]


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_to_nearest_and_ties_to_even(f: Format, dtype: torch.dtype) -> None:
    x = {torch.bfloat16: all_bf16(), torch.float16: all_bf16().view(torch.float16), torch.float32: critical(f)}[dtype]
    want = nearest(x.float().numpy(), f.name)
    assert np.array_equal(raw(f.encode(x)), stored(want, f.name))
    assert f.round(x).dtype == torch.float32
    assert same(f.round(x), meant(want, f.name))
    assert same(f.decode(f.encode(x), len(x)), f.round(x))


@EVERY
def test_fp64_is_refused_since_it_would_be_rounded_twice(f: Format) -> None:
    """Rounded to FP32 first, a number just above a midpoint becomes a tie."""
    above = torch.tensor([1 + UNIT[f.name] + 2.0**-40], dtype=torch.float64)
    assert f.round(above.float()) == 1.0, "the tie goes to the even value, and the nearest is above"
    for function in (f.encode, f.round):
        with pytest.raises(ValueError, match="FP64 would be rounded twice"):
            function(above)


@EVERY
def test_small_values_stay_where_the_cpu_flushes_subnormal_numbers(f: Format) -> None:
    """Subnormal values of a short format are normal numbers of FP32."""
    x = critical(f)
    x = x[x.isfinite() & ((x == 0) | (x.abs() >= 2.0**-126))]
    x = x[: len(x) // 8 * 8]
    want = raw(f.encode(x)), f.round(x), f.decode(f.encode(x))
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU flushes none")
        assert torch.tensor([1e-39]).mul(1).item() == 0
        got = raw(f.encode(x)), f.round(x), f.decode(f.encode(x))
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(got[0], want[0]) and same(got[1], want[1]) and same(got[2], want[2])
    assert (got[1].abs() < 2.0 ** (1 - f.bias)).sum() > 100, "some are subnormal"
