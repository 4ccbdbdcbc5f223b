"""The machine's card: processor, memory, caches, device and versions."""

import os
import platform
from pathlib import Path

import torch


def card(device: torch.device) -> dict[str, str]:
    """Return the machine's card."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    about = {
        "processor": name,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{memory_bytes(device) / 2**30:.0f} GiB" if memory_bytes(device) else "unknown",
        "last-level cache": f"{last_level_cache(device) / 2**20:.0f} MiB",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }
    return about


def memory_bytes(device: torch.device) -> int:
    """Return the memory of the GPU or of the machine; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def last_level_cache(device: torch.device) -> int:
    """Return the bytes of the last-level cache; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kib = [int(size[:-1]) for size in sizes if size.endswith("K")]
    return max(kib) * 1024 if kib else 32 << 20
