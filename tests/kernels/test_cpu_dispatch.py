"""The C++ kernels run for the calls that they serve; all other calls run plain PyTorch."""

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import calls
from tests.kernels.conftest import round_to_bf16

pytestmark = pytest.mark.usefixtures("library")


def test_unsupported_calls_raise_unserved() -> None:
    x, usual = torch.randn(4, 130), {"tile": (1, 128), "scale": "ue8m0", "format": "e4m3", "amax_min": 1e-4}
    both, codes = usual | {"dtype": torch.float32}, x.to(torch.float8_e4m3fn)
    unserved: list[tuple[Any, dict[str, Any]]] = [
        *((cpu.quantize, usual | {"x": odd}) for odd in (x.double(), x[0], x.to("meta"), x.to_sparse())),
        (cpu.quantize, usual | {"x": x.clone().requires_grad_()}),
        *((cpu.quantize, usual | {"x": x, name: odd}) for name, odd in (("tile", (0, 128)), ("format", "e3m4"))),
        *((cpu.quantize, usual | {"x": x, name: odd}) for name, odd in (("scale", "int8"), ("amax_min", math.nan))),
        (cpu.quantize_dequantize, both | {"x": x, "dtype": torch.float64}),
        *(
            (cpu.quantize_dequantize, both | {"x": x, "ends": torch.tensor(e)})
            for e in ([3], [3, 2, 4], [-1, 4], [9, 4])
        ),
        (cpu.quantize_dequantize, both | {"x": x[None], "ends": torch.tensor([4])}),
        *((cpu.dequantize, {"codes": x, "scales": torch.ones(4, n), "tile": (1, 128)}) for n in (2, 1)),
        (cpu.dequantize, {"codes": codes, "scales": torch.ones(4, 1), "tile": (1, 128)}),
        (cpu.dequantize, {"codes": codes, "scales": torch.ones(4, 2), "tile": (1, 128), "format": "e5m2"}),
    ]
    for function, arguments in unserved:
        with pytest.raises(Unserved):
            function(**arguments)


def test_modes_transforms_and_the_compiler_see_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, many, seen = torch.randn(4, 130), torch.randn(2, 4, 130), list[Any]()
    with ops.use("reference"):
        want, each = round_to_bf16(x), torch.stack([round_to_bf16(one) for one in many])
    monkeypatch.setattr(calls, "library", lambda: pytest.fail("a kernel ran"))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        assert torch.equal(round_to_bf16(x), want) and seen
    with FakeTensorMode():
        assert round_to_bf16(torch.empty(4, 130)).shape == (4, 130)
    assert torch.equal(torch.func.vmap(round_to_bf16)(many), each)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(round_to_bf16, backend="eager")(x), want)
    with pytest.raises(pytest.fail.Exception, match="a kernel ran"):
        round_to_bf16(x)
