"""A model's matrices held in FP8, and what that loses."""

import copy
from typing import NamedTuple

import torch

from dsmini import Transformer
from dsmini.checkpoint.slots import fp8_weights
from dsmini.nn.fp8 import hold_fp8
from dsmini.numerics import WEIGHT_TILE, dequantize_tiles, quantize


class Held(NamedTuple):
    """A copy of a model that holds E4M3 codes and an FP32 scale for each 128 x 128 block."""

    model: Transformer
    error: float
    """Relative error of all its matrices together: the norm of what is off over their norm."""


@torch.no_grad()
def hold_in_fp8(model: Transformer) -> Held:
    """Return a copy of a model with the matrices that DeepSeek has in FP8 held so, and their error."""
    held = copy.deepcopy(model)
    off = size = 0.0
    for module, name in fp8_weights(held).values():
        weight = getattr(module, name).detach()
        q = quantize(weight, WEIGHT_TILE, "fp32")
        # one expert after the other: a block lies in one matrix
        stacks = [t if t.dim() == 3 else t[None] for t in (weight, q.codes, q.scales)]
        for w, codes, scales in zip(*stacks, strict=True):
            off += (dequantize_tiles(codes, scales, WEIGHT_TILE) - w.float()).square().sum().item()
            size += w.float().square().sum().item()
        hold_fp8(module, name, q.codes, q.scales)
    return Held(held, (off / size) ** 0.5)
