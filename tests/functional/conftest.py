"""Forced backends, and operands on their devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from dsmini import ops, quantize
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear
from dsmini.numerics import WEIGHT_TILE, QuantizedTensor
from tests.conftest import require_cpu_kernels
from tests.helpers.gpu import gpu_device
from tests.helpers.operations import Case

SIZES = (1, 63, 130)
BACKENDS = [pytest.param(name, marks=pytest.mark.gpu) if name == "triton" else name for name in ops.BACKENDS]
"""All backends as parameters. Triton's kernels run in `pytest -m gpu`."""


class Unserved(Exception):  # noqa: N818, as backends spell it
    """The error of a backend that cannot serve a call."""


@contextmanager
def forced(backend: str) -> Iterator[str]:
    """Force a backend and give the device of its tensors; skip the test where its kernels cannot run."""
    device = gpu_device() if backend == "triton" else "cpu"
    with ops.use(backend):
        if backend == "cpu":
            require_cpu_kernels()
        yield device


def held(case: Case) -> Case:
    """Return a case of linear or experts with codes for weights."""
    places, operation = ((1,), quantized_linear) if case.operation is linear else ((3, 4, 5), quantized_experts)
    codes = {i: quantize(case.arguments[i], WEIGHT_TILE, "fp32") for i in places}
    return case.changed(codes)._replace(operation=operation)


def moved(value: Any, device: str) -> Any:
    """Return an argument, moved to the device if it is a tensor."""
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value) if not hasattr(value, "_fields") else value
    if isinstance(value, QuantizedTensor):
        return replace(value, codes=value.codes.to(device), scales=value.scales.to(device))
    return value.to(device) if isinstance(value, Tensor) else value
