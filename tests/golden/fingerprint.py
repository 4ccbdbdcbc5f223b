"""Name the properties of a machine that decide the bits of a floating-point result."""

import os
import platform
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
