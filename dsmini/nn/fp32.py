"""Modules whose tensors stay FP32 when the model is cast to a shorter type."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FP32Module(nn.Module):
    """Base of the norms and the gate. `.to(torch.bfloat16)` and `.half()` leave their tensors in FP32.

    A router in BF16 ties scores and picks other experts on other devices; a bias rounded to BF16 no longer
    moves by its update speed. `.double()` and moves between devices work as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FP32Module":
        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if out.dtype in (torch.bfloat16, torch.float16) else out

        return super()._apply(keep, recurse)
