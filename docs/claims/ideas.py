"""Changed models of the claims in this folder, for python -m dsmini.compare."""

import functools

import torch
import torch.nn.functional as F

import dsmini
from dsmini.nn import FP8Linear
from dsmini.numerics import fp8_matmul


class QuantileGate(dsmini.Gate):
    """A gate whose bias makes each expert's threshold the quantile that gives it an equal share of the tokens.

    The bias is minus the score that n k / e of the n tokens exceed, averaged over the last calls.
    """

    def forward(self, x):
        routing = super().forward(x)
        if self.training:
            share = self.options["n_activated_experts"] / len(self.weight)
            threshold = routing.scores.detach().quantile(1 - share, dim=0)
            self.bias.lerp_(-threshold, 0.1)
        return routing

    def update_bias(self, counts, speed):
        """Leave the bias to forward."""


def by_quantiles(config):
    moe = functools.partial(dsmini.MoE, gate_class=QuantileGate)
    return dsmini.Transformer(config, make_block=functools.partial(dsmini.Block, moe_class=moe))


class GradientsInE5M2(FP8Linear):
    """An FP8Linear whose output gradients are rounded to E5M2, with 2 bits of significand in place of 3."""

    def forward(self, x):
        return fp8_matmul(x, self.weight, saved_format=self.saved_format, grad_format="e5m2")


class OneScale(FP8Linear):
    """An FP8Linear with one scale for a whole tensor, in place of one for each tile."""

    def forward(self, x):
        y = F.linear(rounded(x), rounded(self.weight).to(x.dtype))
        return _RoundGradient.apply(y)


class _RoundGradient(torch.autograd.Function):
    """Round the gradient on its way back."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return in_e4m3(grad)


def in_e4m3(x):
    """Return the values of a tensor rounded to E4M3 with one scale, a power of two as tiles have."""
    scale = (x.detach().abs().amax().float().clamp(min=1e-12) / 448).log2().ceil().exp2()
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def rounded(x):
    """Round forward; pass gradients on as they are."""
    return x + (in_e4m3(x) - x).detach()


def of_class(kind):
    """Return a maker of models in which each FP8Linear is of this class; experts stay as they are."""

    def make(config):
        model = dsmini.Transformer(config)
        for module in model.modules():
            if type(module) is FP8Linear:
                module.__class__ = kind
        return model

    return make


def gradients_in_e5m2(config):
    return of_class(GradientsInE5M2)(config)


def one_scale(config):
    return of_class(OneScale)(config)
