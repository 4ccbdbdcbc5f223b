"""Minimum precision of norms, softmax, gates and losses."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in FP32, or in FP64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()
