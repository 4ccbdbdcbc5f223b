"""How fast are the CPU kernels for tiles?

Each operation on a matrix of 4096 x 7168 (quick: 512 x 7168) is checked to the bit against plain PyTorch, then timed,
on one thread and on all; kernel and copy take turns, and plain PyTorch has a few. Rates count the bytes that are read
and written. The copy is torch's y.copy_(x) of the input's dtype. Freed memory is kept for the next call, as in a
training step.
"""

import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, pick, values
from dsmini import ops
from dsmini.machine import once
from dsmini.measure.timing import interleaved, ratios
from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles
from dsmini.report.charts import over_labels
from dsmini.report.units import plural

NAME = "quantize"
SHAPE, QUICK_SHAPE = (4096, 7168), (512, 7168)
ROUNDS, QUICK_ROUNDS = 15, 5
EAGER_ROUNDS = 3
"""Turns of plain PyTorch, which takes twenty times as long."""
CALLS = 1000
AMAX_MIN = 1e-4
CPU = torch.device("cpu")
Run = Callable[[], Any]

figure = Figures(
    NAME,
    higher={"bandwidth": "bytes/s", "share_of_copy": "x", "over_eager": "x"},
    lower={"call_seconds": "s"},
)


def cases(setting: Setting) -> list[Case]:
    most = torch.get_num_threads()
    points, seconds = ((n,) for n in sorted({1, most})), 3 if setting.quick else 20
    timed = cases_over("threads={}", points, seconds, partial(measure, setting))
    return [*timed, Case(key=f"calls threads={most}", seconds=1, run=calls)]


@torch.no_grad()
def measure(setting: Setting, threads: int) -> Iterator[Figure]:
    if reason := why_not():
        yield figure.left_out("bandwidth", {"operation": "all", "threads": threads}, reason)
        return
    torch.manual_seed(0)
    x = torch.randn(QUICK_SHAPE if setting.quick else SHAPE).bfloat16()
    rounds = QUICK_ROUNDS if setting.quick else ROUNDS
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with freed_memory_kept():
            for name, (run, source, moved) in operations(x).items():
                check(name, run)
                yield from _operation({"operation": name, "threads": threads}, run, source, moved, rounds)
    finally:
        torch.set_num_threads(before)


def operations(x: Tensor) -> dict[str, tuple[Run, Tensor, int]]:
    """Return each operation on x [rows, columns], a tensor to copy instead, and the bytes that it moves."""
    runs: dict[str, tuple[Run, Tensor, int]] = {}
    for name, source in (("BF16", x), ("FP32", x.float())):
        for tile in ((1, 128), (128, 1), (128, 128)):
            for scale in ("ue8m0", "fp32"):
                run = partial(round_tiles, source, tile, scale, "e4m3", AMAX_MIN, torch.bfloat16)
                runs[f"round {name} {tile[0]}x{tile[1]} {scale}"] = run, source, x.numel() * (source.itemsize + 2)
    for format in ("e4m3", "e5m6"):
        quantize = partial(quantize_tiles, x, (1, 128), "ue8m0", format, AMAX_MIN)
        codes, scales = quantize()
        moved = x.nbytes + codes.nbytes + scales.nbytes
        runs[f"quantize BF16 1x128 {format}"] = quantize, x, moved
        run = partial(dequantize_tiles, codes, scales, (1, 128), format, torch.bfloat16, x.shape[1])
        runs[f"dequantize BF16 1x128 {format}"] = run, x, moved
    return runs


def _operation(case: dict[str, Any], run: Run, source: Tensor, moved: int, rounds: int) -> Iterator[Figure]:
    """Time an operation: kernel, copy and plain PyTorch take turns."""
    repeats = max(1, 2_000_000 // source.numel())
    copy = partial(_repeat, partial(torch.empty_like(source).copy_, source), repeats)
    both: dict[str, Run] = {"copy": copy, "kernel": partial(_with, "cpu", run, repeats)}
    taken = interleaved(both | {"eager": partial(_with, "eager", run)}, CPU, EAGER_ROUNDS)
    for name, times in interleaved(both, CPU, rounds - EAGER_ROUNDS).items():
        taken[name] += times
    kernels = [t / repeats for t in taken["kernel"]]
    yield figure("bandwidth", case, [moved / t for t in kernels])
    more = moved / (2 * source.nbytes)
    shares = [more * ratio for ratio in ratios(taken, "copy", "kernel")]
    yield figure("share_of_copy", case, shares, note="bytes a second over those of y.copy_(x)")
    slower = [t / statistics.median(kernels) for t in taken["eager"]]
    yield figure("over_eager", case, slower, note="plain PyTorch's time over the kernel's")


def _repeat(run: Run, n: int) -> None:
    for _ in range(n):
        run()


def _with(backend: str, run: Run, n: int = 1) -> None:
    with ops.use(backend):
        _repeat(run, n)


def check(name: str, run: Run) -> None:
    """Assert that the kernel's bits are those of plain PyTorch."""
    results: list[list[Tensor]] = []
    for backend in ("cpu", "eager"):
        with ops.use(backend):
            got = run()
            results.append([t.view(torch.uint8) for t in ([got] if isinstance(got, Tensor) else got)])
    assert all(map(torch.equal, *results)), f"{name}: the kernel's bits are not those of plain PyTorch"


def why_not() -> str | None:
    """Return why the kernels do not run here, or None if they do."""
    try:
        with ops.use("cpu"):
            round_tiles(torch.ones(1, 128), (1, 128), "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16)
    except ValueError as reason:
        return str(reason)
    return None


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep freed memory for the next call, as a training step does: fresh pages cost more than the work.

    Afterwards its thresholds are those that it comes to by itself where large blocks are freed. Does nothing without
    glibc.
    """
    max_mmaps, mmap_threshold, trim_threshold = -4, -3, -1  # names of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        yield
        return
    mallopt(max_mmaps, 0)
    mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(max_mmaps, 1 << 16)
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


@torch.no_grad()
def calls() -> Iterator[Figure]:
    """Time a call on a matrix so small that nothing else counts, the best of many."""
    if reason := why_not():
        yield figure.left_out("call_seconds", {"call": "kernel"}, reason)
        return
    from dsmini_kernels import cpu  # pyright: ignore[reportMissingImports]

    x = torch.randn(1, 128).bfloat16()
    arguments = (x, (1, 128), "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16)
    runs: dict[str, Run] = {
        "kernel": lambda: cpu.quantize_dequantize(*arguments),
        "through dispatch": lambda: round_tiles(*arguments),
        "x.clone()": x.clone,
    }
    for name, run in runs.items():
        best = min(once(partial(_repeat, run, CALLS), CPU) for _ in range(20)) / CALLS
        yield figure("call_seconds", {"call": name}, best, note="the best of 20 times 1000 calls on [1, 128]")


def finding(figures: list[Figure]) -> str:
    told = []
    for n in _threads(figures):
        shares = values(figures, "share_of_copy", threads=n)
        if shares:
            told.append(f"at {min(shares):.0%} to {max(shares):.0%} of a copy's speed on {plural(n, 'thread')}")
    if faster := values(figures, "over_eager"):
        told.append(f"{min(faster):.0f} to {max(faster):.0f} times as fast as plain PyTorch")
    told += [f"{t * 1e6:.1f} us a call" for t in values(figures, "call_seconds", call="through dispatch")]
    return f"Kernels for tiles run {', '.join(told)}." if told else ""


def _threads(figures: list[Figure]) -> list[int]:
    return sorted({int(f.case["threads"]) for f in figures if "threads" in f.case})


def plots(figures: list[Figure]) -> list[Plot]:
    drawn: list[Plot] = []
    for metric, title, y, line in (
        ("share_of_copy", "Kernels next to a copy", "bytes a second over a copy's", ("a copy", 1.0)),
        ("over_eager", "Kernels next to plain PyTorch", "times as fast", None),
    ):
        groups = {
            plural(n, "thread"): {str(f.case["operation"]): f for f in pick(figures, metric, threads=n)}
            for n in _threads(figures)
        }
        drawn += over_labels(title, y, groups, line=line)
    return drawn
