"""The C++ kernels run for the calls that they serve, whatever torch's defaults are; other calls run plain PyTorch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsmini import ops
from dsmini.inference.fused import extract_weights
from dsmini.nn.layers import linear
from dsmini.numerics import dequantize_tiles
from dsmini.training.muon import HALLEY, MuonMatrices, muon_update
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import calls
from tests.helpers.decoding import model_of
from tests.kernels.conftest import quantize, round_to_bf16

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
        *((cpu.quantize_dequantize, both | {"x": x, "ends": torch.tensor(e)}) for e in ([3], [3, 2, 4], [-1, 4])),
        (cpu.quantize_dequantize, both | {"x": x[None], "ends": torch.tensor([4])}),
        (cpu.dequantize, {"codes": x, "scales": torch.ones(4, 2), "tile": (1, 128)}),
        (cpu.dequantize, {"codes": codes, "scales": torch.ones(4, 1), "tile": (1, 128)}),
        (cpu.dequantize, {"codes": codes, "scales": torch.ones(4, 2), "tile": (1, 128), "format": "e5m2"}),
        (cpu.dequantize, {"codes": codes, "scales": torch.ones(4, 2), "tile": (1, 128), "columns": 129}),
    ]
    for function, arguments in unserved:
        with pytest.raises(Unserved):
            function(**arguments)


def test_modes_transforms_and_the_compiler_see_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, many = torch.randn(4, 130), torch.randn(2, 4, 130)
    with ops.use("reference"):
        want, each = round_to_bf16(x), torch.stack([round_to_bf16(one) for one in many])
    monkeypatch.setattr(calls, "library", lambda: pytest.fail("a kernel ran"))
    with FakeTensorMode():
        assert round_to_bf16(torch.empty(4, 130)).shape == (4, 130)
    assert torch.equal(torch.func.vmap(round_to_bf16)(many), each)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(round_to_bf16, backend="eager")(x), want)
    weight = torch.randn(3, 130).bfloat16()
    with pytest.warns(DeprecationWarning, match="trace"):
        traced: Any = torch.jit.trace(lambda x: linear(x, weight), many[0], check_trace=False)
    assert torch.equal(traced(x), F.linear(x, weight.float()))
    with pytest.raises(pytest.fail.Exception, match="a kernel ran"):
        round_to_bf16(x)


def tiles_call() -> Callable[[], Sequence[Tensor]]:
    x = torch.randn(40, 512)
    codes, scales = quantize(x)
    return lambda: (*quantize(x), round_to_bf16(x), dequantize_tiles(codes, scales, (1, 128)))


def step_call(weights: str) -> Callable[[], Sequence[Tensor]]:
    model = model_of("odd", weights).requires_grad_(False)
    x, parts = torch.randn(3, model.config.dim), extract_weights(model.layers[1], torch.float32)
    assert parts is not None
    return lambda: cpu.feed_forward_step(x, parts[1])


def keys_call() -> Callable[[], Sequence[Tensor]]:
    q, k, weights = torch.randn(1, 2, 4, 8), torch.randn(1, 30, 8), torch.rand(1, 2, 4)
    return lambda: [cpu.topk_keys(q, k, weights, 5, torch.ones(1, 2, 30, dtype=torch.bool, device="cpu"))]


def muon_call() -> Callable[[], Sequence[Tensor]]:
    param, grad, momentum = torch.randn(3, 4, 6).unbind()

    def update() -> list[Tensor]:
        new = MuonMatrices(params=[param.clone()], grads=[grad], momenta=[momentum.clone()])
        muon_update(new, HALLEY, lr=0.1, momentum=0.9, weight_decay=0.3, matmul_dtype=torch.float32)
        return new.params

    return update


CALLS: dict[str, Callable[[], Callable[[], Sequence[Tensor]]]] = {
    **{"tiles": tiles_call, "chosen keys": keys_call, "muon": muon_call},
    **{f"step in {weights}": lambda weights=weights: step_call(weights) for weights in ("bfloat16", "fp8")},
}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_default_dtype_and_device_change_no_bit(name: str, default: torch.dtype) -> None:
    call = CALLS[name]()
    with torch.no_grad():
        want = call()
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                got = call()
        finally:
            torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
