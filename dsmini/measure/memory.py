"""Measure bytes in memory: of activations saved for backward, and of this process at its peak."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dsmini.machine import peak_memory
from dsmini.nn import Experts, FeedForward, Projection, Transformer


def reset_peak(device: torch.device) -> None:
    """Reset the peak of memory, of this GPU or of this process, to the current use, if the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset(device: torch.device) -> int:
    """Return the peak since reset_peak in bytes, of GPU memory or of this process."""
    if device.type == "cpu":
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return peak_memory(device)


class SavedBytes(NamedTuple):
    """Bytes of saved activations, counting each storage once."""

    by_linears: int
    """Bytes saved inside the Linears, feed-forwards and experts of the blocks."""
    total: int


def saved_for_backward(model: Transformer, tokens: Tensor, recompute: bool = False) -> SavedBytes:
    """Return the bytes of activations that a forward pass over tokens [b, s + 1] saves, losses included.

    A hook of autograd sees every saved tensor. Parameters and copies of them (casts, FP8 codes, joined matrices) are
    not activations. They are recognized by storage or shape and left out.

    Raises: ValueError if the number of tokens is a width of the model.
    """
    parameters = [p for p in model.parameters() if p.dim() > 1]
    rows = tokens[:, 1:].numel()
    if any(rows in p.shape for p in parameters):
        raise ValueError(f"{rows} tokens equal the rows or columns of a matrix of this model; use another batch size")
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = _shapes_of_copies(parameters)
    depth, inside, held = [0], dict[int, bool](), dict[int, Tensor]()

    def pack(t: Tensor) -> Tensor:
        t = t.detach()  # a graph that refers to itself is never freed
        pointer = t.untyped_storage().data_ptr()
        if pointer not in pointers and t.shape not in shapes:
            held[pointer] = t
            inside[pointer] = inside.get(pointer, False) or depth[0] > 0
        return t

    multiplying = {
        module
        for name, module in model.named_modules()
        if isinstance(module, Projection | FeedForward | Experts) and not name.endswith(("head", "eh_proj"))
    }

    def enter(module: nn.Module, *_: Any) -> None:
        depth[0] += module in multiplying

    def leave(module: nn.Module, *_: Any) -> None:
        depth[0] -= module in multiplying

    # hooks of all modules: a Projection with a hook of its own would be computed, and saved, in another way
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.losses(tokens[:, :-1], tokens[:, 1:], recompute=recompute)
    for hook in hooks:
        hook.remove()
    sizes = {pointer: t.untyped_storage().nbytes() for pointer, t in held.items()}
    return SavedBytes(sum(size for pointer, size in sizes.items() if inside[pointer]), sum(sizes.values()))


def _shapes_of_copies(parameters: Sequence[Tensor]) -> set[torch.Size]:
    """Return the shapes that casts, transposes and joined matrices of the parameters have."""
    shapes = {p.shape for p in parameters} | {p.shape[::-1] for p in parameters}
    # without rounding, w1 and w3 of the experts are joined
    stacks = [p.shape for p in parameters if p.dim() == 3]
    return shapes | {torch.Size(s) for e, f, m in stacks for s in ((e, 2 * f, m), (e, m, 2 * f), (e, m, f))}
