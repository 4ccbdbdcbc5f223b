"""The C++ kernels run for the calls that they serve; all other calls run plain PyTorch."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops
from dsmini.numerics import quantize_tiles
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import build
from dsmini_kernels.cpu import tiles as wrapper
from tests.kernels.conftest import assert_same, quantize, quantize_and_back, round_to_bf16

pytestmark = pytest.mark.usefixtures("library")


def test_kernels_run_by_default(library: build.Library, monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> None:
    calls: list[int] = []
    monkeypatch.setattr(wrapper, "library", lambda: calls.append(1) or library)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    x = torch.randn(4, 130)
    for count, call in enumerate((quantize, round_to_bf16, quantize_and_back), 1):
        call(x)
        assert len(calls) >= count
    before = len(calls)
    with ops.use("reference"):
        quantize_and_back(x)
    monkeypatch.setenv(ops.VARIABLE, "reference")
    quantize_and_back(x)
    assert len(calls) == before
    monkeypatch.setenv(ops.VARIABLE, "cpu")
    quantize(x)
    assert len(calls) == before + 1
    assert library.isa in ops.explain()


def test_unsupported_calls_raise_unserved() -> None:
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


def test_forced_backend_that_cannot_serve_raises() -> None:
    with ops.use("cpu"):
        with pytest.raises(ValueError, match=r"'cpu' is forced and cannot run quantize: .*float64"):
            quantize_tiles(torch.randn(2, 3).double(), (1, 128), "ue8m0", "e4m3", 1e-4)
        with pytest.raises(ValueError, match="gradients"):
            round_to_bf16(torch.randn(2, 3, requires_grad=True))
    with torch.no_grad(), ops.use("cpu"):
        round_to_bf16(torch.randn(2, 3, requires_grad=True))


def test_modes_and_transforms_see_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "library", lambda: pytest.fail("a kernel ran"))
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 130)
    with Watch():
        round_to_bf16(x)
    assert seen
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert round_to_bf16(torch.empty(4, 130)).shape == (4, 130)
    many = torch.randn(2, 4, 130)
    with ops.use("reference"):
        want = torch.stack([round_to_bf16(one) for one in many])
    assert torch.equal(torch.func.vmap(round_to_bf16)(many), want)
    with pytest.raises(pytest.fail.Exception, match="a kernel ran"):
        round_to_bf16(x)


def test_torch_compile_uses_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    want = round_to_bf16(x := torch.randn(4, 130))
    monkeypatch.setattr(wrapper, "library", lambda: pytest.fail("a kernel ran"))
    torch._dynamo.reset()
    assert_same(torch.compile(round_to_bf16, backend="eager")(x), want)
