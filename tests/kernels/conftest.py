"""Numbers of all kinds, guarded memory, equality bit by bit, and fixtures. Nothing is built before a test needs it."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini import quantize as quantize_weight
from dsmini.machine import on_threads
from dsmini.numerics import FP4_BLOCK, WEIGHT_TILE, dequantize_tiles, quantize_tiles, round_tiles
from dsmini.numerics.quantization import FormatName, Scale, Tile
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build, calls, folder, tiles
from tests.helpers.gpu import gpu_device

TYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES: tuple[FormatName, ...] = tuple(name for name in get_args(FormatName) if name in tiles.FORMATS)
SCALES: tuple[Scale, ...] = get_args(Scale)
AMAX_MIN = 1e-4
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3e38, -3e38, 2.0**-126, 448.0, 447.99997, 464.0)
GUARD, GARBAGE = 64, 0xA5
"""Number of elements on each side of an output that no kernel may touch, and the byte that fills new memory."""
NAMED = os.environ.get(build.ISA_VARIABLE) or build.isas_here()[-1]
ISAS = [name if name == NAMED else pytest.param(name, marks=pytest.mark.slow) for name in build.ISAS]
"""Instruction sets as parameters. That of this process is this CPU's best, or another that DSMINI_CPU_ISA names."""

BF16 = "dsmini.machine.multiplies_bf16"
"""Where dsmini asks whether this CPU has units for products of BF16 numbers."""

load = functools.cache(build.Library)


class Guarded:
    """Stand in for `torch` in a module of kernels: new tensors are full of garbage and lie between guards."""

    def __init__(self) -> None:
        self.wholes: list[tuple[Tensor, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        guard = GUARD * dtype.itemsize
        whole = torch.full((size.numel() * dtype.itemsize + 2 * guard,), GARBAGE, dtype=torch.uint8, device=device)
        self.wholes.append((whole, guard))
        return whole[guard : len(whole) - guard].view(dtype).view(size)

    def check(self) -> None:
        for whole, guard in self.wholes:
            assert (whole[:guard] == GARBAGE).all() and (whole[-guard:] == GARBAGE).all(), "written beyond the output"


@contextmanager
def guarded(module: ModuleType) -> Iterator[None]:
    """Guard the outputs of a module of kernels, and check them at the end."""
    stand_in = Guarded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", stand_in)
        yield
    stand_in.check()


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_same(got: Tensor, want: Tensor, nan: bool = True) -> None:
    """Check bitwise equality; in values any NaN equals any other."""
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    equal = bits(got) == bits(want)
    if nan and got.itemsize > 1:
        equal |= got.isnan() & want.isnan()
    assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ, first at {(~equal).nonzero()[0].tolist()}"


class Kernels(NamedTuple):
    """A backend of tiles, and the device of its tensors."""

    backend: str = "cpu"
    device: str = "cpu"

    def check(self, operation: Callable[..., Any], *arguments: Any) -> None:
        """Compare a kernel with its reference, bit by bit. In scales of the CPU's, NaN has the same bits too."""
        results = []
        for name in (self.backend, "reference"):
            with ops.use(name):
                result = operation(*arguments)
            results.append((result,) if isinstance(result, Tensor) else result)
        for place, (got, want) in enumerate(zip(*results, strict=True)):
            assert_same(got, want, nan=self.backend != "cpu" or place == 0)

    def check_all(
        self, x: Tensor, tile: Tile, scale: Any, format: Any, amax_min: float = AMAX_MIN, dtypes: Sequence[Any] = TYPES
    ) -> None:
        """Compare all three operations on x, with values of these dtypes."""
        self.check(quantize_tiles, x, tile, scale, format, amax_min)
        with ops.use("reference"):
            codes, scales = quantize_tiles(x, tile, scale, format, amax_min)
        for dtype in dtypes:
            self.check(round_tiles, x, tile, scale, format, amax_min, dtype)
            self.check(dequantize_tiles, codes, scales, tile, format, dtype, x.shape[-1])

    def wild(self, *shape: int, dtype: torch.dtype = torch.float32, special: float = 0.02) -> Tensor:
        """Return numbers of all magnitudes, whose tiles differ by powers of e^3, and some special values.

        They lie between NaNs in memory: a read out of bounds finds one.
        """
        x = torch.randn(shape) * torch.exp(3 * torch.randn(*shape[:-1], 1))
        values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
        whole = torch.full((x.numel() + 2 * GUARD,), math.nan, dtype=dtype, device=self.device)
        return whole[GUARD : GUARD + x.numel()].view(shape).copy_(torch.where(torch.rand(shape) < special, values, x))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)


def round_to_bf16(x: Tensor) -> Tensor:
    return round_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4, torch.bfloat16)


def assert_threads_change_no_bit(run: Callable[[], Sequence[Tensor]], most: int = 3) -> list[Tensor]:
    """Return the results of a call, which must have the same bits with any number of threads up to the most."""
    results = []
    for threads in range(1, most + 1):
        with on_threads(threads):
            results.append(list(run()))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same(got, want)
    return results[0]


def weight_in(dtype: str, *shape: int) -> Any:
    w = torch.randn(shape) / shape[-1] ** 0.5
    if dtype == "fp4":
        q = quantize_weight(w, (1, FP4_BLOCK), "ue8m0", "e2m1")
        return dataclasses.replace(q, scales=q.scales.to(torch.float8_e8m0fnu))
    return quantize_weight(w, WEIGHT_TILE) if dtype == "fp8" else w.to(getattr(torch, dtype))


def dense(w: Any) -> Tensor:
    return w.double() if isinstance(w, Tensor) else w.dequantize().double()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        gpu_device()


@pytest.fixture(scope="session")
def library() -> build.Library:
    """Return the compiled functions, or skip the test where there is none."""
    reason = cpu.why_not()
    if reason is not None:
        pytest.skip(reason)
    library = build.library()
    library.entry("tiles")  # so that its file is known to whichever test comes first
    return library


def force(name: str, monkeypatch: pytest.MonkeyPatch, library: build.Library) -> str:
    """Force an instruction set; skip the test if this CPU lacks it, or DSMINI_CPU_ISA names one before it."""
    names = list(build.ISAS)
    if name not in build.isas_here() or names.index(name) > names.index(library.isa):
        pytest.skip(f"this CPU has no {name}")
    forced = load(name)
    for module in (calls, tiles):
        monkeypatch.setattr(module, "library", lambda: forced)
    return name


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, library: build.Library) -> str:
    """Force each instruction set that this CPU has, one after the other."""
    return force(request.param, monkeypatch, library)


@pytest.fixture(params=[*ISAS, pytest.param("triton", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Provide the kernels of tiles of each instruction set, and Triton's. Outputs lie between guards."""
    if request.param != "triton":
        force(request.param, monkeypatch, request.getfixturevalue("library"))
        with guarded(tiles):
            yield Kernels()
        return
    device = gpu_device()
    pytest.importorskip("triton", reason="Triton is not installed")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's kernels run on a CPU with TRITON_INTERPRET=1 alone")
    from dsmini_kernels.triton import tiles as module

    with guarded(module):
        yield Kernels("triton", device)


@pytest.fixture
def guarded_outputs() -> Iterator[None]:
    """Fill new memory with garbage before a kernel of tiles writes it, and check the memory around it."""
    with guarded(tiles):
        yield


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def serves_all(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, without_gradients: None) -> None:
    """Serve operations of any size in both dtypes, in training too, and fill outputs with NaN beforehand."""
    few = [f"dsmini.functional.{name}.KERNEL_FROM" for name in ("attention", "experts", "layers", "streams")]
    for place in (*few, *(f"dsmini_kernels.cpu.{name}" for name in ("panels.LEAST", "steps.SMALL", "steps.THREADED"))):
        monkeypatch.setattr(place, 0)
    for place in (*(f"dsmini_kernels.cpu.{name}.has_bf16_units" for name in ("panels", "steps")), BF16):
        monkeypatch.setattr(place, lambda: False)


@pytest.fixture
def private_folder(tmp_path: Path) -> Path:
    """Return the real path of a temporary folder, or skip the test where others can change all of them."""
    try:
        return folder.private(tmp_path)
    except folder.UntrustedFolderError as error:
        pytest.skip(f"the folder for temporary files does not do for compiled code: {error}")


@pytest.fixture
def fresh_door() -> Iterator[None]:
    """Let ops look for backends again, in the test and after it."""
    ops._load.cache_clear()
    build.library.cache_clear()
    yield
    ops._load.cache_clear()
    build.library.cache_clear()
