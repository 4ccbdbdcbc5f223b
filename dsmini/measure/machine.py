"""The machine at hand: which device and dtype to use, how fast it multiplies, how much memory was used."""

import functools
import resource
import sys
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto" CUDA, then MPS, then the CPU.

    Raises: ValueError for a device that is unknown or not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda or mps") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}.get(device.type, 0)
    if (device.index or 0) >= there:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if has_mps else [])]
        raise ValueError(f"device {name!r} is not on this machine; it has {', '.join(have)}")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of that name; for "auto" BF16 if this device multiplies it at least 1.2 times as fast as FP32.

    Tried, not guessed: the two take turns for a tenth of a second or so, and the best of each counts, so that a busy
    machine does not change the choice.
    """
    if name != "auto":
        return DTYPES[name]
    best = {torch.float32: 0.0, torch.bfloat16: 0.0}
    try:
        for _ in range(6):
            for dtype in best:
                best[dtype] = max(best[dtype], matmul_rate(device, dtype, size=512, repeats=2))
    except RuntimeError:  # a device without BF16
        return torch.float32
    return torch.bfloat16 if best[torch.bfloat16] > 1.2 * best[torch.float32] else torch.float32


@functools.cache
def slow_bf16(device: torch.device) -> bool:
    """Return whether this device multiplies BF16 at a fifth of its FP32 rate or less, measured once per process."""
    fp32, bf16 = (matmul_rate(device, dtype, size=128, repeats=2) for dtype in (torch.float32, torch.bfloat16))
    return fp32 >= 5 * bf16


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 8) -> float:
    """The best rate of a square matrix product, in FLOP/s: this machine's matrix peak, measured."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    best = float("inf")
    for _ in range(repeats + 1):  # the first is for warming up, and never the best
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators, of the CPU and of the device in use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Go on from what random_state gave; a generator of another kind of device is left alone."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: on the GPU if there is one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
