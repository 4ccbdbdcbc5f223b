"""Bytes that are held: by a model's storages, by activations for backward, by this process at its peak."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsmini.machine import peak_memory
from dsmini.nn import Experts, FeedForward, Linear, Transformer


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


class SavedBytes(NamedTuple):
    """Bytes of activations, each storage once."""

    by_linears: int
    """Those saved inside the Linears, feed-forwards and experts of the blocks."""
    total: int


def saved_for_backward(model: Transformer, tokens: Tensor) -> SavedBytes:
    """Return the bytes of activations that one forward pass over tokens [b, s + 1] saves, its losses included.

    Autograd tells of every tensor that it saves. Parameters and the copies that are made of them (casts, FP8 codes,
    joined matrices) are no activations: they are recognised by their storage or their shape, and left out.

    Raises: ValueError where the number of tokens is a width of the model.
    """
    parameters = [p for p in model.parameters() if p.dim() > 1]
    rows = tokens[:, 1:].numel()
    if any(rows in p.shape for p in parameters):
        raise ValueError(f"{rows} tokens are as many as a matrix of this model has rows or columns; take another batch")
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = _shapes_of_copies(parameters)
    depth, inside, held = [0], dict[int, bool](), dict[int, Tensor]()

    def pack(t: Tensor) -> Tensor:
        t = t.detach()  # a graph that is held from within itself is never freed
        pointer = t.untyped_storage().data_ptr()
        if pointer not in pointers and t.shape not in shapes:
            held[pointer] = t
            inside[pointer] = inside.get(pointer, False) or depth[0] > 0
        return t

    def enter(*_: Any) -> None:
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    hooks = [
        hook
        for name, module in model.named_modules()
        if isinstance(module, Linear | FeedForward | Experts) and not name.endswith(("head", "eh_proj"))
        for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.losses(tokens[:, :-1], tokens[:, 1:])
    for hook in hooks:
        hook.remove()
    sizes = {pointer: t.untyped_storage().nbytes() for pointer, t in held.items()}
    return SavedBytes(sum(size for pointer, size in sizes.items() if inside[pointer]), sum(sizes.values()))


def _shapes_of_copies(parameters: Sequence[Tensor]) -> set[torch.Size]:
    """Return the shapes that casts, transposes and joined matrices of the parameters have."""
    shapes = {p.shape for p in parameters} | {p.shape[::-1] for p in parameters}
    # w1 and w3 of the experts are joined where nothing is rounded
    stacks = [p.shape for p in parameters if p.dim() == 3]
    return shapes | {torch.Size(s) for e, f, m in stacks for s in ((e, 2 * f, m), (e, m, 2 * f), (e, m, f))}
