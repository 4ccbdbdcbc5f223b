"""Routed experts and attention for any number of tokens: checks, and the descriptions of calls for the C++."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import run
from dsmini_kernels.cpu.steps import detached, has_bf16_units, n_threads, weight_matrix
from dsmini_kernels.cpu.tiles import span

LEAST = 1 << 20
"""Number of multiplications below which torch's calls cost no more."""


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Any, w2: Any, w3: Any, limit: float | None = None
) -> Tensor:
    """Return the weighted sum of each token's chosen experts. Sums are FP32, of numbers in BF16 where x is.

    A CPU without products of BF16 numbers takes them as FP32. Hidden numbers are rounded to BF16 once, or not at all.

    Raises: Unserved for a limit of SwiGLU, for other dtypes and layouts, and for little work.
    """
    if limit is not None:
        raise Unserved("a limit of SwiGLU")
    if x.dtype not in (torch.float32, torch.bfloat16) or weights.dtype != torch.float32:
        raise Unserved(f"x of {x.dtype} and weights of {weights.dtype}")
    (n, m), (e, f, _) = x.shape, w1.shape
    if 3 * indices.numel() * f * m < LEAST:
        raise Unserved
    matrices = [weight_matrix(w) for w in (w1, w2, w3)]
    x, weights = detached(x).contiguous(), detached(weights).contiguous()
    indices = indices.to(torch.int64).contiguous()
    y = torch.empty_like(x)
    call = (
        *(n_threads(), n, m, f, e, indices.shape[1], x.dtype == torch.bfloat16),
        *(*span(x), *span(y), *span(indices), *span(weights)),
        *(number for w in matrices for number in w),
    )
    run("experts", call)
    return y


quantized_experts = experts


def trained_experts(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `experts`, and the results of w1 and w3 for each token-expert pair, sorted by expert."""
    call, (x, indices, weights) = _trained_call(x, indices, weights, (w1, w2, w3))
    y, gate, up = torch.empty_like(x), *(x.new_empty(indices.numel(), w1.shape[1]) for _ in range(2))
    _run_trained(call, (x, y, None, indices, weights), (gate, up), None, (None,) * 4, (w1, w2, w3))
    return y, gate, up


def trained_experts_gradients(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weights, w1, w2 and w3."""
    call, (x, indices, weights) = _trained_call(x, indices, weights, (w1, w2, w3), backward=True)
    if grad.dtype != x.dtype or grad.shape != x.shape:
        raise Unserved(f"a gradient of {grad.dtype} and {list(grad.shape)}")
    grad, gate, up = (detached(t).contiguous() for t in (grad, gate, up))
    out = torch.empty_like(x), torch.empty_like(weights), *(torch.empty_like(w) for w in (w1, w2, w3))
    _run_trained(call, (x, None, grad, indices, weights), (gate, up), out[0], out[1:], (w1, w2, w3))
    return out


def _trained_call(
    x: Tensor, indices: Tensor, weights: Tensor, matrices: Sequence[Tensor], backward: bool = False
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]:
    """Return the numbers that a call for training begins with, and x, indices and weights as the C++ reads them."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weights.dtype != torch.float32:
        raise Unserved(f"x of {x.dtype} and weights of {weights.dtype}")
    if any(w.dtype != torch.float32 or not w.is_contiguous() for w in matrices):
        raise Unserved("matrices that are not contiguous FP32")
    (n, m), (e, f, _) = x.shape, matrices[0].shape
    if 3 * indices.numel() * f * m < LEAST:
        raise Unserved
    made = detached(x).contiguous(), indices.to(torch.int64).contiguous(), detached(weights).contiguous()
    return (n_threads(), n, m, f, e, indices.shape[1], x.dtype == torch.bfloat16, backward), made


def _run_trained(
    call: Sequence[int],
    inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    dx: Tensor | None,
    grads: Sequence[Tensor | None],
    matrices: Sequence[Tensor],
) -> None:
    def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
        spans = [span(t) for t in tensors]
        return (*(at for at, _ in spans), *(size for _, size in spans))

    numbers = (*call, *(i for t in inputs for i in span(t)), *addresses(kept), *span(dx), *addresses(grads))
    run("trained_experts", (*numbers, *(i for w in matrices for i in weight_matrix(w))))


# attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """Return softmax(scale q k^T) v over the positions up to each query's own, with FP32 sums.

    Raises: Unserved for other dtypes than FP32, or BF16 where torch multiplies it faster, and for little work.
    """
    return _attend((q, k, v), (), None, scale, documents, causal=True)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return softmax(scale q k^T) v for queries that see the keys where `mask` is False. Raises as causal_attention."""
    return _attend((q, k, v), (), None, scale, mask, causal=False)


def trained_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return causal_attention, and the logarithm of each query's sum of exponentials."""
    lse = q.new_empty(q.shape[:3])
    return _attend((q, k, v), (), lse, scale, documents, causal=True), lse


def trained_attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    out = _heads(q, q.shape[3]), _heads(k, k.shape[3]), _heads(v, v.shape[3])
    _attend((q, k, v), (y, grad, *out), lse, scale, documents, causal=True)
    return out


def _attend(
    inputs: Sequence[Tensor],
    backward: Sequence[Tensor],
    lse: Tensor | None,
    scale: float,
    hidden: Tensor | None,
    causal: bool,
) -> Tensor:
    """Return the results of queries, keys and values, or write their gradients.

    Args:
        backward: the result, its gradient, and where the gradients of the inputs go.
        hidden: documents [b, s] if causal, else a mask [#b, s, t].
    """
    q, k, v = inputs
    (b, h, s, d), (groups, t), width = q.shape, k.shape[1:3], v.shape[3]
    is_bf16, is_fp32 = q.dtype == torch.bfloat16, q.dtype == torch.float32
    alike = all(x.dtype == q.dtype for x in (*inputs, *backward)) and k.shape == (b, groups, t, d)
    fits = v.shape == (b, groups, t, width) and h % max(1, groups) == 0 and (t == s or not causal)
    if not (alike and fits and scale > 0) or not (is_fp32 or (is_bf16 and not has_bf16_units())):
        raise Unserved
    if not d * width or b * h * s * t * (d + width) < LEAST:
        raise Unserved
    if causal and hidden is not None:
        later = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
        hidden, causal = later | (hidden[:, :, None] != hidden[:, None]), False
    if hidden is not None and (hidden.dtype != torch.bool or hidden.shape not in ((1, s, t), (b, s, t))):
        raise Unserved
    y = backward[0] if backward else _heads(q, width)
    held = [detached(x) for x in (*inputs, y, *backward[1:])]
    held = [x if x.stride(3) == 1 else x.contiguous() for x in held]
    rows: list[int] = []
    for x in held:
        size, strides = x.element_size(), x.stride()[:3]
        last = sum((n - 1) * stride for n, stride in zip(x.shape[:3], strides, strict=True)) + x.shape[3]
        rows += (x.data_ptr(), size * last, *(size * stride for stride in strides))
    hidden = None if hidden is None else hidden.contiguous()
    sizes = (n_threads(), b, h, groups, s, t, d, width, is_bf16, bool(backward), causal)
    lse = None if lse is None else lse.contiguous()
    spans = (*rows, *(0,) * (40 - len(rows)), *span(lse), *span(hidden), 0 if hidden is None else len(hidden))
    run("heads_attention", (*sizes, *spans, scale))
    return y


def _heads(like: Tensor, width: int) -> Tensor:
    """Return memory for heads, those of a position side by side, as the next product reads them."""
    b, h, s, _ = like.shape
    return like.new_empty(b, s, h, width).transpose(1, 2)
