"""Minimum precision of norms, softmax, gates and losses."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in FP32, or in FP64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which torch.autocast leaves the dtypes of products alone."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # torch knows no autocast of meta
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
