"""The CPU kernels in steps of a model, next to the roof of this machine and to plain PyTorch.

Steps of training, of reading a prompt and of decoding are run dry. Each distinct call that a kernel serves is then made
again alone, on random operands of its own shape: other ones each time where the step reads them from memory, so that no
cache holds them. Predicted is the roof: the bytes that come from memory over the measured bandwidth, or the FLOPs over
the measured matrix peak, whichever takes longer. It leaves out caches: kernels that convert small operands stay far
below. All calls of a kernel count together, and kernel and plain PyTorch take turns. Other kinds of attention than MLA
show their own kernels alone. DSMINI_CPU_ISA forces a narrower instruction set. tests/kernels compares results.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import models
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
from dsmini.measure.calls import Call, Operands
from dsmini.measure.dry import dry_count
from dsmini.measure.roofs import why_unusable
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepShape
from dsmini.ops.explanation import instruction_set

TOPK = 256
"""Keys that a query of sparse attention chooses."""
STEPS: Mapping[str, dict[str, Any]] = {
    "training": {"work": "training", "batch": 4, "tokens": 256},
    "V4 training": {"work": "training", "batch": 4, "tokens": 256, "attention": "compressed"},
    "prompt": {"work": "prefill", "batch": 1, "tokens": 512},
    "decoding": {"work": "decode", "batch": 1, "tokens": 1024},
    "sparse prompt": {"work": "prefill", "batch": 1, "tokens": 512, "attention": "dsa"},
    "sparse decoding": {"work": "decode", "batch": 1, "tokens": 1024, "attention": "dsa"},
    "MHA decoding": {"work": "decode", "batch": 1, "tokens": 1024, "attention": "mha"},
    "short V4 prompt": {"work": "prefill", "batch": 1, "tokens": 32, "attention": "compressed"},
    "V4 decoding": {"work": "decode", "batch": 1, "tokens": 1024, "attention": "compressed"},
}
OWN = ("attention", "topk", "streams", "sinkhorn")
"""Words of kernels that another attention than MLA, or V4, has."""


def cases(setting: Setting) -> list[Case]:
    dtypes = [setting.dtype_name] if setting.quick else [*DTYPES, "fp8"]
    points = [(step, dtype) for step in STEPS for dtype in dtypes]
    return cases_over("step={} dtype={}", points, 3.0 if setting.quick else 20.0, partial(measure, setting))


def measure(setting: Setting, step: str, dtype: Any) -> Iterator[Figure]:
    case = {"step": step, "dtype": dtype, "instructions": instruction_set()}
    if reason := "they run on a CPU" if setting.device.type != "cpu" else why_not():
        yield left_out("share_of_roof", case, reason)
        return
    slow = why_unusable(DTYPES.get(dtype, torch.bfloat16), setting.roofs.peak)
    operands = Operands(setting.roofs.cache_bytes)
    for kernel, calls in calls_of(setting, step, dtype).items():
        turns = [operands.turn(call)[0] for call in calls]

        def under(backend: str, turns: Sequence[Any] = turns) -> None:
            with torch.no_grad(), ops.use(backend):
                for turn in turns:
                    turn()

        runs = {backend: partial(under, backend) for backend in ("cpu", "eager") if backend == "cpu" or not slow}
        how = {"count": 6, "seconds": 0.2} if setting.quick else {"count": 15, "seconds": 2.0}
        how |= {"least": 3, "least_seconds": 0.002 if setting.quick else 0.01}
        taken = in_turns(runs, setting.device, **{**setting.turns, **how})
        here, roof = {"kernel": kernel, **case}, roof_seconds(calls, taken.median("cpu"), dtype, setting)
        yield figure("seconds", here, taken.estimate("cpu"), predicted=roof, bound=True, note=f"calls: {len(calls)}")
        yield figure("share_of_roof", here, [roof / seconds for seconds in taken.seconds["cpu"]])
        if slow:
            yield left_out("times_as_long", here, slow)
        else:
            yield figure("times_as_long", here, taken.ratio("eager", "cpu"), note="plain PyTorch, next to the kernel")


def calls_of(setting: Setting, step: str, dtype: Any) -> dict[str, list[Call]]:
    """Return the distinct calls that each kernel serves in a step of the model, by the kernel's words."""
    how = dict(STEPS[step])
    config, attention = models.decoded(setting.quick), how.pop("attention", None)
    if how["work"] == "training":
        config, how["tokens"] = models.TRAINED, min(how["tokens"], models.TRAINED.max_seq_len)
    if attention == "compressed":
        config = dataclasses.replace(models.compressed(config), hc_mult=4)
    elif attention is not None:
        config = models.sparse(config, TOPK) if attention == "dsa" else dataclasses.replace(config, attention=attention)
    shape = StepShape(config=config, dtype=dtype, **how)
    found: dict[str, list[Call]] = {}
    for call, _ in dry_count(lambda: shape.make(setting.device), setting.roofs.cache_bytes).calls.values():
        own = attention is None or any(word in call.kind for word in OWN)
        if isinstance(call.run, ops.Operation) and own:
            found.setdefault(call.kind, []).append(call)
    return found


def why_not() -> str:
    """Return the reason why the kernels do not run here; "" if they do."""
    serving = ops.serving("cpu")
    return "" if serving == "cpu" else f"{serving} serves tensors in main memory; see python -m dsmini.explain"


def roof_seconds(calls: Sequence[Call], seconds: float, dtype: str, setting: Setting) -> float:
    """Return the least seconds of calls here: for each its bytes over bandwidth or FLOPs over peak, the longer.

    The matrix peak is that of FP32, or of BF16 for steps in BF16 and FP8 where the machine multiplies it faster.

    Raises: ValueError for calls that read memory clearly faster, which can only be an error of counting.
    """
    moved = sum(call.cold for call in calls)
    rate = check_bandwidth(f"kernel {calls[0].kind}", moved / seconds, setting)
    roofs = dataclasses.replace(setting.roofs, bandwidth=rate)
    return sum(roofs.least_seconds(call.cold, call.flops, dtype) for call in calls)


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
        drawing("share_of_roof", "Kernels and the roof", "{kernel}, {dtype}", by="step", line=("the roof", 1.0)),
        drawing("times_as_long", "Plain PyTorch", "{kernel}, {dtype}", by="step", line=("the kernel", 1.0), log_y=True),
    ),
)
