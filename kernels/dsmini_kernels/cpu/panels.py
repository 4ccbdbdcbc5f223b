"""Routed experts and attention for any number of tokens: checks, and the calls of the C++."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import memory, run, span
from dsmini_kernels.cpu.steps import detached, has_bf16_units, weight_matrix
from dsmini_kernels.cpu.structs import LAYOUTS

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
    sizes = _sizes(x, indices, weights, (w1, w2, w3))
    x, weights = detached(x).contiguous(), detached(weights).contiguous()
    indices = indices.to(torch.int64).contiguous()
    y = torch.empty_like(x)
    run("experts", **sizes, x=span(x), y=span(y), indices=span(indices), weights=span(weights))
    return y


quantized_experts = experts


def trained_experts(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `experts`, and the results of w1 and w3 for each token-expert pair, sorted by expert."""
    made = {"y": x.new_empty(x.shape, dtype=x.dtype if limit is None else torch.float32)}
    made |= {name: x.new_empty(indices.numel(), w1.shape[1]) for name in ("gate", "up")}
    _train(x, indices, weights, (w1, w2, w3), limit, made)
    return made["y"], made["gate"], made["up"]


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
    limit: float | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weights, w1, w2 and w3."""
    if grad.dtype != x.dtype or grad.shape != x.shape:
        raise Unserved(f"a gradient of {grad.dtype} and {list(grad.shape)}")
    given = {name: detached(t).contiguous() for name, t in (("dy", grad), ("gate", gate), ("up", up))}
    leaves = {"dx": x, "dweights": weights, "dw1": w1, "dw2": w2, "dw3": w3}
    made = {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in leaves.items()}
    _train(x, indices, weights, (w1, w2, w3), limit, given | made)
    return tuple(made.values())


def _train(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor],
    limit: float | None,
    others: dict[str, Tensor],
) -> None:
    """Run forward, or with `dy` among the other tensors backward."""
    if any(w.dtype != torch.float32 or not w.is_contiguous() for w in matrices):
        raise Unserved("matrices that are not contiguous FP32")
    fields = _sizes(x, indices, weights, matrices) | {"backward": "dy" in others}
    fields["limit"] = math.inf if limit is None else limit
    fields |= dict.fromkeys(("y", "dy", "dx", "dweights", "dw1", "dw2", "dw3"), b"")
    others["x"], others["weights"] = detached(x).contiguous(), detached(weights).contiguous()
    others["indices"] = indices.to(torch.int64).contiguous()
    run("trained_experts", **fields | {name: span(t) for name, t in others.items()})


def _sizes(x: Tensor, indices: Tensor, weights: Tensor, matrices: Sequence[Any]) -> dict[str, Any]:
    """Check experts' tensors, and return the sizes and the weights of their call."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weights.dtype != torch.float32:
        raise Unserved(f"x of {x.dtype} and weights of {weights.dtype}")
    (n, m), (e, f, _), k, is_bf16 = x.shape, matrices[0].shape, indices.shape[1], x.dtype == torch.bfloat16
    if 3 * indices.numel() * f * m < LEAST:
        raise Unserved
    sizes = {"n": n, "dim": m, "inter": f, "experts": e, "k": k, "bf16": is_bf16}
    return sizes | dict(zip(("w1", "w2", "w3"), map(weight_matrix, matrices), strict=True))


# attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """Return softmax(scale q k^T) v over the positions up to each query's own, with FP32 sums.

    Raises: Unserved for other dtypes than FP32, or BF16 where torch multiplies it faster, and for little work.
    """
    return _attend((q, k, v), (), None, scale, documents, causal=True)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return softmax(scale q k^T) v for queries that see the keys where `mask` is False. Raises as causal_attention."""
    return _attend((q, k, v), (), None, scale, mask, causal=False)


def trained_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return attention, causal without a mask, and the logarithm of each query's sum of exponentials."""
    lse = q.new_empty(q.shape[:3])
    return _attend((q, k, v), (), lse, scale, mask, causal=mask is None), lse


def trained_attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    out = _heads(q, q.shape[3]), _heads(k, k.shape[3]), _heads(v, v.shape[3])
    _attend((q, k, v), (y, grad, *out), lse, scale, mask, causal=mask is None)
    return out


def _attend(
    inputs: Sequence[Tensor],
    backward: Sequence[Tensor],
    lse: Tensor | None,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """Return the results of queries, keys and values, or write their gradients.

    Args:
        backward: the result, its gradient, and where the gradients of the inputs go.
        mask: documents [b, s] if causal, else a mask [#b, s, t], or None.
    """
    q, k, v = inputs
    (b, h, s, d), (groups, t), width = q.shape, k.shape[1:3], v.shape[3]
    is_bf16, is_fp32 = q.dtype == torch.bfloat16, q.dtype == torch.float32
    alike = all(x.dtype == q.dtype for x in (*inputs, *backward)) and k.shape == (b, groups, t, d)
    fits = v.shape == (b, groups, t, width) and h % max(1, groups) == 0 and (t == s or not causal)
    if not (is_fp32 or is_bf16):
        raise Unserved(f"attention in {q.dtype}")
    if not (alike and fits and scale > 0) or (is_bf16 and has_bf16_units()):
        raise Unserved
    if not d * width or b * h * s * t * (d + width) < LEAST:
        raise Unserved
    if causal and mask is not None:
        later = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
        mask, causal = later | (mask[:, :, None] != mask[:, None]), False
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((1, s, t), (b, s, t))):
        raise Unserved
    y = backward[0] if backward else _heads(q, width)
    names = ("q", "k", "v_rows", "y", "dy", "dq", "dk", "dv")
    held = [x if x.stride(3) == 1 else x.contiguous() for x in map(detached, (*inputs, y, *backward[1:]))]
    lse, mask = (None if x is None else x.contiguous() for x in (lse, mask))
    sizes = {"b": b, "h": h, "groups": groups, "s": s, "t": t, "d": d, "v": width, "causal": causal}
    kinds = {"bf16": is_bf16, "backward": bool(backward)}
    masked = {"mask": span(mask), "mask_batch": 0 if mask is None else len(mask)}
    rows = dict.fromkeys(names, b"") | dict(zip(names, map(_rows_of_heads, held), strict=False))
    run("heads_attention", **sizes, **kinds, **masked, **rows, lse=span(lse), scale=scale)
    return y


def _rows_of_heads(x: Tensor) -> bytes:
    """Return Heads: rows [b, h, rows, numbers] and their strides in bytes."""
    size, strides = x.element_size(), x.stride()[:3]
    last = sum((n - 1) * stride for n, stride in zip(x.shape[:3], strides, strict=True)) + x.shape[3]
    batch, head, row = (size * stride for stride in strides)
    return LAYOUTS["Heads"].pack(data=memory(x.data_ptr(), size * last), batch=batch, head=head, row=row)


def _heads(like: Tensor, width: int) -> Tensor:
    """Return memory for heads, those of a position side by side, as the next product reads them."""
    b, h, s, _ = like.shape
    return like.new_empty(b, s, h, width).transpose(1, 2)
