"""Residual streams of hyper-connections, in training and of prompts: checks, and calls of the C++."""

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import run, span
from dsmini_kernels.cpu.steps import detached

MOST_STREAMS = 16
"""MOST_STREAMS of calls.h."""


def read_streams(streams: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of the streams by weights, with sums in FP32."""
    y = streams.new_empty(*streams.shape[:-2], streams.shape[-1])
    _sum(streams, None, weights.unsqueeze(-1), None, {"y": y})
    return y


def read_streams_gradients(grad: Tensor, streams: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the streams and of the weights."""
    made = {"dx": streams.new_empty(streams.shape), "dmix": weights.new_empty(weights.shape)}
    _sum(streams, None, weights.unsqueeze(-1), None, made, grad.unsqueeze(-2))
    return made["dx"], made["dmix"]


def write_streams(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor | None) -> Tensor:
    """Return the streams mixed, and a sublayer's output, with sums in FP32."""
    y = streams.new_empty(streams.shape)
    _sum(streams, output, comb, post, {"y": y})
    return y


def write_streams_gradients(
    grad: Tensor, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the streams, the output, post and comb."""
    given = {"dx": streams, "doutput": output, "dpost": post, "dmix": comb}
    made = {name: t.new_empty(t.shape) for name, t in given.items()}
    _sum(streams, output, comb, post, made, grad)
    return tuple(made.values())


def _sum(
    streams: Tensor,
    output: Tensor | None,
    mix: Tensor | None,
    post: Tensor | None,
    made: dict[str, Tensor],
    grad: Tensor | None = None,
) -> None:
    """Write the results of a call, or the gradients of its operands.

    Args:
        mix: weights [..., streams, outputs].
        grad: of the result, [..., outputs, dim].
    """
    if mix is None:
        raise Unserved("streams that are not mixed")
    (*batch, n_streams, dim), outputs, dtype = streams.shape, mix.shape[-1], streams.dtype
    kinds = {"x": dtype, "output": dtype, "dy": dtype, "mix": torch.float32, "post": torch.float32}
    shapes = {"mix": [*batch, n_streams, outputs], "output": [*batch, dim], "post": [*batch, outputs]}
    given = {"x": streams, "output": output, "dy": grad, "mix": mix, "post": post}
    held = {name: None if t is None else detached(t).contiguous() for name, t in given.items()}
    if dtype not in (torch.float32, torch.bfloat16) or not streams.numel():
        raise Unserved(f"{list(streams.shape)} numbers of {dtype}")
    for name, t in held.items():
        if t is not None and (t.dtype != kinds[name] or list(t.shape) != shapes.get(name, list(t.shape))):
            raise Unserved(f"{name} {list(t.shape)} of {t.dtype}")
    written = dict.fromkeys(("y", "dx", "doutput", "dmix", "dpost")) | made
    n = streams.numel() // (n_streams * dim)
    sizes = {"n": n, "streams": n_streams, "outputs": outputs, "dim": dim, "bf16": dtype == torch.bfloat16}
    run("streams", **sizes, backward=grad is not None, **{name: span(t) for name, t in (held | written).items()})


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Return nearly doubly stochastic matrices."""
    return _sinkhorn(logits, None, iterations, eps)


def sinkhorn_gradients(grad: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Return the gradient of the logits."""
    return _sinkhorn(logits, grad, iterations, eps)


def _sinkhorn(logits: Tensor, grad: Tensor | None, iterations: int, eps: float) -> Tensor:
    n = logits.shape[-1]
    if logits.dtype != torch.float32 or not logits.numel() or n > MOST_STREAMS or iterations < 1:
        raise Unserved(f"{iterations} iterations of {list(logits.shape)} numbers of {logits.dtype}")
    logits, grad = detached(logits).contiguous(), None if grad is None else detached(grad).contiguous()
    y = torch.empty_like(logits)
    sizes = {"n": logits.numel() // (n * n), "n_streams": n, "iterations": iterations, "backward": grad is not None}
    run("sinkhorn", **sizes, logits=span(logits), dy=span(grad), y=span(y), eps=eps)
    return y
