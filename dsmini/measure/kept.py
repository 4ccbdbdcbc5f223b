"""What a model keeps for backward, in bytes, read off the storages."""

from typing import Any

import torch
from torch import Tensor

from dsmini import Experts, FeedForward, Linear, Transformer


def kept_for_backward(model: Transformer, tokens: Tensor) -> tuple[int, int]:
    """Bytes kept of activations by the Linears, feed-forwards and experts of the blocks, and by everything: every
    storage once; parameters, their copies and codes apart.

    Raises: ValueError where the number of tokens is a width of the model: copies of weights are told by their shapes.
    """
    parameters = [p for p in model.parameters() if p.dim() > 1]
    rows = tokens[:, 1:].numel()
    if any(rows in p.shape for p in parameters):
        raise ValueError(f"{rows} tokens are as many as a matrix of this model has rows or columns; take another batch")
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in parameters} | {p.shape[::-1] for p in parameters}
    # w1 and w3 of the experts are joined where nothing is rounded
    stacks = [p.shape for p in parameters if p.dim() == 3]
    shapes |= {torch.Size(s) for e, f, m in stacks for s in ((e, 2 * f, m), (e, m, 2 * f), (e, m, f))}
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
    return sum(size for pointer, size in sizes.items() if inside[pointer]), sum(sizes.values())
