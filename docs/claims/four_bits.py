"""Experts whose weights are rounded to FP4 in every forward, for python -m dsmini.compare: "four_bits.py:fp4_experts".

Their gradients are those of the straight-through estimator. In precision "fp8" products with these values are FP8's.
"""

import torch

import dsmini
from dsmini.nn import FP8Experts
from dsmini.nn.fp8 import fp8_experts
from dsmini.nn.moe import Experts, experts
from dsmini.numerics import quantize
from dsmini.numerics.fp4 import round_fp4


def rounded(layer):
    return (round_fp4(weight) for weight in (layer.w1, layer.w2, layer.w3))


class FP4Experts(Experts):
    def forward(self, x, indices, weights):
        w1, w2, w3 = rounded(self)
        return experts(x, indices, weights, w1, w2, w3, self.limit)


class FP4InFP8(FP8Experts):
    def forward(self, x, indices, weights):
        w1, w2, w3 = rounded(self)
        codes = quantize(x) if isinstance(x, torch.Tensor) else x
        return fp8_experts(codes, indices, weights, w1, w2, w3, self.limit)


def fp4_experts(config):
    model = dsmini.Transformer(config)
    kinds = {Experts: FP4Experts, FP8Experts: FP4InFP8}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
    return model
