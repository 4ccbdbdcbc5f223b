"""The C++ kernels give the bits of plain PyTorch, on every instruction set; and what happens where they cannot."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops
from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import build
from dsmini_kernels.cpu import tiles as wrapper

ROOT = Path(__file__).parents[2]
REASON = cpu.why_not()
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

REFERENCE: Any = {
    "quantize": quantize_tiles.__wrapped__,  # pyright: ignore[reportFunctionMemberAccess]
    "dequantize": dequantize_tiles.__wrapped__,  # pyright: ignore[reportFunctionMemberAccess]
    "quantize_dequantize": round_tiles.__wrapped__,  # pyright: ignore[reportFunctionMemberAccess]
}
LIBRARY = build.library()
TYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("e4m3", "e5m2", "e5m6")
SCALES = ("ue8m0", "fp32")
TILES = ((1, 128), (128, 1), (128, 128), (1, 1), (3, 5), (2, 16), (1, 100), (999, 999))
SHAPES = ((1, 1), (1, 63), (3, 64), (127, 130), (129, 576), (2, 3, 130, 63))
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3e38, -3e38, 2.0**-126, 448.0, 447.99997, 464.0)
ISAS = [name for name, number in build.ISA_NUMBERS.items() if number and number <= LIBRARY.isa]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    forced = dataclasses.replace(LIBRARY, isa=build.ISA_NUMBERS[request.param], isa_name=request.param)
    monkeypatch.setattr(wrapper, "library", lambda: forced)
    return request.param


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are full of rubbish before a kernel writes them."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros(*args, **kwargs)
        if out.numel():
            out.view(torch.uint8).fill_(0xA5)
        return out

    class Poisoned:
        def __getattr__(self, name: str) -> Any:
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(wrapper, "torch", Poisoned())


def wild(*shape: int, dtype: torch.dtype = torch.float32, special: float = 0.02) -> Tensor:
    """Numbers of all magnitudes, whose tiles differ by powers of e^3, and some that are special."""
    x = torch.randn(shape) * torch.exp(3 * torch.randn(*shape[:-1], 1))
    values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < special, values, x).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def assert_same(got: Tensor, want: Tensor, nan: bool = True) -> None:
    """Equal to the bit, but for NaN in values, which is equal to any NaN."""
    assert got.shape == want.shape and got.dtype == want.dtype
    equal = bits(got) == bits(want)
    if nan and got.itemsize > 1:
        equal |= got.isnan() & want.isnan()
    assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ, first at {(~equal).nonzero()[0].tolist()}"


def check_all(x: Tensor, tile: tuple[int, int], scale: str, format: str, amax_min: float = 1e-4) -> None:
    codes, scales = REFERENCE["quantize"](x, tile, scale, format, amax_min)
    got = cpu.quantize(x, tile, scale, format, amax_min)
    assert_same(got[0], codes)
    assert_same(got[1], scales, nan=False)
    for dtype in TYPES:
        want = REFERENCE["quantize_dequantize"](x, tile, scale, format, amax_min, dtype)
        assert_same(cpu.quantize_dequantize(x, tile, scale, format, amax_min, dtype), want)
        want = REFERENCE["dequantize"](codes, scales, tile, format, dtype, x.shape[-1])
        assert_same(cpu.dequantize(codes, scales, tile, format, dtype, x.shape[-1]), want)


# --- The same bits


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_are_those_of_plain_torch(isa: str, dtype: torch.dtype, format: str, scale: str) -> None:
    for number, tile in enumerate(TILES):
        for shape in SHAPES[number % 2 :: 2] if tile[0] < 100 else SHAPES:
            check_all(wild(*shape, dtype=dtype), tile, scale, format)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_short_number_in_and_every_code_out(isa: str, format: str, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16 if dtype == torch.float32 else dtype)
    finite = torch.where(every.isfinite(), every, 0).to(dtype)
    for x in (every.to(dtype).view(1, -1), finite.view(256, 256), finite.view(256, 256).T.clamp(-2, 2)):
        for scale in SCALES:
            for tile in ((1, 1), (1, 128), (128, 1)):
                check_all(x, tile, scale, format, 2.0**-100)
    codes = torch.arange(12 << 10).to(torch.uint8).view(4, -1)
    scales = torch.tensor([1.0, 0.75, -0.0, math.nan]).view(4, 1)
    columns = codes.shape[-1] // 12 * 8 if format == "e5m6" else None
    tile = (1, 1 << 20)
    want = REFERENCE["dequantize"](codes, scales, tile, format, dtype, columns)
    assert_same(cpu.dequantize(codes, scales, tile, format, dtype, columns), want)


@pytest.mark.parametrize("amax_min", [0.0, -1.0, 1e-45, 2.0**-126, 2.0**-110, 2.0**-100, 1e30])
@pytest.mark.parametrize("scale", SCALES)
def test_scales_at_the_ends_of_fp32(isa: str, scale: str, amax_min: float) -> None:
    """Zero scales, and 0 / 0; scales that are subnormal; values that overflow."""
    for format in FORMATS:
        for shift in (-149, -140, -126, -120, 0, 126):
            x = torch.randn(7, 96).clamp(-3.9, 3.9).ldexp(torch.tensor(shift))
            x[:2, ::3] = 0
            x[3] = 0
            check_all(x, (1, 32), scale, format, amax_min)
            check_all(x.bfloat16(), (3, 1), scale, format, amax_min)


def test_powers_of_two_and_their_neighbours(isa: str) -> None:
    """As largest magnitudes, where a scale steps; and as the numbers halfway between two codes."""
    powers = 2.0 ** torch.arange(-20, 20)
    for top in (448.0, 57344.0, 65024.0, 1.0):
        edge = powers * top
        x = torch.stack((edge, edge.nextafter(edge * 2), edge.nextafter(edge * 0)))
        for scale in SCALES:
            for format in FORMATS:
                check_all(x, (1, 1), scale, format)
                check_all(torch.arange(-512, 513).div(16).view(1, -1), (1, 2000), scale, format)


def test_a_tile_that_is_not_finite_is_nan_as_a_whole(isa: str) -> None:
    for bad in (math.inf, -math.inf, math.nan):
        for format, nan in (("e4m3", 0x7F), ("e5m2", 0x7F), ("e5m6", None)):
            x = torch.randn(5, 300)
            x[2, 200] = bad
            codes, scales = cpu.quantize(x, (1, 128), "ue8m0", format, 1e-4)
            assert scales.isnan().nonzero().tolist() == [[2, 1]] and scales.view(torch.int32)[2, 1] == 0x7FC00000
            if nan is not None:
                assert (codes.view(torch.uint8)[2, 128:256] == nan).all()
                assert not codes.float()[2, :128].isnan().any()


def test_nan_with_any_payload(isa: str) -> None:
    """0x7FFFFFFF, rounded to BF16 as an integer, would wrap round to zero."""
    x = torch.randn(4, 64)
    x.view(torch.int32)[1, 3], x.view(torch.int32)[2, 5] = 0x7FFFFFFF, -1
    for tile in ((1, 64), (1, 1), (2, 3)):
        check_all(x, tile, "fp32", "e4m3", 0.0)
    scales = x[:, :1].clone()
    scales.view(torch.int32)[0] = 0x7FFFFFFF
    codes = torch.randint(0, 256, (4, 64), dtype=torch.uint8)
    want = REFERENCE["dequantize"](codes, scales, (1, 64), "e4m3", torch.bfloat16)
    assert_same(cpu.dequantize(codes, scales, (1, 64), "e4m3", torch.bfloat16), want)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_views(isa: str, dtype: torch.dtype) -> None:
    whole = wild(130, 70, dtype=dtype)
    views = {
        "transposed": whole.mT,
        "columns": whole[:, 3:66],
        "rows": whole[::2],
        "every second": whole[:, ::2],
        "offset": whole[1:, 1:],
        "expanded": whole[:1].expand(130, 70),
        "batch": wild(3, 5, 33, dtype=dtype)[:, 1:4, 2:],
        "expanded batch": whole.expand(3, 130, 70),
        "turned batch": wild(4, 3, 40, dtype=dtype).transpose(0, 1),
        "deep": wild(2, 4, 3, 40, dtype=dtype).transpose(1, 2)[..., 1:],
    }
    for x in views.values():
        for tile in ((1, 128), (128, 1), (3, 5)):
            check_all(x, tile, "ue8m0", "e4m3")
    codes = torch.randint(0, 120, (40, 50), dtype=torch.uint8)
    for view in (codes[:, 1:], codes.mT, codes[::3]):
        scales = torch.rand(math.ceil(view.shape[0] / 8), math.ceil(view.shape[1] / 16)).mT.contiguous().mT
        want = REFERENCE["dequantize"](view, scales, (8, 16), "e4m3", dtype)
        assert_same(cpu.dequantize(view, scales, (8, 16), "e4m3", dtype), want)


def test_what_is_negative_by_a_bit_has_its_sign(isa: str) -> None:
    """torch turns signs around without touching the memory: imaginary parts of conjugates, for example."""
    x = torch.complex(wild(5, 130, special=0.0), wild(5, 130, special=0.0)).conj().imag
    apart = torch._neg_view(wild(5, 130, special=0.0))
    assert x.is_neg() and apart.is_neg() and apart.is_contiguous()
    for view in (x, apart):
        check_all(view, (1, 128), "ue8m0", "e4m3")
        codes = cpu.quantize(view, (1, 128), "ue8m0", "e4m3", 1e-4)[0]
        assert (codes.float().sign() == view.sign()).all()


def test_packed_codes_of_tiles_that_end_within_eight(isa: str) -> None:
    """A tile's columns are worked off in chunks, and eight packed codes share twelve bytes."""
    for tile in ((128, 50), (3, 9), (1, 100)):
        check_all(wild(128, 600, special=0.001), tile, "ue8m0", "e5m6")


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing_in_nothing_out(isa: str, shape: tuple[int, ...]) -> None:
    for tile in ((1, 128), (128, 1)):
        for format in ("e4m3", "e5m2"):
            check_all(torch.empty(shape), tile, "ue8m0", format)
        codes, scales = cpu.quantize(torch.empty(shape), tile, "fp32", "e5m6", 1e-4)
        assert codes.shape == (*shape[:-1], -(-shape[-1] // 8) * 12) and codes.numel() == scales.numel() == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tiles_begin_anew_with_each_group(isa: str, dtype: torch.dtype) -> None:
    sizes = [0, 1, 127, 0, 128, 129, 63, 0]
    ends = torch.tensor(sizes).cumsum(0)
    x = wild(int(ends[-1]), 130, dtype=dtype, special=0.001)
    for tile in ((128, 1), (128, 128), (1, 128), (3, 5), (999, 7)):
        for scale in SCALES:
            for e in (ends, ends.int(), ends[-1:]):
                want = REFERENCE["quantize_dequantize"](x, tile, scale, "e4m3", 1e-4, torch.bfloat16, e)
                assert_same(cpu.quantize_dequantize(x, tile, scale, "e4m3", 1e-4, torch.bfloat16, e), want)


@pytest.mark.parametrize("columns", [2051, 2048])
def test_large_outputs_go_past_the_cache(isa: str, columns: int) -> None:
    x = wild(2100, columns, special=0.0005)
    x[0] = x[0].nan_to_num(0, 0, 0).clamp(-9, 9)
    for tile in ((1, 128), (128, 1), (128, 128)):
        want = REFERENCE["quantize_dequantize"](x, tile, "ue8m0", "e4m3", 1e-4, torch.float32)
        assert want.nbytes > 16 << 20
        assert_same(cpu.quantize_dequantize(x, tile, "ue8m0", "e4m3", 1e-4, torch.float32), want)


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


def test_threads_change_no_bit(isa: str) -> None:
    x = wild(520, 771, dtype=torch.bfloat16, special=0.0005)
    assert x.numel() > wrapper.THREADED
    ends = torch.tensor([100, 100, 391, 520])
    before = torch.get_num_threads()
    try:
        for tile in ((1, 128), (128, 1), (128, 128), (3, 5)):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                codes, scales = cpu.quantize(x, tile, "fp32", "e5m6", 1e-4)
                back = cpu.dequantize(codes, scales, tile, "e5m6", torch.bfloat16, 771)
                both = cpu.quantize_dequantize(x, tile, "fp32", "e4m3", 1e-4, torch.float32, ends)
                results.append((codes, scales, back, both))
            for other in results[1:]:
                for one, two in zip(results[0], other, strict=True):
                    assert_same(two, one)
    finally:
        torch.set_num_threads(before)


def test_calls_from_many_threads() -> None:
    x = wild(200, 333, dtype=torch.bfloat16)
    want = REFERENCE["quantize_dequantize"](x, (128, 1), "ue8m0", "e4m3", 1e-4, torch.bfloat16)
    same: list[bool] = []

    def work() -> None:
        for _ in range(20):
            got = cpu.quantize_dequantize(x, (128, 1), "ue8m0", "e4m3", 1e-4, torch.bfloat16)
            same.append(bool(((bits(got) == bits(want)) | want.isnan()).all()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 80 and all(same)


# --- Through the door


@pytest.fixture
def fresh_door() -> Iterator[None]:
    """Backends are looked for anew, in the test and after it."""
    ops._load.cache_clear()
    build.library.cache_clear()
    yield
    ops._load.cache_clear()
    build.library.cache_clear()


def test_the_door_takes_the_kernels_by_itself(monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> None:
    calls: list[int] = []
    real = wrapper.library
    monkeypatch.setattr(wrapper, "library", lambda: calls.append(1) or real())
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    x = torch.randn(4, 130)
    for count, call in enumerate((_quantize, _round, _quantize_and_back), 1):
        call(x)
        assert len(calls) >= count
    before = len(calls)
    with ops.use("reference"):
        _quantize_and_back(x)
    monkeypatch.setenv(ops.VARIABLE, "reference")
    _quantize_and_back(x)
    assert len(calls) == before
    monkeypatch.setenv(ops.VARIABLE, "cpu")
    _quantize(x)
    assert len(calls) == before + 1
    assert LIBRARY.isa_name in ops.explain()


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)


def _round(x: Tensor) -> Tensor:
    return round_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4, torch.bfloat16)


def _quantize_and_back(x: Tensor) -> Tensor:
    return dequantize_tiles(*_quantize(x), (1, 128))


def test_what_is_not_served() -> None:
    x = torch.randn(4, 130)
    unserved: list[tuple[Any, tuple[Any, ...]]] = [
        (cpu.quantize, (x.double(), (1, 128), "ue8m0", "e4m3", 1e-4)),
        (cpu.quantize, (x[0], (1, 128), "ue8m0", "e4m3", 1e-4)),
        (cpu.quantize, (x.to("meta"), (1, 128), "ue8m0", "e4m3", 1e-4)),
        (cpu.quantize, (x.to_sparse(), (1, 128), "ue8m0", "e4m3", 1e-4)),
        (cpu.quantize, (x, (0, 128), "ue8m0", "e4m3", 1e-4)),
        (cpu.quantize, (x, (1, 128), "ue8m0", "e3m4", 1e-4)),
        (cpu.quantize, (x, (1, 128), "int8", "e4m3", 1e-4)),
        (cpu.quantize, (x, (1, 128), "ue8m0", "e4m3", math.nan)),
        (cpu.quantize, (x.clone().requires_grad_(), (1, 128), "ue8m0", "e4m3", 1e-4)),
        (cpu.quantize_dequantize, (x, (1, 128), "ue8m0", "e4m3", 1e-4, torch.float64)),
        (cpu.quantize_dequantize, (x, (2, 1), "fp32", "e4m3", 1e-4, torch.float32, torch.tensor([3]))),
        (cpu.quantize_dequantize, (x, (2, 1), "fp32", "e4m3", 1e-4, torch.float32, torch.tensor([3, 2, 4]))),
        (cpu.quantize_dequantize, (x, (1, 1), "fp32", "e4m3", 1e-4, torch.float32, torch.tensor([-1, 4]))),
        (cpu.quantize_dequantize, (x, (1, 1), "fp32", "e4m3", 1e-4, torch.float32, torch.tensor([9, 4]))),
        (cpu.quantize_dequantize, (x[None], (1, 1), "fp32", "e4m3", 1e-4, torch.float32, torch.tensor([4]))),
        (cpu.dequantize, (x, torch.ones(4, 2), (1, 128))),
        (cpu.dequantize, (x.to(torch.float8_e4m3fn), torch.ones(4, 1), (1, 128))),
        (cpu.dequantize, (x.to(torch.float8_e4m3fn), torch.ones(4, 2), (1, 128), "e5m2")),
        (cpu.dequantize, (torch.zeros(4, 24).byte(), torch.ones(4, 1), (1, 128), "e5m6", torch.float32, 17)),
    ]
    for function, arguments in unserved:
        with pytest.raises(Unserved):
            function(*arguments)


def test_forced_and_unable_raises_with_the_reason() -> None:
    with ops.use("cpu"):
        with pytest.raises(ValueError, match=r"'cpu' is forced and cannot run quantize: .*float64"):
            quantize_tiles(torch.randn(2, 3).double(), (1, 128), "ue8m0", "e4m3", 1e-4)
        with pytest.raises(ValueError, match="gradients"):
            _round(torch.randn(2, 3, requires_grad=True))
    with torch.no_grad(), ops.use("cpu"):
        _round(torch.randn(2, 3, requires_grad=True))


def test_whoever_watches_tensors_sees_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "library", lambda: pytest.fail("a kernel ran"))
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 130)
    with Watch():
        _round(x)
    assert seen
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert _round(torch.empty(4, 130)).shape == (4, 130)
    many = torch.randn(2, 4, 130)
    with ops.use("reference"):
        want = torch.stack([_round(one) for one in many])
    assert torch.equal(torch.func.vmap(_round)(many), want)
    with pytest.raises(pytest.fail.Exception, match="a kernel ran"):
        _round(x)


def test_compiled_code_holds_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    want = _round(x := torch.randn(4, 130))
    monkeypatch.setattr(wrapper, "library", lambda: pytest.fail("a kernel ran"))
    torch._dynamo.reset()
    assert_same(torch.compile(_round, backend="eager")(x), want)


# --- Bounds


def raw(**changes: Any) -> int:
    """The C function's answer for a small good call with some arguments changed."""
    x, out = torch.zeros(4, 128), torch.zeros(4, 128)
    arguments = {
        **dict.fromkeys(("operation", "isa", "threads", "in", "out_type", "format", "powers"), 0),
        **{"batch": 1, "rows": 4, "columns": 128, "tile_rows": 1, "tile_columns": 128},
        **{"x": x.data_ptr(), "x_bytes": x.nbytes, "batch_stride": 0, "row_stride": 128},
        **{"out": out.data_ptr(), "out_bytes": out.nbytes, "scales": 0, "scales_bytes": 0},
        **{"ends": 0, "ends_bytes": 0, "groups": 0, "amax_min": 1e-4, "parallel": 0},
        **{"operation": 2, "threads": 1},
        **changes,
    }
    return LIBRARY.tiles(wrapper.CALL.pack(*arguments.values()), wrapper.CALL.size)


def test_the_c_side_checks_before_it_touches() -> None:
    assert raw() == 0
    ends = torch.tensor([2, 4])
    good = {"ends": ends.data_ptr(), "ends_bytes": 16, "groups": 2}
    assert raw(**good) == 0
    huge = 2**62
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("malformed", {"operation": 3}),
        ("malformed", {"operation": -1}),
        ("malformed", {"in": 3}),
        ("malformed", {"out_type": -1}),
        ("malformed", {"format": 3}),
        ("malformed", {"threads": 0}),
        ("lacks", {"isa": 4}),
        ("lacks", {"isa": -1}),
        ("size", {"rows": -1}),
        ("size", {"columns": huge}),
        ("size", {"tile_rows": 0}),
        ("size", {"batch": -1}),
        ("stride", {"row_stride": -128}),
        ("stride", {"batch_stride": -1}),
        ("beyond", {"x_bytes": 4 * 128 * 4 - 1}),
        ("beyond", {"out_bytes": 4 * 128 * 4 - 1}),
        ("beyond", {"row_stride": 129}),
        ("beyond", {"row_stride": huge}),
        ("beyond", {"rows": 5}),
        ("beyond", {"rows": huge}),
        ("beyond", {"batch": 2}),
        ("beyond", {"batch": huge, "rows": huge}),
        ("beyond", {"x": 0}),
        ("beyond", {"out": 0}),
        ("beyond", {"operation": 0, "scales": 0, "scales_bytes": 16}),
        ("beyond", {"operation": 0, "scales": 16, "scales_bytes": 15}),
        ("beyond", {"operation": 1, "columns": 129}),
        ("ends", {**good, "ends_bytes": 15}),
        ("ends", {**good, "groups": 1}),
        ("ends", {**good, "groups": -1}),
        ("ends", {**good, "operation": 0}),
        ("ends", {**good, "batch": 2}),
    ]
    for word, changes in wrong:
        error = raw(**changes)
        assert error and word in wrapper.ERRORS[error], (changes, error)
    assert LIBRARY.tiles(wrapper.CALL.pack(*range(23), 0.0, 0), wrapper.CALL.size - 8) == 1


def test_errors_of_the_c_side_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(LIBRARY, tiles=lambda *_: 5)
    monkeypatch.setattr(wrapper, "library", lambda: broken)
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.quantize(torch.randn(3, 4), (1, 128), "ue8m0", "e4m3", 1e-4)


def test_memory_errors_in_the_c_side(tmp_path: Path) -> None:
    """All primitives under AddressSanitizer and UndefinedBehaviorSanitizer, in buffers of exact sizes."""
    command = build.find_compiler()
    found = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{command[0]} has no libasan.so")
    try:
        path = build.find_or_build(sanitize=True)
    except build.BuildError as error:
        pytest.skip(f"no sanitizer build: {error}")
    env = os.environ | {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, str(ROOT / "tests" / "sanitized.py"), str(path), wrapper.CALL.format]
    run = subprocess.run(driver, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[0]) > 500 * len(ISAS)
    caught = subprocess.run([*driver, "overflow"], capture_output=True, text=True, env=env)
    assert caught.returncode != 0 and "heap-buffer-overflow" in caught.stderr


# --- The build


def in_process(code: str, **env: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output(process: "subprocess.Popen[str]") -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


USE = "import torch, dsmini.numerics as n; n.quantize_tiles(torch.ones(2, 3), (1, 128), 'ue8m0', 'e4m3', 1e-4);"
BUILD = "from dsmini_kernels.cpu import build; print(build.library().path)"


def test_many_processes_build_at_once(tmp_path: Path) -> None:
    """One library is left and nothing else; a killed build leaves what nobody takes for good."""
    cache = str(tmp_path)
    folder = tmp_path / "dsmini" / "kernels"
    killed = in_process(BUILD, XDG_CACHE_HOME=cache)
    for _ in range(600):
        if folder.exists() and list(folder.glob("building-*/*")):
            break
        threading.Event().wait(0.02)
    killed.kill()
    killed.communicate()
    assert not list(folder.glob("*.so"))
    paths = {output(process).strip() for process in [in_process(BUILD, XDG_CACHE_HOME=cache) for _ in range(2)]}
    assert len(paths) == 1 and [str(p) for p in folder.glob("*.so")] == list(paths)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> Path:
    """A cache that holds a copy of the library, and a compiler that must not run."""
    folder = tmp_path / "dsmini" / "kernels"
    folder.mkdir(parents=True)
    (folder / LIBRARY.path.name).write_bytes(LIBRARY.path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder


def test_the_cache_is_used_and_damage_is_mended(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def rebuild(_compiler: Any, _flags: Any, folder: Path, key: str) -> Path:
        path = folder / LIBRARY.path.name
        assert path.name.startswith(key) and not path.exists()
        path.write_bytes(LIBRARY.path.read_bytes())
        builds.append(path)
        return path

    monkeypatch.setattr(build, "_build", rebuild)
    path = build.find_or_build()
    assert path.parent == own_cache and not builds
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.unlink()
        path.write_bytes(damaged)
        assert build.find_or_build().read_bytes() == whole
    assert len(builds) == 3
    monkeypatch.setattr(build, "SOURCES", build.SOURCES[:2])
    key = build._key(build.find_compiler(), build.FLAGS)
    assert not path.name.startswith(key), "sources are part of the key"
    assert key != build._key(build.find_compiler(), (*build.FLAGS, "-g")), "flags are part of the key"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    mine = build.cache_folder()
    assert mine.parent == tmp_path and mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o777)
    assert build.cache_folder() != mine, "a folder that others can write is not used"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "", "PATH": "/nowhere"}, "there is no C++ compiler"),
        ({"CXX": "/no/such/compiler -x"}, "CXX=/no/such/compiler is no program"),
    ],
)
def test_no_compiler(
    monkeypatch: pytest.MonkeyPatch, fresh_door: None, environment: dict[str, str], reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    assert reason in (cpu.why_not() or "")
    x = torch.randn(3, 130)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [_quantize(x) for _ in range(3)]
    assert len(caught) == 1 and reason in str(caught[0].message), "it is reported once"
    assert_same(got[0][0], REFERENCE["quantize"](x, (1, 128), "ue8m0", "e4m3", 1e-4)[0])
    with ops.use("cpu"), pytest.raises(ValueError, match="cannot run quantize"):
        _quantize(x)


@pytest.mark.parametrize("cxx", ["true", 'g++ "x'])
def test_a_compiler_that_makes_nothing_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None, cxx: str
) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert re.match(r"the compiled library cannot be loaded: |CXX=.* is no command: ", cpu.why_not() or "")
    with pytest.warns(UserWarning, match="plain PyTorch runs instead"):
        _quantize(torch.randn(3, 130))


def test_a_library_that_does_not_load_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None
) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"junk")
    monkeypatch.setattr(build, "find_or_build", lambda: path)
    assert (cpu.why_not() or "").startswith("the compiled library cannot be loaded: ")


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> None:
    failing = tmp_path / "cxx"
    failing.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "in a.h"\necho "a.h:1: error: it is late"; exit 1\n'
    )
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu.why_not() == f"{failing} failed: a.h:1: error: it is late"
    assert not list((tmp_path / "dsmini" / "kernels").iterdir())


def test_isa_by_the_environment(monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> None:
    for name in ISAS:
        monkeypatch.setenv(build.ISA_VARIABLE, name)
        build.library.cache_clear()
        assert build.library().isa_name == name and name in cpu.describe()
    monkeypatch.setenv(build.ISA_VARIABLE, "sse9")
    build.library.cache_clear()
    with pytest.raises(ValueError, match="DSMINI_CPU_ISA='sse9' is unknown"):
        cpu.why_not()
    assert LIBRARY.isa == 3 or build.ISA_NUMBERS["avx512"] not in [build.ISA_NUMBERS[name] for name in ISAS]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
def test_no_second_openmp_comes_in() -> None:
    code = (
        USE
        + "torch.set_num_threads(2); x = torch.randn(1024, 512); x @ x.T;"
        + "n.round_tiles(x, (1, 128), 'ue8m0', 'e4m3', 1e-4, torch.bfloat16);"
        + "print(open('/proc/self/maps').read())"
    )
    mapped = {line.split("/")[-1] for line in output(in_process(code)).splitlines() if ".so" in line}
    assert LIBRARY.path.name in mapped
    assert sum(any(name in path for name in ("gomp", "iomp", "libomp")) for path in mapped) == 1, mapped


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_defaults_of_dtype_and_device_do_not_reach_the_kernels(default: torch.dtype) -> None:
    x = torch.randn(40, 512)
    want = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            got = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)
            values = round_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4, torch.float32)
            back = dequantize_tiles(*got, (1, 128))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got[1].dtype == torch.float32 and torch.equal(got[1], want[1])
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(values, back)
