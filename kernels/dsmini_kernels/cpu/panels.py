"""Routed experts and attention for any number of tokens: checks, and the calls of the C++."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import detached, is_bf16, run, span, strided
from dsmini_kernels.cpu.steps import has_bf16_units, weight_matrix
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
    y = x.new_empty(x.shape)
    run("experts", **_operands(x, indices, weights, (w1, w2, w3)), y=span(y))
    return y


quantized_experts = experts


def trained_experts(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `experts`, and the results of w1 and w3 for each token-expert pair, sorted by expert."""
    made = {"y": x.new_empty(x.shape, dtype=x.dtype if limit is None else torch.float32)}
    made |= {name: x.new_empty(indices.numel(), w1.shape[1]) for name in ("gate", "up")}
    _train(x, indices, weights, (w1, w2, w3), limit, made, dy=None)
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
    leaves = {"dx": x, "dweights": weights, "dw1": w1, "dw2": w2, "dw3": w3}
    made = {name: t.new_empty(t.shape) for name, t in leaves.items()}
    _train(x, indices, weights, (w1, w2, w3), limit, made, dy=grad, gate=gate, up=up)
    return tuple(made.values())


def _train(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor],
    limit: float | None,
    made: dict[str, Tensor],
    **others: Tensor | None,
) -> None:
    """Run forward, or with `dy` backward."""
    if any(w.dtype != torch.float32 or not w.is_contiguous() for w in matrices):
        raise Unserved("matrices that are not contiguous FP32")
    fields = dict.fromkeys(("y", "dx", "dweights", "dw1", "dw2", "dw3"), b"") | {k: span(t) for k, t in made.items()}
    fields |= _operands(x, indices, weights, matrices) | others
    run("trained_experts", **fields, backward=others["dy"] is not None, limit=math.inf if limit is None else limit)


def _operands(x: Tensor, indices: Tensor, weights: Tensor, matrices: Sequence[Any]) -> dict[str, Any]:
    """Check experts' tensors, and return the sizes and the operands of their call."""
    bf16 = is_bf16(x)
    if weights.dtype != torch.float32:
        raise Unserved(f"weights of {weights.dtype}")
    (n, m), (e, f, _), k = x.shape, matrices[0].shape, indices.shape[1]
    if 3 * indices.numel() * f * m < LEAST:
        raise Unserved
    sizes = {"n": n, "dim": m, "inter": f, "experts": e, "k": k, "bf16": bf16}
    operands = {"x": x, "indices": indices.to(torch.int64), "weights": weights}
    return sizes | operands | dict(zip(("w1", "w2", "w3"), map(weight_matrix, matrices), strict=True))


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
    bf16 = is_bf16(*inputs, *backward)
    fits = k.shape == (b, groups, t, d) and v.shape == (b, groups, t, width) and h % max(1, groups) == 0
    if not (fits and scale > 0 and (t == s or not causal)) or (bf16 and has_bf16_units()):
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
    sizes = {"b": b, "h": h, "groups": groups, "s": s, "t": t, "d": d, "v": width, "causal": causal}
    kinds = {"bf16": bf16, "backward": bool(backward)}
    masked = {"mask": mask, "mask_batch": 0 if mask is None else len(mask)}
    rows = dict.fromkeys(names, b"") | dict(zip(names, map(_rows_of_heads, held), strict=False))
    lse = None if lse is None else lse.contiguous()
    run("heads_attention", **sizes, **kinds, **masked, **rows, lse=span(lse), scale=scale)
    return y


def _rows_of_heads(x: Tensor) -> bytes:
    """Return Heads: rows [b, h, rows, numbers] and their strides in bytes."""
    batch, head, row = (x.element_size() * stride for stride in x.stride()[:3])
    return LAYOUTS["Heads"].pack(data=strided(x), batch=batch, head=head, row=row)


def _heads(like: Tensor, width: int) -> Tensor:
    """Return memory for heads, those of a position side by side, as the next product reads them."""
    b, h, s, _ = like.shape
    return like.new_empty(b, s, h, width).transpose(1, 2)
