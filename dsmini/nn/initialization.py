"""Initial weights of the layers."""

import torch
from torch import Tensor, nn


def draw_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Draw a weight from a normal distribution. On the meta device there are no numbers to draw."""
    # the first random number on meta would load torch's compiler, which takes more than a second
    if not weight.is_meta:
        nn.init.normal_(weight, std=std, generator=generator)
