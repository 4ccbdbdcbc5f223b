"""Bytes that are held: by a model's storages, and by this process at its peak."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from dsmini.measure.machine import peak_memory


def storage_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def reset_peak() -> None:
    """Start the peak of memory again from what is held now, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset(device: torch.device) -> int:
    """Return the peak since reset_peak, in bytes: of the GPU's memory, or of this process in RAM."""
    if device.type == "cpu":
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return peak_memory(device)
