"""On CPUs without BF16 units, rows of BF16 numbers are multiplied in FP32."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops, quantize
from dsmini.nn import cached_attention
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear
from dsmini.nn.mla import absorbed_attention
from dsmini.nn.moe import experts
from dsmini.numerics import dense
from tests.helpers.tolerances import BF16_UNIT, relative_error


class Products(TorchDispatchMode):
    """The dtypes in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default, torch.ops.aten.mm.default):
            self.dtypes.add(args[-1].dtype)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("units", [True, False])
def test_attention_of_prompts_multiplies_bf16_only_where_a_cpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda: units)
    latent = torch.randn(2, 40, 3, 8), torch.randn(2, 40, 3, 4), torch.randn(2, 90, 24)
    operands = [x.bfloat16() for x in (*latent, torch.randn(3, 8, 20), torch.randn(3, 20, 6))]
    heads = [x.bfloat16() for x in (torch.randn(2, 4, 40, 8), torch.randn(2, 2, 90, 8), torch.randn(2, 2, 90, 6))]
    mask = torch.ones(1, 40, 90, dtype=torch.bool).triu(51)
    for call, given in ((absorbed_attention, operands), (cached_attention, heads)):
        with ops.use("eager"), Products() as seen:
            got = call(*given, 0.3, mask)
        assert seen.dtypes == {torch.bfloat16 if units else torch.float32}
        want = call.reference(*(x.float() for x in given), 0.3, mask)
        assert got.dtype == torch.bfloat16 and relative_error(got, want) < (4 if units else 1) * BF16_UNIT
    with ops.use("eager"), Products() as seen:
        cached_attention(heads[0][:, :, :8], *heads[1:], 0.3, mask[:, :8])
    assert seen.dtypes == {torch.bfloat16}, "few rows, as of a decoded token, are as fast in BF16 on any CPU"


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("name", ["linear", "experts"])
@pytest.mark.parametrize("held", [False, True])
def test_weights_multiply_bf16_only_where_a_cpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str, held: bool, units: bool
) -> None:
    monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda: units)
    x, weights = torch.randn(40, 24).bfloat16(), [torch.randn(30, 24)]
    routing: tuple[torch.Tensor, ...] = ()
    if name == "experts":
        routing = torch.arange(40)[:, None] % 3, torch.rand(40, 1)
        weights = [torch.randn(3, 16, 24), torch.randn(3, 24, 16), torch.randn(3, 16, 24)]
    operands: list[Any] = [quantize(w, tile=(128, 128), scale="fp32") for w in weights] if held else weights
    reference = {"linear": linear, "experts": experts}[name]
    call: Any = {"linear": quantized_linear, "experts": quantized_experts}[name] if held else reference
    with torch.no_grad(), ops.use("eager"), Products() as seen:
        got = call(x, *routing, *operands)
    assert (seen.dtypes <= {torch.bfloat16}) if units else (seen.dtypes == {torch.float32})
    want = reference.reference(x.float(), *routing, *(dense(w, torch.bfloat16).float() for w in operands))
    assert got.dtype == torch.bfloat16 and relative_error(got, want) < (4 if units else 1) * BF16_UNIT
    if (name, held) == ("linear", False):
        with ops.use("eager"), Products() as seen:
            linear(x, weights[0].requires_grad_())
            with torch.no_grad():
                linear(x[:4], weights[0])
        assert seen.dtypes == {torch.bfloat16}, "autograd would keep wider operands, and few rows save less than a copy"
