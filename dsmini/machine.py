"""The machine at hand: which device and dtype to use, how fast it multiplies, memory, caches and versions."""

import ctypes
import functools
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

LARGEST, LARGEST_OFF_CPU = 2048, 8192
"""Largest sizes of the products that are timed: a GPU makes one of size 2048 in the time that it takes to start it."""
CLEAR_LOSS = 10
"""Ratio of rates at which FP32 wins after one turn: noise is smaller."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """Return the device of a name; for "auto" CUDA, then MPS, then the CPU.

    Raises: ValueError for a device that is unknown or missing.
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
    """Return the compute dtype of a name; for "auto" BF16 if it is measured to be a fifth faster than FP32."""
    if name != "auto":
        return DTYPES[name]
    return faster_dtype(*product_rates(device))


def faster_dtype(fp32: float, bf16: float) -> torch.dtype:
    """Return BF16 if its rate is more than a fifth above that of FP32."""
    return torch.bfloat16 if bf16 > 1.2 * fp32 else torch.float32


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let products run on a number of cores, and afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def multiplies_bf16() -> bool:
    """Return True if this CPU has units for BF16 products that torch uses; without them FP32 products are faster."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine() not in ("x86_64", "AMD64") or (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def product_rates(device: torch.device) -> tuple[float, float]:
    """Return the rates of FP32 and BF16 matrix products in FLOP/s, to compare; 0 for BF16 on a device without it.

    The two take turns for about an eighth of a second, and the best of each counts. A CPU uses one thread: on a busy
    machine threads wait for one another longer than such a product takes. The first clear loss of BF16 ends it.
    """
    fp32 = bf16 = 0.0
    with on_threads(1):
        for _ in range(6):
            fp32 = max(fp32, matmul_rate(device, torch.float32, seconds=0.01))
            try:
                bf16 = max(bf16, matmul_rate(device, torch.bfloat16, seconds=0.01))
            except RuntimeError:  # a device without BF16
                return fp32, 0.0
            if fp32 > CLEAR_LOSS * bf16:
                break
    return fp32, bf16


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Return the best rate of a square matrix product in FLOP/s: this machine's matrix peak, measured.

    The size starts at 64 and doubles as long as the time allows, up to LARGEST. A fixed size does not work: a product
    of size 2048 takes 50 ms on one CPU and a minute on another.

    Args:
        seconds: time limit of all products together, without one of each size for warming up.
    """
    size, spent, best, before = 64, 0.0, 0.0, float("inf")
    largest = LARGEST if device.type == "cpu" else LARGEST_OFF_CPU
    while True:
        run = _square_product(size, device, dtype)
        run()
        times = [once(run, device) for _ in range(3)]
        fastest = min(times)
        growth = max(1.0, fastest / before)
        grows = size < largest and spent + sum(times) + 5 * growth * fastest < seconds
        while not grows and len(times) < 8 and spent + sum(times) + fastest < seconds:
            times.append(once(run, device))
        best = max(best, 2 * size**3 / min(times))
        if not grows:
            return best
        size, spent, before = 2 * size, spent + sum(times), fastest


def _square_product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    generator = torch.Generator(device).manual_seed(0)  # leaves the default generator alone
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=product)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones, which otherwise come from the system page by page.

    Training steps and prompts of large tensors take 8 % less (docs/log.md). No effect without glibc.
    """
    trim_threshold, mmap_threshold = -1, -3
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # older ones map all above 32 MB; refused, both stay as they are
        if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 32 << 20):
            mallopt(trim_threshold, 2**31 - 1)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device. A GPU copies it while this process continues."""
    if device.type == "cuda":  # rows of a larger tensor would be copied once more, into memory that is not pinned
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def cores() -> int:
    """Return the number of cores that this process may use: those that it may run on, or less where a container's
    share of their time is limited."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(share) for share in _core_limits())]))


def _core_limits() -> Iterator[float]:
    """Yield the cores' worth of time that each control group of this process may take, of those with a limit."""
    for group in _control_groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError, ZeroDivisionError):  # of the first version, in which -1 is no limit
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota / period


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators, of the CPU and of the device in use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to the states from random_state; that of another kind of device is ignored."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def peak_memory(device: torch.device) -> int:
    """Return the largest memory of this process so far, in bytes: on the GPU if there is one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def card(device: torch.device) -> dict[str, str]:
    """Return the machine's card: names and values for people, which also distinguish machines."""
    return {
        "processor": processor(),
        "cores": str(cores()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{memory_bytes(device) / 2**30:.0f} GiB" if memory_bytes(device) else "unknown",
        "last-level cache": f"{last_level_cache(device) / 2**20:.0f} MiB",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


@functools.cache
def processor() -> str:
    """Return the name of this machine's processor."""
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":  # there the name is that of the architecture, arm
        with suppress(OSError):
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or name
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    if "CPU part" in fields:  # Arm has numbers instead of a name
        name += f", implementer {fields.get('CPU implementer', '?')}, part {fields['CPU part']}"
    name = fields.get("model name", name)
    if "cpu family" in fields and not any(map(str.isdigit, name.partition("@")[0])):  # a cloud may hide the generation
        name += f", family {fields['cpu family']}, model {fields.get('model', '?')}"
    return name


def memory_bytes(device: torch.device) -> int:
    """Return the memory of the GPU or of the machine; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def last_level_cache(device: torch.device) -> int:
    """Return the bytes of the last-level cache; 32 MiB if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kib = [int(size[:-1]) for size in sizes if size.endswith("K")]
    return max(kib) * 1024 if kib else 32 << 20


# --- free memory: a model that is too large is refused before anything is built


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process may still take on a device; None where the system does not tell.

    On a CPU that is the memory and swap the system can give, or less where a container or `ulimit -v` limits it.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(_cpu_limits(), default=None) if device.type == "cpu" else None


def refuse_too_large(nbytes: int, what: str, device: torch.device) -> None:
    """Raise ValueError if a device has less than this many bytes left.

    Args:
        what: the use of the memory, as the subject of the sentence.
    """
    free = free_bytes(device)
    if free is not None and nbytes > free:
        raise ValueError(
            f"{what} needs {nbytes:,} bytes of memory, and this machine has {free:,} left on {device}; use a smaller "
            "model or a shorter dtype"
        )


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, of both versions, up to their roots."""
    root = Path("/sys/fs/cgroup")
    yield root
    yield root / controller
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                group, of = Path(path.lstrip("/")), root / (controllers and controller)
                yield from (of / place for place in (group, *group.parents) if place != Path())


def _cpu_limits() -> Iterator[int]:
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines}
        yield 1024 * (kib["MemAvailable:"] + kib["SwapFree:"])
    for group in _control_groups("memory"):
        # a container's limit; pages of files count as used, and can be freed
        for names, prefix in ((("max", "current"), ""), (("limit_in_bytes", "usage_in_bytes"), "total_")):
            with suppress(OSError, KeyError, ValueError):
                limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield limit - used + int(stat[f"{prefix}inactive_file"]) + int(stat[f"{prefix}active_file"])
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError, IndexError):
            yield soft - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
