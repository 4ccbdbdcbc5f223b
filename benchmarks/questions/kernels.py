"""How close do the CPU kernels come to the roof of this machine?

Each kernel runs at the shapes of a model with DeepSeek's widths of heads. First its result is compared with the
reference, bit for bit where it rounds. Predicted is the roof: the bytes that the operation must move over the measured
bandwidth, or its FLOPs over the measured matrix peak, whichever takes longer. Each call takes other weights, so that no
cache holds them, as in decoding. Kernel, plain PyTorch (eager), the reference and a plain read of memory take turns.
DSMINI_CPU_ISA forces a narrower instruction set.
"""

import copy
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernel_calls
from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, pick, values
from benchmarks.kernel_calls import CALLS, Calls
from benchmarks.questions.quantize import freed_memory_kept, why_not
from benchmarks.steps import FASTEST, check_bandwidth
from dsmini import ops
from dsmini.machine import once
from dsmini.measure.costs import Cost, cost_of
from dsmini.measure.timing import interleaved
from dsmini.ops.explanation import instruction_set, operations
from dsmini.report.charts import over_labels
from dsmini.report.units import plural

NAME = "kernels"
CPU = torch.device("cpu")
ROUNDS, QUICK_ROUNDS = 15, 5
TURN, QUICK_TURN = 0.01, 0.003
"""Least seconds of a turn."""
SLOW_ROUNDS, SLOW_SECONDS = 3, 2.0
"""Rounds with plain PyTorch, and seconds after which no such round begins."""
ROUNDING = ("quantize", "dequantize", "quantize_dequantize")

figure = Figures(NAME, higher={"share_of_roof": "", "over_eager": "x", "over_reference": "x"}, lower={"seconds": "s"})


class Work:
    """Work of the kernels that ran, by the costs of their operations."""

    def __init__(self) -> None:
        self.costs: list[Cost] = []

    def kernel_ran(self, call: ops.Call) -> None:
        self.costs.append(cost_of(call.name, call.result, *call.args, **call.kwargs))

    def mean(self) -> tuple[float, float]:
        """Return the bytes and the FLOPs of a call."""
        bytes_, flops = [sum(part) for part in zip(*((c.read + c.written, c.flops) for c in self.costs), strict=True)]
        return bytes_ / len(self.costs), flops / len(self.costs)


def cases(setting: Setting) -> list[Case]:
    seconds = 0.6 if setting.quick else 25.0
    return cases_over("kernel={}", [(name,) for name in CALLS], seconds, partial(measure, setting))


@torch.no_grad()
def measure(setting: Setting, name: str) -> Iterator[Figure]:
    if reason := "they run on a CPU" if setting.device.type != "cpu" else why_not():
        yield figure.left_out("share_of_roof", {"kernel": name}, reason)
        return
    torch.manual_seed(0)
    plain = torch.ones(int(kernel_calls.CACHES * setting.roofs.cache_bytes) // 4)
    with freed_memory_kept():
        for calls in CALLS[name](setting):
            case = {"kernel": name, "operands": calls.operands, "rows": calls.rows, "instructions": instruction_set()}
            yield from _measured(operations()[name], case, calls, setting, plain)


def _measured(operation: Any, case: dict[str, Any], calls: Calls, setting: Setting, plain: Tensor) -> Iterator[Figure]:
    """Yield the figures of some calls. `plain` is memory to read in the same rounds: a stored roof may be too low."""
    work = Work()
    check(operation, calls)
    with ops.counting(work), ops.use("cpu"):
        for arguments in calls.turns:
            operation(*arguments, **calls.keywords)
    if len(work.costs) < len(calls.turns):
        yield figure.left_out("share_of_roof", case, "plain PyTorch serves these calls")
        return
    taken = _timed(operation, calls, setting, plain)
    read = max(setting.roofs.bandwidth, plain.nbytes / min(taken.pop("read")))
    setting = dataclasses.replace(setting, roofs=dataclasses.replace(setting.roofs, bandwidth=read))
    seconds = statistics.median(taken["kernel"])
    operands = (*calls.turns[0], *calls.keywords.values())
    roof = roof_seconds(" ".join(map(str, case.values())), *work.mean(), operands, seconds, setting)
    yield figure("seconds", case, taken["kernel"], predicted=roof, bound=True, note="of a call; predicted: the roof")
    yield figure("share_of_roof", case, [roof / t for t in taken["kernel"]], note="the roof's time over the kernel's")
    for other in ("eager", "reference"):
        if other in taken:
            yield figure(
                f"over_{other}", case, [t / seconds for t in taken[other]], note=f"{other}'s time over the kernel's"
            )


def _timed(operation: Any, calls: Calls, setting: Setting, plain: Tensor) -> dict[str, list[float]]:
    """Return the seconds of a call by implementation; each takes the operands that were not used for longest.

    "read" has the seconds of a sum over `plain`.
    """
    turns = calls.turns
    following = itertools.cycle(turns)
    kept: list[object] = [None] * len(turns)  # results, so that they are not written into a cache either

    def run(backend: str, n: int) -> None:
        with ops.use(backend):
            for i in range(n):
                kept[i % len(kept)] = operation(*next(following), **calls.keywords)

    names = {"kernel": "cpu", "eager": "eager", "reference": "reference"}
    if operation.plain is operation.reference:
        del names["eager"]
    least = QUICK_TURN if setting.quick else TURN
    repeats = {}
    for name, backend in names.items():
        run(backend, 1)
        repeats[name] = max(1, min(len(turns), math.ceil(least / once(partial(run, backend, 1), CPU))))
    runs = {name: partial(run, backend, repeats[name]) for name, backend in names.items()}
    taken = interleaved(runs, CPU, SLOW_ROUNDS, SLOW_SECONDS)
    fast = {"kernel": runs["kernel"], "read": plain.sum}
    for name, more in interleaved(fast, CPU, QUICK_ROUNDS if setting.quick else ROUNDS).items():
        taken.setdefault(name, []).extend(more)
    return {name: [t / repeats.get(name, 1) for t in seconds] for name, seconds in taken.items()}


def roof_seconds(
    what: str, moved: float, flops: float, arguments: Sequence[Any], seconds: float, setting: Setting
) -> float:
    """Return the least seconds of a call on this machine.

    The matrix peak is that of FP32, or of BF16 where an operand is BF16, or multiplied as such, and the machine
    multiplies it faster.

    Raises: ValueError for a call that took clearly less, which can only be an error of counting.
    """
    memory = moved / check_bandwidth(f"{NAME} {what}", moved / seconds, setting)
    tensors = [t for a in arguments for t in ((a,) if isinstance(a, Tensor) else getattr(a, "tensors", ()))]
    found = [*(t.dtype for t in tensors), *(a for a in arguments if isinstance(a, torch.dtype))]
    dtypes = {"float32", *(str(dtype).removeprefix("torch.") for dtype in found)}
    arithmetic = flops / max(rate for name, rate in setting.roofs.peak.items() if name in dtypes)
    if arithmetic > FASTEST * seconds:
        raise ValueError(
            f"{NAME} {what}: {flops / seconds / 1e9:.0f} GFLOP/s are above the measured matrix peak: FLOPs are counted "
            "wrong, or the stored peak is too low; --fresh measures it again"
        )
    return max(memory, arithmetic)


def check(operation: Any, calls: Calls) -> None:
    """Compare the kernel's result with the reference: bit for bit where it rounds, else within calls.close.

    The result of a call that returns none is what it made of copies of its operands.
    """
    results: list[list[Tensor]] = []
    for backend in ("cpu", "reference"):
        with ops.use(backend):
            arguments = copy.deepcopy(calls.turns[0]) if calls.in_place else calls.turns[0]
            got = operation(*arguments, **calls.keywords)
            changed = (
                [w - v for w, v in zip(arguments[0].tensors, calls.turns[0][0].tensors, strict=True)]
                if got is None
                else got
            )
            results.append([changed] if isinstance(changed, Tensor) else list(changed))
    if operation.name in ROUNDING:
        pairs = zip(*([t.view(torch.uint8) for t in result] for result in results), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"{operation.name}: the kernel's bits are not the reference's"
        return
    # picks are sets, without an order
    a, b = ((t if t.is_floating_point() else t.sort().values).float() for (t, *_) in results)
    error = float((a - b).norm() / b.norm())
    assert error <= calls.close, (
        f"{operation.name}: the kernel differs from the reference by {error:.2g}, want {calls.close}"
    )


def finding(figures: list[Figure]) -> str:
    shares = [f for f in pick(figures, "share_of_roof") if f.measured is not None]
    if not shares:
        return ""
    by_kernel = {str(f.case["kernel"]): values(shares, "share_of_roof", kernel=f.case["kernel"]) for f in shares}
    told = [f"{name} {_range([100 * s for s in found])} %" for name, found in by_kernel.items()]
    sets = " and ".join(dict.fromkeys(str(f.case["instructions"]) for f in shares))
    text = f"With {sets}, kernels reach these shares of the roof: {', '.join(told)}"
    if faster := values(figures, "over_eager") + values(figures, "over_reference"):
        text += f"; they are {_range(faster)} times as fast as plain PyTorch"
    return f"{text}."


def _range(found: Sequence[float]) -> str:
    low, high = (f"{value:.{0 if value >= 10 else 1}f}" for value in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


def plots(figures: list[Figure]) -> list[Plot]:
    drawn: list[Plot] = []
    for metrics, title, y, line, log in (
        (("share_of_roof",), "Kernels and the roof", "share of the roof", ("the roof", 1.0), False),
        (
            ("over_eager", "over_reference"),
            "Kernels compared with plain PyTorch",
            "times as fast",
            ("equal", 1.0),
            True,
        ),
    ):
        found = [(metric, f) for metric in metrics for f in pick(figures, metric) if "operands" in f.case]
        groups: dict[str, dict[str, Figure]] = {}
        for metric, f in found:
            name = _size(f) if len(metrics) == 1 else f"{metric.removeprefix('over_')}, {_size(f)}"
            groups.setdefault(name, {})[f"{f.case['kernel']} {f.case['operands']}"] = f
        drawn += over_labels(title, y, groups, line=line, log_y=log)
    return drawn


def _size(f: Figure) -> str:
    return plural(int(f.case["rows"]), "row")
