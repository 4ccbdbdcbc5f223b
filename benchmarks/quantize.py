"""How fast are the CPU kernels for tiles, next to a copy of the same bytes and to plain PyTorch?

    python -m benchmarks.quantize [--rows 4096] [--columns 7168] [--threads 1 2] [--rounds 15] [--operations all]

Each operation is checked first, to the bit, against the plain PyTorch of dsmini/numerics/tiles.py, then timed; kernel
and copy take turns, so that a busy neighbour slows both, and plain PyTorch has a few turns. Rates count the bytes that
are read and written; the copy is torch's `y.copy_(x)` of the input's dtype, whose bytes are as many but for the
outputs that are shorter. Freed memory is kept for the next call, as in a training step: fresh pages from the system
cost more than the work. Last comes what a call costs on a matrix so small that nothing else counts.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dsmini import ops
from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles

BF16, FP32 = torch.bfloat16, torch.float32
AMAX_MIN = 1e-4
EAGER_ROUNDS = 3
Run = Callable[[], Any]


def cases(x: Tensor) -> dict[str, tuple[Run, int]]:
    """Name, operation and bytes moved; all through the door, so that the caller chooses the backend."""
    wide = x.float()
    runs: dict[str, tuple[Run, int]] = {}
    for name, source in (("BF16", x), ("FP32", wide)):
        for tile in ((1, 128), (128, 1), (128, 128)):
            for scale in ("ue8m0", "fp32"):
                run = partial(round_tiles, source, tile, scale, "e4m3", AMAX_MIN, BF16)
                runs[f"round {name} {tile[0]}x{tile[1]} {scale}"] = run, x.numel() * (source.itemsize + 2)
    for format in ("e4m3", "e5m6"):
        codes, scales = quantize_tiles(x, (1, 128), "ue8m0", format, AMAX_MIN)
        moved = x.nbytes + codes.nbytes + scales.nbytes
        runs[f"quantize BF16 1x128 {format}"] = partial(quantize_tiles, x, (1, 128), "ue8m0", format, AMAX_MIN), moved
        run = partial(dequantize_tiles, codes, scales, (1, 128), format, BF16, x.shape[1])
        runs[f"dequantize BF16 1x128 {format}"] = run, moved
    return runs


def seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def check(name: str, run: Run) -> None:
    results: list[list[Tensor]] = []
    for backend in ("cpu", "reference"):
        with ops.use(backend):
            got = run()
            results.append([t.view(torch.uint8) for t in ([got] if isinstance(got, Tensor) else got)])
    if not all(map(torch.equal, *results)):
        raise SystemExit(f"{name}: the kernel's bits are not those of plain PyTorch")


def keep_freed_memory() -> bool:
    """Tell glibc to give no memory back, and to take none by mmap; False without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(-4, 0) and mallopt(-1, 2**31 - 1))  # M_MMAP_MAX, M_TRIM_THRESHOLD


def measure(x: Tensor, threads: int, rounds: int, wanted: str, console: Console) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    repeats = max(1, 2_000_000 // x.numel())
    copies = {2: (x, torch.empty_like(x)), 4: (x.float(), torch.empty_like(x, dtype=FP32))}
    rows: list[dict[str, Any]] = []
    runs = {name: run for name, run in cases(x).items() if wanted == "all" or wanted in name}
    for name, (run, moved) in track(runs.items(), f"{threads} threads", console=console):
        check(name, run)
        source, target = copies[4 if "FP32" in name else 2]
        times: dict[str, list[float]] = {"copy": [], "kernel": [], "eager": []}
        for turn in range(rounds + 1):
            times["copy"].append(seconds(lambda t=target, s=source: t.copy_(s), repeats))
            with ops.use("cpu"):
                times["kernel"].append(seconds(run, repeats))
            if turn <= EAGER_ROUNDS:
                with ops.use("reference"):
                    times["eager"].append(seconds(run, 1))
        median = {side: statistics.median(of[1:]) for side, of in times.items()}
        best = {side: min(of[1:]) for side, of in times.items()}
        copied = 2 * source.nbytes
        rows.append(
            {
                "what": name,
                "threads": threads,
                "microseconds": median["kernel"] * 1e6,
                "bytes_per_second": moved / median["kernel"],
                "share_of_copy": moved / median["kernel"] / (copied / median["copy"]),
                "share_of_copy_best": moved / best["kernel"] / (copied / best["copy"]),
                "over_eager": median["eager"] / median["kernel"],
            }
        )
    return rows


def overhead() -> dict[str, float]:
    """Microseconds of a call, through the door and not, and of torch's own smallest: the best of many."""
    from dsmini_kernels import cpu

    x = torch.randn(1, 128).to(BF16)
    arguments = (x, (1, 128), "ue8m0", "e4m3", AMAX_MIN, BF16)
    calls: dict[str, Run] = {
        "kernel": lambda: cpu.quantize_dequantize(*arguments),
        "through the door": lambda: round_tiles(*arguments),
        "x.clone()": x.clone,
    }
    return {name: 1e6 * min(seconds(run, 1000) for _ in range(20)) for name, run in calls.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--operations", default="all", help="those whose name holds this; all of them by default")
    options = parser.parse_args()
    console = Console(stderr=True)
    torch.manual_seed(0)
    kept = keep_freed_memory()
    x = torch.randn(options.rows, options.columns).to(BF16)
    rows = [row for n in options.threads for row in measure(x, n, options.rounds, options.operations, console)]
    calls = overhead()
    show(console, rows, calls)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "benchmark": "quantize",
        "commit": commit,
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "shape": [options.rows, options.columns],
        "freed_memory_kept": kept,
        "kernels": ops.explain().splitlines()[2],
    }
    print(json.dumps({**about, "call_microseconds": calls, "rows": rows}))


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(console: Console, rows: list[dict[str, Any]], calls: dict[str, float]) -> None:
    table = Table("operation", "threads", "us", "GB/s", "of copy", "of copy, best", "over eager")
    for row in rows:
        rate = f"{row['bytes_per_second'] / 1e9:.1f}"
        shares = (f"{row[share]:.0%}" for share in ("share_of_copy", "share_of_copy_best"))
        eager = f"{row['over_eager']:.0f} x"
        table.add_row(row["what"], str(row["threads"]), f"{row['microseconds']:,.0f}", rate, *shares, eager)
    console.print(table)
    console.print("a call: " + ", ".join(f"{name} {us:.1f} us" for name, us in calls.items()))


if __name__ == "__main__":
    main()
