"""Residual streams in training: their weights, Sinkhorn's matrices and sums, each with a backward of its own.

Autograd saves FP32 copies of the streams, and each of Sinkhorn's divisions. Here the streams are saved as they are. The
mixes y = r fn x, with r = 1 / sqrt(mean(x^2) + eps) and the gradient dy of y, for x of k numbers, have

    dfn = r dy x^T,  dx = r fn^T dy - x r^2 (dy y) / k

Sinkhorn's logits alone are saved, and backward makes the divisions again.
c_0 = softmax + eps, and each division makes c = a / s of a, with s = eps + the sums of a over rows or columns. With the
gradient d of c that of a is (d - the sums of d c) / s. For the sums see dsmini/nn/hyper_connections.py.

Tokens come last, so that a sum over rows or columns adds long vectors.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsmini import ops
from dsmini.numerics import at_least_fp32

Operation = ops.Operation[..., Any]
KERNEL_FROM = 1 << 12
"""Numbers from which training asks for kernels, which may have to be compiled."""


@ops.eager("stream_mixes")
def stream_mixes_eager(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return ops.find("stream_mixes").reference(streams, fn, eps)

    def forward(streams: Tensor, fn: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = at_least_fp32(streams).flatten(-2)
        inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).rsqrt_()
        y = F.linear(x, fn.to(x.dtype)).mul_(inverse)
        return y, (streams, fn, y, inverse)

    def gradients(grad: Tensor, streams: Tensor, fn: Tensor, y: Tensor, inverse: Tensor) -> list[Tensor]:
        x, scaled = at_least_fp32(streams).flatten(-2), grad * inverse
        along = (grad * y).sum(-1, keepdim=True) * inverse.square() / -x.shape[-1]
        dx = (scaled @ fn.to(x.dtype)).addcmul_(x, along)
        dfn = scaled.flatten(0, -2).T @ x.flatten(0, -2)
        return [dx.view(streams.shape).to(streams.dtype), dfn.to(fn.dtype)]

    return ops.trained(forward, gradients, streams, fn)


@ops.eager("sinkhorn")
def sinkhorn_eager(logits: Tensor, iterations: int, eps: float) -> Tensor:
    if not logits.numel() or torch.compiler.is_compiling():
        return ops.find("sinkhorn").reference(logits, iterations, eps)
    if not torch.is_grad_enabled():
        *_, comb = _steps(logits, iterations, eps)
        return _tokens_first(comb, logits)
    served, versions = _served(logits, logits), (ops.find("sinkhorn"), ops.find("sinkhorn_gradients"))
    forward, gradients = versions if served else (version.plain for version in versions)

    def with_logits(logits: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return forward(logits, iterations, eps), (logits,)

    return ops.trained(with_logits, lambda grad, x: [gradients(grad, x, iterations, eps)], logits)


@ops.operation("sinkhorn_gradients")
def sinkhorn_gradients(
    grad: Float[Tensor, "*any n n"], logits: Float[Tensor, "*any n n"], iterations: int, eps: float
) -> Float[Tensor, "*any n n"]:
    """Return the gradient of the logits."""
    softmax, *steps = _steps(logits, iterations, eps)
    d = _tokens_last(grad)
    for i in range(len(steps) - 2, -1, -1):
        before, after, axis = steps[i], steps[i + 1], i % 2
        d = (d - (d * after).sum(axis, keepdim=True)) / (before.sum(axis, keepdim=True) + eps)
    return _tokens_first(softmax * (d - (d * softmax).sum(1, keepdim=True)), logits)


def _steps(logits: Tensor, iterations: int, eps: float) -> Iterator[Float[Tensor, "n n tokens"]]:
    """Yield the softmax, the same with eps added, and what each division makes, of columns first and last."""
    comb = _tokens_last(logits).softmax(1)
    yield comb
    comb = comb + eps
    yield comb
    for i in range(2 * iterations - 1):
        comb = comb / (comb.sum(i % 2, keepdim=True) + eps)
        yield comb


def _tokens_last(x: Tensor) -> Float[Tensor, "n n tokens"]:
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


def _tokens_first(x: Float[Tensor, "n n tokens"], like: Tensor) -> Tensor:
    return x.permute(2, 0, 1).reshape(like.shape)


@ops.eager("read_streams")
def read_streams_eager(streams: Tensor, weights: Tensor) -> Tensor:
    read = ops.find("read_streams")
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return read.reference(streams, weights)
    return _trained(read, read_streams_gradients, _served(streams, weights), streams, weights)


@ops.operation("read_streams_gradients")
def read_streams_gradients(
    grad: Float[Tensor, "*b m"], streams: Float[Tensor, "*b n m"], weights: Float[Tensor, "*b n"]
) -> tuple[Float[Tensor, "*b n m"], Float[Tensor, "*b n"]]:
    """Return the gradients of the streams and of the weights."""
    wide = grad.to(weights.dtype).unsqueeze(-2)
    of_streams = (weights.unsqueeze(-1) * wide).to(streams.dtype)
    return of_streams, (streams * wide).sum(-1)


@ops.eager("write_streams")
def write_streams_eager(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor | None = None) -> Tensor:
    write = ops.find("write_streams")
    if comb is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return write.reference(streams, output, post, comb)
    return _trained(write, write_streams_gradients, _served(streams, post, output), streams, output, post, comb)


@ops.operation("write_streams_gradients")
def write_streams_gradients(
    grad: Float[Tensor, "*b n m"],
    streams: Float[Tensor, "*b n m"],
    output: Float[Tensor, "*b m"],
    post: Float[Tensor, "*b n"],
    comb: Float[Tensor, "*b n n"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the streams, the output, post and comb."""
    wide = grad.to(post.dtype)
    of_streams, of_comb = comb @ wide, streams.to(post.dtype) @ wide.mT
    of_output, of_post = (post.unsqueeze(-1) * wide).sum(-2), (output.unsqueeze(-2) * wide).sum(-1)
    return of_streams.to(streams.dtype), of_output.to(output.dtype), of_post, of_comb


def _trained(run: Operation, gradients: Operation, served: bool, *inputs: Tensor) -> Tensor:
    """Return run(*inputs), with gradients by an operation of its own that reads the inputs."""
    forward, backward = (run, gradients) if served else (run.reference, gradients.reference)
    return ops.trained(lambda *inputs: (forward(*inputs), inputs), backward, *inputs)


def _served(streams: Tensor, weights: Tensor, *rows: Tensor) -> bool:
    """Return True where a kernel is asked."""
    known = streams.dtype in (torch.float32, torch.bfloat16) and weights.dtype == torch.float32
    known = known and all(row.dtype == streams.dtype for row in rows)
    return known and streams.numel() >= KERNEL_FROM and not torch.is_autocast_enabled(streams.device.type)
