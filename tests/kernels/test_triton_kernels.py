"""The Triton kernels give the reference's bits.

On a GPU they run here. Without one Triton's interpreter runs them, in a child process that runs pytest on this file.
TRITON_INTERPRET=1 must be set before Triton is imported, and torch.compile needs it unset.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.numerics.formats import FORMATS
from dsmini.numerics.tiles import FormatName, Scale, Tile, dequantize_tiles, quantize_tiles, round_tiles
from dsmini_kernels import triton as backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
NATIVE = INSTALLED and torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if NATIVE else "cpu"

runs_kernels = pytest.mark.skipif(
    not INSTALLED or not (INTERPRETED or NATIVE),
    reason="no GPU: the interpreter runs it, in test_under_the_interpreter's child" if INSTALLED else "no Triton",
)
wants_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
outside_the_interpreter = pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
# the interpreter's numpy warns; values beyond a dtype's range are infinite in the reference too
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered", "divide by zero", "invalid value encountered in divide")
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES: tuple[Scale, ...] = get_args(Scale)
NAMES: tuple[FormatName, ...] = get_args(FormatName)
AMAX_MIN, SMALLEST_AMAX = 1e-4, 2.0**-100
GUARD = 64
"""Number of elements on each side of an output that no kernel may touch."""


@outside_the_interpreter
@wants_triton
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 10, done.stdout


class Guarded:
    """Let torch.empty give memory full of garbage, between guards."""

    def __init__(self) -> None:
        self.outputs: list[tuple[Tensor, float]] = []
        self.empty = torch.empty

    def __call__(self, *shape: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        nonsense = torch.nan if dtype.is_floating_point else 0x5A
        whole = torch.full((size.numel() + 2 * GUARD,), nonsense, dtype=dtype, device=device)
        self.outputs.append((whole, nonsense))
        return whole[GUARD : GUARD + size.numel()].view(size)

    def check(self) -> None:
        for whole, nonsense in self.outputs:
            for guard in (whole[:GUARD], whole[-GUARD:]):
                assert torch.equal(
                    guard.isnan() if nonsense != nonsense else guard == nonsense, torch.ones_like(guard) > 0
                )


def both(call: Callable[[], Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Return every tensor that the call gives, from the kernel and from the reference."""
    guarded = Guarded()
    with ops.use("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        fast = call()
    guarded.check()
    with ops.use("reference"):
        plain = call()
    return zip(*((result,) if isinstance(result, Tensor) else result for result in (fast, plain)), strict=True)


def bits(x: Tensor) -> Tensor:
    """Return all bits, with one code for NaN in values: the reference leaves its sign and payload open."""
    if x.element_size() > 1:
        x = torch.where(x.isnan(), torch.nan, x)
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(call: Callable[[], Any]) -> None:
    for fast, plain in both(call):
        assert fast.dtype == plain.dtype and fast.shape == plain.shape and fast.is_contiguous()
        assert torch.equal(bits(fast), bits(plain))


def all_the_same(
    x: Tensor,
    tile: Tile,
    scale: Scale,
    format: FormatName,
    amax_min: float = AMAX_MIN,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Compare all three operations on x, with values of these dtypes."""
    same(lambda: quantize_tiles(x, tile, scale, format, amax_min))
    with ops.use("reference"):
        codes, scales = quantize_tiles(x, tile, scale, format, amax_min)
    for dtype in dtypes:
        same(functools.partial(round_tiles, x, tile, scale, format, amax_min, dtype))
        same(functools.partial(dequantize_tiles, codes, scales, tile, format, dtype, x.shape[-1]))


def varied(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers of many magnitudes between NaNs in memory: a read out of bounds finds a NaN."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 5, shape))
    whole = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=dtype, device=DEVICE)
    inside = whole[GUARD : GUARD + x.numel()].view(shape)
    return inside.copy_(x)


@runs_kernels
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("format", NAMES)
def test_every_dtype_and_tile(format: FormatName, scale: Scale) -> None:
    for tile, shape in (
        ((1, 128), (2, 2, 130)),
        ((1, 128), (5, 256)),
        ((128, 1), (129, 40)),
        ((128, 128), (129, 130)),
        ((1, 63), (5, 63)),
        ((1, 1), (3, 5)),
        ((7, 5), (2, 1, 8, 7)),
        ((10**6, 10**6), (9, 17)),
    ):
        for dtype in DTYPES:
            all_the_same(varied(*shape, dtype=dtype), tile, scale, format, dtypes=(dtype,))


@runs_kernels
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128)])
def test_ragged_and_empty(tile: Tile) -> None:
    for rows in (0, 1, 5) if tile[0] == 1 else (0, 1, 127, 129):
        for columns in (0, 1, 63, 130) if tile[1] == 1 else (0, 1, 63, 130, 576):
            x = varied(rows, columns, dtype=torch.bfloat16)
            same(functools.partial(quantize_tiles, x, tile, "fp32", "e4m3", AMAX_MIN))
            same(functools.partial(quantize_tiles, x[:9], tile, "ue8m0", "e5m6", AMAX_MIN))
            same(functools.partial(round_tiles, x, tile, "fp32", "e4m3", AMAX_MIN, torch.bfloat16))
            with ops.use("reference"):
                codes, scales = quantize_tiles(x, tile, "fp32", "e4m3", AMAX_MIN)
            same(functools.partial(dequantize_tiles, codes, scales, tile, "e4m3", torch.bfloat16))
    for shape in ((0, 3, 130), (2, 0, 130), (2, 3, 0)):
        all_the_same(varied(*shape), tile, "ue8m0", "e4m3")


@runs_kernels
def test_views() -> None:
    x = varied(18, 140, dtype=torch.bfloat16)
    for view in (x.T, x[1::2, 3::3], x[:, 5:], x[3].expand(4, 140), x.unflatten(0, (2, 9)).transpose(0, 1)):
        same(functools.partial(quantize_tiles, view, (1, 32), "ue8m0", "e4m3", AMAX_MIN))
        same(functools.partial(round_tiles, view, (16, 1), "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16))
    codes, scales = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", AMAX_MIN)
    same(lambda: dequantize_tiles(codes.T, scales.T, (128, 1)))
    same(lambda: dequantize_tiles(codes.view(torch.uint8), scales, (1, 128)))


@runs_kernels
@pytest.mark.parametrize("format", NAMES)
def test_special_values(format: FormatName) -> None:
    """Check each in a row, and so a tile, of its own, next to zeros of both signs and an ordinary number."""
    inf, nan, tiny, huge = torch.inf, torch.nan, 2.0**-149, 3.4e38
    around = [2.0**k * (1 + step) for k in (-126, -14, 0, 8, 120) for step in (-(2.0**-24), 0, 2.0**-23)]
    largest = FORMATS[format].max
    alone = [inf, -inf, nan, -nan, tiny, 2.0**-126, 1e-30, 1e-5, AMAX_MIN, huge, largest, 2 * largest, *around]
    x = torch.tensor([[value, -0.0, 0.0, small] for value in alone for small in (0.0, -1e-3, tiny)], device=DEVICE)
    x = torch.cat([x, torch.zeros_like(x[:1]), -torch.zeros_like(x[:1])])
    with ops.use("triton"):
        codes, scales = quantize_tiles(x[:12], (1, 4), "ue8m0", format, AMAX_MIN)
        assert scales.isnan().all()
        if not FORMATS[format].packed:
            assert (codes.view(torch.uint8) == FORMATS[format].nan).all()
    for scale in SCALES:
        for amax_min in (AMAX_MIN, SMALLEST_AMAX, 0.0):  # 0 gives scales of 0, and quotients beyond max
            for dtype in DTYPES:
                all_the_same(x.to(dtype), (1, 4), scale, format, amax_min, (dtype,))
        all_the_same(x, (4, 4), scale, format)


@runs_kernels
@pytest.mark.parametrize("format", NAMES)
def test_every_value_every_tie_and_their_neighbours(format: FormatName) -> None:
    """Check them under a scale of 1, where nothing else rounds, and under an FP32 scale, where x / scale does."""
    values = FORMATS[format].values(DEVICE)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    beside = [points.nextafter(torch.full_like(points, away)) for away in (-torch.inf, torch.inf)]
    points = torch.cat([points, *beside]).clamp(max=FORMATS[format].max)
    x = torch.cat([points, -points]).unsqueeze(0)
    width = x.shape[-1]
    with ops.use("triton"):
        assert quantize_tiles(x, (1, width), "fp32", format, AMAX_MIN)[1].item() == 1
    for scale in SCALES:
        all_the_same(x, (1, width), scale, format)
        all_the_same(x * 0.3, (1, width), scale, format)


@runs_kernels
@pytest.mark.parametrize("format", NAMES)
def test_every_code_has_its_value(format: FormatName) -> None:
    if FORMATS[format].packed:
        code = torch.arange(4096, dtype=torch.int32).view(-1, 2)
        even, odd = code.unbind(-1)
        codes = torch.stack((even & 255, even >> 8 | (odd & 15) << 4, odd >> 4), -1).flatten().to(torch.uint8)
    else:
        codes = torch.arange(256, dtype=torch.uint8)
    codes = codes.repeat(6, 1).to(DEVICE)
    scales = torch.tensor([1, 2.0**-140, 2.0**-126, 0.3, 3e38, torch.nan], device=DEVICE).unsqueeze(-1)
    columns = 4096 if FORMATS[format].packed else 256
    for dtype in DTYPES:
        same(functools.partial(dequantize_tiles, codes, scales, (1, columns), format, dtype, columns))


@runs_kernels
@pytest.mark.parametrize("ends", [[21], [0, 5, 5, 21], [21, 21, 21], [0, 0, 1, 4, 8, 13, 20, 21]])
def test_each_group_begins_a_new_tile(ends: list[int]) -> None:
    rows = torch.tensor(ends, device=DEVICE)
    for tile in ((1, 16), (4, 16), (16, 1), (8, 3), (128, 16)):
        for dtype, kind in zip(DTYPES, (torch.int32, torch.int64, torch.int32), strict=True):
            x = varied(21, 37, dtype=dtype)
            same(functools.partial(round_tiles, x, tile, "fp32", "e4m3", AMAX_MIN, dtype, rows.to(kind)))
    x = varied(21, 37)
    x[6, 3], x[20, 36] = torch.inf, torch.nan
    same(lambda: round_tiles(x, (4, 16), "ue8m0", "e5m6", SMALLEST_AMAX, torch.bfloat16, rows))
    same(lambda: round_tiles(x[:0], (4, 16), "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16, 0 * rows))


@runs_kernels
def test_unsupported_calls_raise_unserved() -> None:
    x = varied(4, 256)
    codes, scales = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", AMAX_MIN)
    wide = varied(256, 512)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("x is torch.float64", lambda: quantize_tiles(x.double(), (1, 128), "ue8m0", "e4m3", AMAX_MIN)),
        ("tile of 256x512", lambda: quantize_tiles(wide, (256, 512), "ue8m0", "e4m3", AMAX_MIN)),
        ("got dtype=torch.float64", lambda: dequantize_tiles(codes, scales, (1, 128), "e4m3", torch.float64)),
        ("scales of shape", lambda: dequantize_tiles(codes, scales[:3], (1, 128))),
        ("are not 130 columns", lambda: dequantize_tiles(codes, scales, (1, 128), "e4m3", torch.float32, 130)),
        (
            "x has 3 dimensions",
            lambda: round_tiles(x[None], (2, 4), "fp32", "e4m3", AMAX_MIN, x.dtype, torch.tensor([4], device=DEVICE)),
        ),
    ]
    for reason, call in refused:
        with ops.use("triton"), pytest.raises(ValueError, match=rf"'triton' is forced and cannot run .*{reason}"):
            call()
    assert "dequantize" in backend.OPERATIONS and "triton: ready: Triton " in ops.explain()


@outside_the_interpreter
@pytest.mark.skipif(NATIVE, reason="there is a GPU")
def test_forced_without_a_gpu_raises() -> None:
    reason = "Triton needs a GPU .* TRITON_INTERPRET=1" if INSTALLED else "Triton is not installed"
    with ops.use("triton"), pytest.raises(ValueError, match=rf"cannot run quantize: {reason}"):
        quantize_tiles(torch.ones(2, 2), (1, 2), "ue8m0", "e4m3", AMAX_MIN)


@pytest.mark.skipif(not NATIVE, reason="no GPU")
def test_main_memory_is_not_served_natively() -> None:
    with ops.use("triton"), pytest.raises(ValueError, match="the tensor is on cpu"):
        quantize_tiles(torch.ones(2, 2), (1, 2), "ue8m0", "e4m3", AMAX_MIN)


@wants_triton
def test_interpreter_requested_too_late_is_reported() -> None:
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; from dsmini_kernels import triton as backend"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    command = [sys.executable, "-c", f"{late}; print(backend.why_not())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "TRITON_INTERPRET=1 was set after Triton's first import; set it before Python starts\n"


def test_missing_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_FOUND", False)
    assert backend.why_not() == "Triton is not installed; pip install triton"
