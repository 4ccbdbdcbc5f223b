"""Name the properties of a machine that decide the bits of a floating-point result."""

import os
import platform
import time
from pathlib import Path

import torch

THREADS = 1
"""Number of threads for every golden value, so that bits do not depend on the number of cores."""


def fingerprint() -> str:
    """Return the CPU, the instructions that torch uses, the versions of torch and the threads, on one line."""
    isa = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA",) if os.environ.get(name)]
    parts = [_cpu(), f"torch uses {torch.backends.cpu.get_cpu_capability()}", *isa]
    return "; ".join([*parts, f"torch {torch.__version__}", f"threads {THREADS}"])


def _cpu() -> str:
    """Return the model name with family, model and stepping, because the name of a virtual machine is vague."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return f"{platform.system()} {platform.machine()} {platform.processor()}"
    first = cpuinfo.read_text().split("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = ", ".join(f"{key} {fields.get(key, '?')}" for key in ("cpu family", "model", "stepping"))
    return f"{fields.get('model name', platform.machine())} ({numbers})"


def multiplies_bf16() -> bool:
    """Return True if a measured BF16 product takes at most twice as long as the same product in FP32."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(5):
        for dtype in best:
            x = torch.ones(256, 256, dtype=dtype)
            start = time.perf_counter()
            torch.mm(x, x)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] <= 2 * best[torch.float32]
