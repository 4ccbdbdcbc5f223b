"""The C++ kernels of tiles give the bits of plain PyTorch, on every instruction set, and write nothing else."""

import functools
import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini import ops
from dsmini.numerics import dequantize_tiles, round_tiles
from dsmini_kernels import cpu
from dsmini_kernels.cpu import tiles as wrapper
from tests.helpers.cpu_kernels import (
    FORMATS,
    SCALES,
    TYPES,
    assert_same,
    assert_threads_change_no_bit,
    check,
    check_all,
    wild,
)

pytestmark = pytest.mark.usefixtures("isa", "guarded_outputs")
TILES = ((1, 128), (128, 1), (128, 128), (1, 1), (3, 5), (2, 16), (1, 100), (999, 999))
SHAPES = ((1, 1), (1, 63), (3, 64), (127, 130), (129, 576), (2, 3, 130, 63))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_equal_plain_torch(dtype: torch.dtype, format: str, scale: str) -> None:
    for number, tile in enumerate(TILES):
        for shape in SHAPES[number % 2 :: 2] if tile[0] < 100 else SHAPES:
            check_all(wild(*shape, dtype=dtype), tile, scale, format)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_short_number_in_and_every_code_out(format: str, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16 if dtype == torch.float32 else dtype)
    finite = torch.where(every.isfinite(), every, 0).to(dtype)
    for x in (every.to(dtype).view(1, -1), finite.view(256, 256), finite.view(256, 256).T.clamp(-2, 2)):
        for scale in SCALES:
            for tile in ((1, 1), (1, 128), (128, 1)):
                check_all(x, tile, scale, format, 2.0**-100)
    codes = torch.arange(12 << 10).to(torch.uint8).view(4, -1)
    scales = torch.tensor([1.0, 0.75, -0.0, math.nan]).view(4, 1)
    columns = codes.shape[-1] // 12 * 8 if format == "e5m6" else None
    check(dequantize_tiles, codes, scales, (1, 1 << 20), format, dtype, columns)


@pytest.mark.parametrize("amax_min", [0.0, -1.0, 1e-45, 2.0**-126, 2.0**-110, 2.0**-100, 1e30])
@pytest.mark.parametrize("scale", SCALES)
def test_scales_at_the_ends_of_fp32(scale: str, amax_min: float) -> None:
    """Check zero scales and 0 / 0, subnormal scales, and values that overflow."""
    for format in FORMATS:
        for shift in (-149, -140, -126, -120, 0, 126):
            x = torch.randn(7, 96).clamp(-3.9, 3.9).ldexp(torch.tensor(shift))
            x[:2, ::3] = 0
            x[3] = 0
            check_all(x, (1, 32), scale, format, amax_min)
            check_all(x.bfloat16(), (3, 1), scale, format, amax_min)


def test_powers_of_two_and_their_neighbours() -> None:
    """Check them as largest magnitudes, where a scale steps, and as numbers halfway between two codes."""
    powers = 2.0 ** torch.arange(-20, 20)
    for top in (448.0, 57344.0, 65024.0, 1.0):
        edge = powers * top
        x = torch.stack((edge, edge.nextafter(edge * 2), edge.nextafter(edge * 0)))
        for scale in SCALES:
            for format in FORMATS:
                check_all(x, (1, 1), scale, format)
                check_all(torch.arange(-512, 513).div(16).view(1, -1), (1, 2000), scale, format)


def test_tile_with_infinity_or_nan_becomes_nan() -> None:
    for bad in (math.inf, -math.inf, math.nan):
        for format, nan in (("e4m3", 0x7F), ("e5m2", 0x7F), ("e5m6", None)):
            x = torch.randn(5, 300)
            x[2, 200] = bad
            codes, scales = cpu.quantize(x, (1, 128), "ue8m0", format, 1e-4)
            assert scales.isnan().nonzero().tolist() == [[2, 1]] and scales.view(torch.int32)[2, 1] == 0x7FC00000
            if nan is not None:
                assert (codes.view(torch.uint8)[2, 128:256] == nan).all()
                assert not codes.float()[2, :128].isnan().any()


def test_nan_with_any_payload() -> None:
    """Check that NaN stays NaN: 0x7FFFFFFF, rounded to BF16 as an integer, would wrap round to zero."""
    x = torch.randn(4, 64)
    x.view(torch.int32)[1, 3], x.view(torch.int32)[2, 5] = 0x7FFFFFFF, -1
    for tile in ((1, 64), (1, 1), (2, 3)):
        check_all(x, tile, "fp32", "e4m3", 0.0)
    scales = x[:, :1].clone()
    scales.view(torch.int32)[0] = 0x7FFFFFFF
    codes = torch.randint(0, 256, (4, 64), dtype=torch.uint8)
    check(dequantize_tiles, codes, scales, (1, 64), "e4m3", torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_views(dtype: torch.dtype) -> None:
    whole = wild(130, 70, dtype=dtype)
    views = (
        *(whole.mT, whole[:, 3:66], whole[::2], whole[:, ::2], whole[1:, 1:], whole[:1].expand(130, 70)),
        *(wild(3, 5, 33, dtype=dtype)[:, 1:4, 2:], whole.expand(3, 130, 70)),
        *(wild(4, 3, 40, dtype=dtype).transpose(0, 1), wild(2, 4, 3, 40, dtype=dtype).transpose(1, 2)[..., 1:]),
    )
    for x in views:
        for tile in ((1, 128), (128, 1), (3, 5)):
            check_all(x, tile, "ue8m0", "e4m3")
    codes = torch.randint(0, 120, (40, 50), dtype=torch.uint8)
    for view in (codes[:, 1:], codes.mT, codes[::3]):
        scales = torch.rand(math.ceil(view.shape[0] / 8), math.ceil(view.shape[1] / 16)).mT.contiguous().mT
        check(dequantize_tiles, view, scales, (8, 16), "e4m3", dtype)


def test_lazily_negated_tensors_keep_their_sign() -> None:
    """Check lazy negation: torch flips signs without touching memory, as for imaginary parts of conjugates."""
    x = torch.complex(wild(5, 130, special=0.0), wild(5, 130, special=0.0)).conj().imag
    apart = torch._neg_view(wild(5, 130, special=0.0))
    assert x.is_neg() and apart.is_neg() and apart.is_contiguous()
    for view in (x, apart):
        check_all(view, (1, 128), "ue8m0", "e4m3")
        codes = cpu.quantize(view, (1, 128), "ue8m0", "e4m3", 1e-4)[0]
        assert (codes.float().sign() == view.sign()).all()


def test_packed_codes_of_tiles_that_end_within_eight() -> None:
    """Check tiles whose ends cut eight packed codes, which share twelve bytes."""
    for tile in ((128, 50), (3, 9), (1, 100)):
        check_all(wild(128, 600, special=0.001), tile, "ue8m0", "e5m6")


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for tile in ((1, 128), (128, 1)):
        for format in ("e4m3", "e5m2"):
            check_all(torch.empty(shape), tile, "ue8m0", format)
        codes, scales = cpu.quantize(torch.empty(shape), tile, "fp32", "e5m6", 1e-4)
        assert codes.shape == (*shape[:-1], -(-shape[-1] // 8) * 12) and codes.numel() == scales.numel() == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_each_group_begins_a_new_tile(dtype: torch.dtype) -> None:
    sizes = [0, 1, 127, 0, 128, 129, 63, 0]
    ends = torch.tensor(sizes).cumsum(0)
    x = wild(int(ends[-1]), 130, dtype=dtype, special=0.001)
    for tile in ((128, 1), (128, 128), (1, 128), (3, 5), (999, 7)):
        for scale in SCALES:
            for e in (ends, ends.int(), ends[-1:]):
                check(round_tiles, x, tile, scale, "e4m3", 1e-4, torch.bfloat16, e)


@pytest.mark.parametrize("columns", [2051, 2048])
def test_large_outputs_go_past_the_cache(columns: int) -> None:
    x = wild(2100, columns, special=0.0005)
    x[0] = x[0].nan_to_num(0, 0, 0).clamp(-9, 9)
    assert 4 * x.numel() > 16 << 20
    for tile in ((1, 128), (128, 1), (128, 128)):
        check(round_tiles, x, tile, "ue8m0", "e4m3", 1e-4, torch.float32)


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.tuples(st.integers(1, 140), st.integers(1, 140)),
    st.sampled_from(FORMATS),
    st.sampled_from(SCALES),
    st.sampled_from(TYPES),
    st.integers(0, 2**32 - 1),
)
def test_any_shape_in_any_tile(
    r: int, c: int, tile: tuple[int, int], format: str, scale: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    check_all(wild(r, c, dtype=dtype), tile, scale, format)


def test_threads_change_no_bit() -> None:
    x = wild(520, 771, dtype=torch.bfloat16, special=0.0005)
    assert x.numel() > wrapper.THREADED
    ends = torch.tensor([100, 100, 391, 520])

    def run(tile: tuple[int, int]) -> list[Tensor]:
        codes, scales = cpu.quantize(x, tile, "fp32", "e5m6", 1e-4)
        back = cpu.dequantize(codes, scales, tile, "e5m6", torch.bfloat16, 771)
        return [codes, scales, back, cpu.quantize_dequantize(x, tile, "fp32", "e4m3", 1e-4, torch.float32, ends)]

    for tile in ((1, 128), (128, 1), (128, 128), (3, 5)):
        assert_threads_change_no_bit(functools.partial(run, tile))


def test_calls_from_many_threads() -> None:
    x = wild(200, 333, dtype=torch.bfloat16)
    with ops.use("reference"):
        want = round_tiles(x, (128, 1), "ue8m0", "e4m3", 1e-4, torch.bfloat16)
    good: list[int] = []

    def work() -> None:
        for _ in range(20):
            assert_same(cpu.quantize_dequantize(x, (128, 1), "ue8m0", "e4m3", 1e-4, torch.bfloat16), want)
            good.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(good) == 80
