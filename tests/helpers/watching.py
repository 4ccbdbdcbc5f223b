"""Watch a call: the operations that run, and the tensors that autograd saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Result(NamedTuple):
    operation: str
    numel: int
    dtype: torch.dtype


class Operations(TorchDispatchMode):
    """Note every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Result] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves(out) if isinstance(t, Tensor))
        self.results += [Result(func._opname, t.numel(), t.dtype) for t in tensors]
        return out

    @property
    def largest(self) -> int:
        """Return the most numbers in one tensor."""
        return max(result.numel for result in self.results)


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """Yield the list of the tensors that autograd saves inside."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # a graph that is held from within itself is never freed
        return saved[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def storage_bytes(tensors: list[Tensor]) -> list[int]:
    """Return the sizes of the different storages of tensors, in bytes, sorted."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sorted(storages.values())
