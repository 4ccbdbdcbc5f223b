"""The CPU kernels next to the roof of this machine and to plain PyTorch.

Each kernel runs at two sizes: rows of a product, keys of attention, bytes of what only moves. First its result is
compared with the reference, bit for bit where it rounds. Predicted is the roof: the bytes that the operation must move
over the measured bandwidth, or its FLOPs over the measured matrix peak, whichever takes longer. Each call takes other
operands, so that no cache holds them, as in decoding. Kernel and plain PyTorch take turns. DSMINI_CPU_ISA forces a
narrower instruction set.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_calls import FP8, KERNELS, Kernel, rotating
from benchmarks.question import (
    Case,
    Figure,
    Question,
    Setting,
    cases_over,
    check_bandwidth,
    drawing,
    figure,
    left_out,
    pick,
)
from dsmini import ops
from dsmini.machine import DTYPES
from dsmini.measure.costs import Cost, cost_of
from dsmini.measure.turns import in_turns
from dsmini.ops.explanation import instruction_set


def cases(setting: Setting) -> list[Case]:
    return cases_over(
        "kernel={}", ((name,) for name in KERNELS), 0.6 if setting.quick else 25.0, partial(measure, setting)
    )


@torch.no_grad()
def measure(setting: Setting, name: str) -> Iterator[Figure]:
    kernel, case = KERNELS[name], {"kernel": name, "instructions": instruction_set()}
    if reason := "they run on a CPU" if setting.device.type != "cpu" else why_not():
        yield left_out("share_of_roof", case, reason)
        return
    torch.manual_seed(0)
    large = kernel.sizes[len(kernel.sizes) // 2 if setting.quick else -1]
    for dtype in kernel.dtypes:
        for size, words in {large: "large", kernel.sizes[0]: "small"}.items():
            yield from one(kernel, {**case, "dtype": dtype, "size": size, "at": words}, dtype, size, setting)


def why_not() -> str:
    """Return the reason why the kernels do not run here; "" if they do."""
    serving = ops.serving("cpu")
    return "" if serving == "cpu" else f"{serving} serves tensors in main memory; see python -m dsmini.explain"


def one(kernel: Kernel, case: dict[str, str | int], dtype: str, size: int, setting: Setting) -> Iterator[Figure]:
    """Check a call against the plain version, then yield its time next to the roof and to plain PyTorch."""
    here = FP8 if dtype == "fp8" else DTYPES[dtype]
    run, inputs = kernel.make(size if kernel.is_product else size // here.itemsize, here, setting.device)
    check(kernel, run, inputs, str(case))
    calls: list[ops.Call] = []
    counter: Any = SimpleNamespace(kernel_ran=calls.append)
    with ops.counting(counter), ops.use("cpu"):
        run(*inputs)
    if not calls:
        yield left_out("share_of_roof", case, "plain PyTorch serves this call")
        return
    turn = rotating(run, inputs)  # other operands each time, so that no cache holds them

    def under(backend: str) -> None:
        with ops.use(backend):
            turn()

    runs = {backend: partial(under, backend) for backend in ("cpu", "eager")}
    how = {"count": 5, "seconds": 0.2} if setting.quick else {"count": 15, "seconds": 6.0}
    turns = in_turns(runs, setting.device, least=3, least_seconds=0.002 if setting.quick else 0.01, **how)
    cost = cost_of(calls[0].name, calls[0].result, *calls[0].args, **calls[0].kwargs)
    roof = roof_seconds(" ".join(map(str, case.values())), cost, turns.median("cpu"), setting)
    yield figure("seconds", case, turns.estimate("cpu"), predicted=roof, bound=True, note="of a call")
    yield figure("share_of_roof", case, [roof / seconds for seconds in turns.seconds["cpu"]])
    yield figure("times_as_long", case, turns.ratio("eager", "cpu"), note="plain PyTorch, next to the kernel")


def roof_seconds(what: str, cost: Cost, seconds: float, setting: Setting) -> float:
    """Return the least seconds of a call on this machine: its bytes over bandwidth or FLOPs over peak, the longer.

    The matrix peak is that of FP32, or of BF16 for matrices in BF16 and FP8 where the machine multiplies it faster.

    Raises: ValueError for a call that read memory clearly faster, which can only be an error of counting.
    """
    moved, peaks = cost.read + cost.written, setting.roofs.peak
    memory = moved / check_bandwidth(f"kernels {what}", moved / seconds, setting)
    return max(memory, cost.flops / (peaks["float32"] if cost.dtype == torch.float32 else max(peaks.values())))


def check(kernel: Kernel, run: Callable[..., Any], inputs: Sequence[Tensor], what: str) -> None:
    """Compare the kernel's result with the reference: exactly where it rounds, else within kernel.close.

    The reference then computes in FP32, so that the roundings are the kernel's alone. The result of a call that returns
    none is what it made of copies of its operands. Chosen keys are sets, without an order.
    """
    results: list[list[Tensor]] = []
    for backend in ("cpu", "reference"):
        wide = backend == "reference" and kernel.close
        copies = [t.float() if wide and t.dtype == torch.bfloat16 else t.clone() for t in inputs]
        with ops.use(backend):
            got = run(*copies)
        got = copies[0] - inputs[0] if got is None else got
        parts = got if isinstance(got, tuple) else getattr(got, "parts", (got,))
        results.append([(t if t.is_floating_point() else t.sort().values).float() for t in parts])
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    assert error <= kernel.close, f"{what}: the kernel differs from the reference by {error:.2g}, want {kernel.close}"


def answer(figures: list[Figure]) -> str:
    by_kernel: dict[str, list[float]] = {}
    for f in pick(figures, "share_of_roof"):
        if f.measured is not None:
            by_kernel.setdefault(str(f.case["kernel"]), []).append(100 * f.measured)
    if not by_kernel:
        return ""
    told = ", ".join(f"{name} {_range(found)} %" for name, found in by_kernel.items())
    text = f"With {figures[0].case['instructions']}, kernels reach these shares of the roof: {told}"
    slower = [f.measured for f in pick(figures, "times_as_long") if f.measured is not None]
    return f"{text}; plain PyTorch takes {_range(slower)} times as long." if slower else f"{text}."


def _range(found: Sequence[float]) -> str:
    low, high = (f"{value:.{0 if value >= 10 else 1}f}" for value in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


QUESTION = Question(
    name="kernels",
    title="How close do the CPU kernels come to the roof of this machine?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing("share_of_roof", "Kernels and the roof", "{kernel}, {dtype}", by="at", line=("the roof", 1.0)),
        drawing("times_as_long", "Plain PyTorch", "{kernel}, {dtype}", by="at", line=("the kernel", 1.0), log_y=True),
    ),
)
