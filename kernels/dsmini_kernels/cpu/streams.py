"""Residual streams of hyper-connections, in training and of prompts: checks, and calls of the C++."""

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import is_bf16, run, span
from dsmini_kernels.cpu.structs import LIMITS


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
    bf16 = is_bf16(*(t for t in (streams, output, grad) if t is not None))
    (*batch, n_streams, dim), outputs = streams.shape, mix.shape[-1]
    operands = {"x": streams, "output": output, "mix": mix, "post": post, "dy": grad}
    shapes = {"output": [*batch, dim], "mix": [*batch, n_streams, outputs], "post": [*batch, outputs]}
    for name, shape in shapes.items():
        t = operands[name]
        if t is not None and (list(t.shape) != shape or (name != "output" and t.dtype != torch.float32)):
            raise Unserved(f"{name} {list(t.shape)} of {t.dtype}")
    if not streams.numel():
        raise Unserved
    sizes = {"n": streams.shape[:-2].numel(), "streams": n_streams, "outputs": outputs, "dim": dim, "bf16": bf16}
    results = dict.fromkeys(("y", "dx", "doutput", "dmix", "dpost"), b"") | {name: span(t) for name, t in made.items()}
    run("streams", **sizes, backward=grad is not None, **operands, **results)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Return nearly doubly stochastic matrices."""
    return _sinkhorn(logits, None, iterations, eps)


def sinkhorn_gradients(grad: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Return the gradient of the logits."""
    return _sinkhorn(logits, grad, iterations, eps)


def _sinkhorn(logits: Tensor, grad: Tensor | None, iterations: int, eps: float) -> Tensor:
    n = logits.shape[-1]
    if logits.dtype != torch.float32 or not logits.numel() or n > LIMITS["MOST_STREAMS"] or iterations < 1:
        raise Unserved(f"{iterations} iterations of {list(logits.shape)} numbers of {logits.dtype}")
    y = logits.new_empty(logits.shape)
    sizes = {"n": logits.numel() // (n * n), "n_streams": n, "iterations": iterations, "backward": grad is not None}
    run("sinkhorn", **sizes, logits=logits, dy=grad, y=span(y), eps=eps)
    return y
