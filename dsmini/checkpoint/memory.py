"""Memory that a model would need and this machine has: one too large is refused before anything is built."""

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from dsmini.config import ModelConfig
from dsmini.config.fields import require


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
    require(
        free is None or nbytes <= free,
        f"{what} needs {nbytes:,} bytes of memory, and this machine has {free or 0:,} left on {device}; use a smaller "
        "model or a shorter dtype",
    )


def refuse_more_parts(config: ModelConfig, n_tensors: int, source: str) -> None:
    """Raise ValueError if a config has more layers or experts than a folder has tensors; then none of them is made.

    Args:
        n_tensors: number of tensors, each expert's counted by itself.
        source: the folder, for the error.
    """
    layers = config.n_layers + config.n_mtp_layers
    experts = max(0, layers - config.n_dense_layers) * config.n_routed_experts
    for parts, name in ((layers, "layers"), (experts, "experts")):
        require(
            parts <= n_tensors,
            f"{source} holds {n_tensors:,} tensors for the {parts} {name} of its config; use the model's own",
        )


def _cpu_limits() -> Iterator[int]:
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines}
        yield 1024 * (kib["MemAvailable:"] + kib["SwapFree:"])
    with suppress(OSError, KeyError, ValueError):  # a container's limit; pages of files count as used, and can be freed
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield limit - used + int(stat["inactive_file"]) + int(stat["active_file"])
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError, IndexError):
            yield soft - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
