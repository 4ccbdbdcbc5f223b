"""The kernels of tiles, in C++ on every instruction set and in Triton, give the bits of plain PyTorch.

On a GPU Triton's run in `pytest -m gpu`. Without one Triton's interpreter runs them, in a child of test_triton.py.
"""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini import ops
from dsmini.numerics import FORMATS, SMALLEST_AMAX, dequantize_tiles, quantize_tiles, round_tiles
from dsmini.numerics.quantization import FormatName, Scale, Tile
from dsmini_kernels import cpu
from dsmini_kernels.cpu import tiles as wrapper
from tests.helpers.quantizer import table
from tests.kernels.conftest import AMAX_MIN, NAMES, SCALES, TYPES, Kernels, assert_threads_change_no_bit

FEW = (
    *(((1, 128), (2, 2, 130)), ((1, 128), (5, 256)), ((128, 1), (129, 40)), ((128, 128), (129, 130))),
    *(((1, 63), (5, 63)), ((1, 1), (3, 5)), ((7, 5), (2, 1, 8, 7)), ((10**6, 10**6), (9, 17))),
    *(((1, 128), (0, 3, 130)), ((128, 1), (2, 0, 130)), ((128, 128), (2, 3, 0)), ((128, 1), (5, 0))),
    *(((128, 128), (1, 1)), ((128, 1), (127, 63)), ((1, 128), (5, 576)), ((128, 1), (1, 130))),
)
"""Tiles and shapes, few enough for the interpreter; test_any_shape_in_any_tile has others."""
PAYLOADS = [0x7FFFFFFF, -1]
"""Bits of NaN. Rounded to BF16 as an integer, the first would wrap round to zero."""
on_the_cpu = Kernels()
# the interpreter's numpy warns; values beyond a dtype's range are infinite in the reference too
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered", "divide by zero", "invalid value encountered")
]
EVERY_TYPE = pytest.mark.parametrize("dtype", TYPES, ids=str)
EVERY_FORMAT = pytest.mark.parametrize("format", NAMES)
EVERY_SCALE = pytest.mark.parametrize("scale", SCALES)


@pytest.fixture(autouse=True)
def _small_process() -> None:
    """Let CUDA's libraries take memory, which other tests may not."""


@EVERY_SCALE
@EVERY_FORMAT
@EVERY_TYPE
def test_bits_equal_plain_torch(kernels: Kernels, dtype: torch.dtype, format: FormatName, scale: Scale) -> None:
    for tile, shape in FEW:
        kernels.check_all(kernels.wild(*shape, dtype=dtype), tile, scale, format, dtypes=(dtype,))


@EVERY_TYPE
def test_views(kernels: Kernels, dtype: torch.dtype) -> None:
    rows = 130 if kernels.backend == "cpu" else 20  # few for the interpreter
    whole, batch = kernels.wild(rows, 70, dtype=dtype), kernels.wild(4, 3, 40, dtype=dtype)
    views = (
        *(whole.mT, whole[:, 3:66], whole[::2], whole[1::2, 3::3], whole[1:, 1:], whole[:1].expand(rows, 70)),
        *(batch[:, 1:4, 2:], batch.transpose(0, 1), whole[:9].expand(3, 9, 70)),
        batch.unflatten(0, (2, 2)).transpose(1, 2)[..., 1:],
    )
    for x in views:
        for tile in ((1, 128), (128, 1), (3, 5)):
            kernels.check_all(x, tile, "ue8m0", "e4m3", dtypes=(dtype,))
    codes = torch.randint(0, 120, (40, 50), dtype=torch.uint8, device=kernels.device)
    for view in (codes[:, 1:], codes.mT, codes[::3], codes.view(torch.float8_e4m3fn).mT):
        scales = torch.rand(-(-view.shape[1] // 16), -(-view.shape[0] // 8), device=kernels.device).mT
        kernels.check(dequantize_tiles, view, scales, (8, 16), "e4m3", dtype)


def test_lazily_negated_tensors_keep_their_sign(kernels: Kernels) -> None:
    """Check lazy negation: torch flips signs without touching memory, as for imaginary parts of conjugates."""
    x = torch.complex(kernels.wild(5, 130, special=0.0), kernels.wild(5, 130, special=0.0)).conj().imag
    apart = torch._neg_view(kernels.wild(5, 130, special=0.0))
    assert x.is_neg() and apart.is_neg() and apart.is_contiguous()
    for view in (x, apart):
        kernels.check_all(view, (1, 128), "ue8m0", "e4m3")
        with ops.use(kernels.backend):
            codes = quantize_tiles(view, (1, 128), "ue8m0", "e4m3", AMAX_MIN)[0]
        assert (codes.float().sign() == view.sign()).all()


@EVERY_FORMAT
def test_special_values(kernels: Kernels, format: FormatName) -> None:
    """Check each in a row, and so a tile, of its own, next to zeros of both signs and an ordinary number."""
    inf, nan, tiny, huge = math.inf, math.nan, 2.0**-149, 3.4e38
    around = [2.0**k * (1 + step) for k in (-126, -14, 0, 8, 120) for step in (-(2.0**-24), 0, 2.0**-23)]
    largest = FORMATS[format].max
    alone = [inf, -inf, nan, -nan, tiny, 2.0**-126, 1e-30, 1e-5, AMAX_MIN, huge, largest, 2 * largest, *around]
    x = torch.tensor(
        [[value, -0.0, 0.0, small] for value in alone for small in (0.0, -1e-3, tiny)], device=kernels.device
    )
    x = torch.cat([x, torch.zeros_like(x[:1]), -torch.zeros_like(x[:1]), torch.full_like(x[:2], nan)])
    x.view(torch.int32)[-2:, 0] = torch.tensor(PAYLOADS, device=x.device)
    with ops.use(kernels.backend):
        codes, scales = quantize_tiles(x[:12], (1, 4), "ue8m0", format, AMAX_MIN)
    assert scales.isnan().all()
    if not FORMATS[format].packed:
        assert (codes.view(torch.uint8) == FORMATS[format].nan).all()
    for scale in SCALES:
        for amax_min in (AMAX_MIN, SMALLEST_AMAX, 0.0):  # 0 gives scales of 0, and quotients beyond max
            for dtype in TYPES:
                kernels.check_all(x.to(dtype), (1, 4), scale, format, amax_min, (dtype,))
        kernels.check_all(x, (4, 4), scale, format)


@EVERY_FORMAT
def test_every_value_every_tie_and_their_neighbours(kernels: Kernels, format: FormatName) -> None:
    """Check them under a scale of 1, where nothing else rounds, and under an FP32 scale, where x / scale does."""
    values = torch.tensor([float(v) for v in table(format)], device=kernels.device)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    around = [points.nextafter(torch.full_like(points, away)) for away in (-math.inf, math.inf)]
    points = torch.cat([points, *around]).clamp(max=FORMATS[format].max)
    x = torch.cat([points, -points]).unsqueeze(0)
    width = x.shape[-1]
    with ops.use(kernels.backend):
        assert quantize_tiles(x, (1, width), "fp32", format, AMAX_MIN)[1].item() == 1
    for scale in SCALES:
        kernels.check_all(x, (1, width), scale, format)
        kernels.check_all(x * 0.3, (1, width), scale, format)


@EVERY_FORMAT
def test_every_code_has_its_value(kernels: Kernels, format: FormatName) -> None:
    if FORMATS[format].packed:
        code = torch.arange(4096, dtype=torch.int32).view(-1, 2)
        even, odd = code.unbind(-1)
        codes = torch.stack((even & 255, even >> 8 | (odd & 15) << 4, odd >> 4), -1).flatten().to(torch.uint8)
    else:
        codes = torch.arange(256, dtype=torch.uint8)
    scales = torch.tensor([1, 2.0**-140, 2.0**-126, 0.3, 3e38, -0.0, math.nan], device=kernels.device).unsqueeze(-1)
    scales.view(torch.int32)[-1] = PAYLOADS[0]
    codes = codes.repeat(len(scales), 1).to(kernels.device)
    columns = 4096 if FORMATS[format].packed else 256
    for dtype in TYPES:
        kernels.check(dequantize_tiles, codes, scales, (1, columns), format, dtype, columns)


@pytest.mark.parametrize("ends", [[21], [0, 5, 5, 21], [21, 21, 21], [0, 0, 1, 4, 8, 13, 20, 21]])
def test_each_group_begins_a_new_tile(kernels: Kernels, ends: list[int]) -> None:
    rows = torch.tensor(ends, device=kernels.device)
    for tile in ((1, 16), (4, 16), (16, 1), (8, 3), (128, 16)):
        for dtype, kind in zip(TYPES, (torch.int32, torch.int64, torch.int32), strict=True):
            x = kernels.wild(21, 37, dtype=dtype, special=0.001)
            kernels.check(round_tiles, x, tile, "fp32", "e4m3", AMAX_MIN, dtype, rows.to(kind))
    x = kernels.wild(21, 37, special=0.0)
    x[6, 3], x[20, 36] = math.inf, math.nan
    kernels.check(round_tiles, x, (4, 16), "ue8m0", "e5m6", SMALLEST_AMAX, torch.bfloat16, rows)
    kernels.check(round_tiles, x[:0], (4, 16), "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16, 0 * rows)


in_cpp = pytest.mark.usefixtures("isa", "guarded_outputs")


@in_cpp
@EVERY_TYPE
@EVERY_FORMAT
def test_every_short_number(format: FormatName, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16 if dtype == torch.float32 else dtype)
    finite = torch.where(every.isfinite(), every, 0).to(dtype)
    for x in (every.to(dtype).view(1, -1), finite.view(256, 256), finite.view(256, 256).T.clamp(-2, 2)):
        for scale in SCALES:
            for tile in ((1, 1), (1, 128), (128, 1)):
                on_the_cpu.check_all(x, tile, scale, format, SMALLEST_AMAX)


@in_cpp
@pytest.mark.parametrize("amax_min", [0.0, -1.0, 1e-45, 2.0**-126, 2.0**-110, 2.0**-100, 1e30])
@EVERY_SCALE
def test_scales_at_the_ends_of_fp32(scale: Scale, amax_min: float) -> None:
    """Check zero scales and 0 / 0, subnormal scales, and values that overflow."""
    for format in NAMES:
        for shift in (-149, -140, -126, -120, 0, 126):
            x = torch.randn(7, 96).clamp(-3.9, 3.9).ldexp(torch.tensor(shift))
            x[:2, ::3] = 0
            x[3] = 0
            on_the_cpu.check_all(x, (1, 32), scale, format, amax_min)
            on_the_cpu.check_all(x.bfloat16(), (3, 1), scale, format, amax_min)


@in_cpp
def test_powers_of_two_and_their_neighbours() -> None:
    """Check them as largest magnitudes, where a scale steps."""
    powers = 2.0 ** torch.arange(-20, 20)
    for top in (448.0, 57344.0, 65024.0, 1.0):
        edge = powers * top
        x = torch.stack((edge, edge.nextafter(edge * 2), edge.nextafter(edge * 0)))
        for scale in SCALES:
            for format in NAMES:
                on_the_cpu.check_all(x, (1, 1), scale, format)


@in_cpp
@pytest.mark.parametrize("columns", [2051, 2048])
def test_large_outputs_go_past_the_cache(columns: int) -> None:
    x = on_the_cpu.wild(2100, columns, special=0.0005)
    x[0] = x[0].nan_to_num(0, 0, 0).clamp(-9, 9)
    assert x.nbytes > 16 << 20
    for tile in ((1, 128), (128, 1), (128, 128)):
        on_the_cpu.check(round_tiles, x, tile, "ue8m0", "e4m3", AMAX_MIN, torch.float32)


SIDES, SEEDS = st.integers(1, 300), st.integers(0, 2**32 - 1)


@in_cpp
@given(
    SIDES,
    SIDES,
    st.tuples(st.integers(1, 140), st.integers(1, 140)),
    *map(st.sampled_from, (NAMES, SCALES, TYPES)),
    SEEDS,
)
def test_any_shape_in_any_tile(
    r: int, c: int, tile: Tile, format: FormatName, scale: Scale, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    on_the_cpu.check_all(on_the_cpu.wild(r, c, dtype=dtype), tile, scale, format)


@in_cpp
def test_threads_change_no_bit() -> None:
    x = on_the_cpu.wild(520, 771, dtype=torch.bfloat16, special=0.0005)
    assert x.numel() > wrapper.THREADED
    ends = torch.tensor([100, 100, 391, 520])

    def run(tile: Tile) -> list[Tensor]:
        codes, scales = cpu.quantize(x, tile, "fp32", "e5m6", AMAX_MIN)
        back = cpu.dequantize(codes, scales, tile, "e5m6", torch.bfloat16, 771)
        return [codes, scales, back, cpu.quantize_dequantize(x, tile, "fp32", "e4m3", AMAX_MIN, torch.float32, ends)]

    for tile in ((1, 128), (128, 1), (128, 128), (3, 5)):
        assert_threads_change_no_bit(functools.partial(run, tile))
