"""Tensors that refuse FP64 as those on Apple's GPU do, for tests on any machine."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class OnApple(Tensor):
    """A tensor of the device mps whose numbers are on the CPU. It can be copied there, but not become FP64."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnApple":
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device="mps")  # pyright: ignore[reportAttributeAccessIssue]
        made.numbers = numbers.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if options.get("dtype") == torch.float64:  # to the CPU too: the cast comes before the copy
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        leaves = options.get("device") == torch.device("cpu")
        result = func(*tree_map_only(OnApple, lambda t: t.numbers, args), **options)
        return result if leaves else tree_map_only(Tensor, cls, result)
