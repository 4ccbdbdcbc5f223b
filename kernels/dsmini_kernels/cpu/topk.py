"""The keys that an indexer chooses, attention to them, and V4's attention: checks, and calls of the C++."""

from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import detached, is_bf16, n_threads, run, span, strided
from dsmini_kernels.cpu.steps import MOST_TOKENS, THREADED, has_bf16_units, key_rows, quantized_linear
from dsmini_kernels.cpu.structs import LIMITS


def topk_keys(q: Tensor, k: Tensor, weights: Tensor, topk: int, mask: Tensor) -> Tensor:
    """Return the places of the topk largest scores of each query in order, and -1 where it sees fewer keys."""
    (b, s, heads, width), t = q.shape, k.shape[1]
    topk = min(topk, t)
    bf16 = is_bf16(q, k)
    if weights.dtype != torch.float32 or mask.dtype != torch.bool or not b * s * heads * width * topk:
        raise Unserved(f"weights of {weights.dtype}, and {b} x {s} queries for {topk} keys")
    topk_indices = torch.empty(b, s, topk, dtype=torch.int64, device="cpu")
    sizes = {"b": b, "s": s, "t": t, "heads": heads, "width": width, "topk": topk, "bf16": bf16}
    operands = {"q": q, "weights": weights, "mask": mask, "mask_batch": len(mask)}
    with torch.no_grad():  # places have no gradient
        k, k_span, k_stride = _batches(k)
        run("topk_keys", **sizes, **operands, k=k_span, k_stride=k_stride, topk_indices=span(topk_indices))
    return topk_indices


def topk_attention(
    q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, topk_indices: Tensor
) -> Tensor:
    """Return absorbed attention of each query to the rows that it chose. Sums are FP32, of BF16 numbers if rows are.

    A CPU without products of BF16 numbers takes them as FP32.
    """
    (b, s, heads, _), (t, width), latent, k = q_nope.shape, rows.shape[1:], w_uk.shape[2], topk_indices.shape[2]
    bf16 = is_bf16(q_nope, q_rope, rows, w_uk, w_uv)
    if not b * s * heads * latent * k:
        raise Unserved
    q_nope, q_rope, w_uk, w_uv = (detached(x) for x in (q_nope, q_rope, w_uk, w_uv))
    rows, rows_span, rows_stride = _batches(rows)
    q = torch.cat((_of_each_head(q_nope, w_uk), q_rope), -1)
    out = q.new_empty(b, s, heads, latent)
    sizes = {"b": b, "s": s, "t": t, "heads": heads, "width": width, "latent": latent, "k": k, "bf16": bf16}
    stored = {"rows": rows_span, "rows_stride": rows_stride, "topk_indices": topk_indices}
    run("topk_attention", **sizes, **stored, q=q, out=span(out), scale=scale)
    return _of_each_head(out, w_uv).reshape(b, s, heads * w_uv.shape[2])


def entry_attention(
    q: Tensor,
    near: Tensor,
    masked: Tensor,
    entries: Any,
    hidden: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    scale: float,
) -> Tensor:
    """Return attention of few queries to rows of the window, and to entries as a cache stores them, with a sink."""
    (b, s, heads, width), n = q.shape, hidden.shape[2]
    bf16 = is_bf16(q, near)
    if not q.numel() or b * s > MOST_TOKENS or (chosen is not None and not chosen.numel()):
        raise Unserved
    if width > LIMITS["MOST_WIDTH"] or sink.dtype != torch.float32:
        raise Unserved(f"rows of {width} numbers, and a sink of {sink.dtype}")
    held = [key_rows(near, near.shape[1]), key_rows(entries, n)]
    out, k = q.new_empty(q.shape), 0 if chosen is None else chosen.shape[2]
    threads = n_threads() if q.numel() * (near.shape[1] + (k or n)) >= THREADED else 1
    run(
        "entry_attention",
        **{"threads": threads, "b": b, "s": s, "heads": heads, "width": width, "bf16": bf16},
        **{"near": held[0][1], "entries": held[1][1], "chosen": chosen, "k": k},
        **{"masked": masked, "masked_batch": len(masked), "hidden": hidden, "hidden_batch": len(hidden)},
        **{"q": q, "sink": sink, "out": span(out), "scale": scale},
    )
    return out


def _of_each_head(x: Tensor, w: Tensor) -> Tensor:
    """Return the product of each head's rows [b, s, h, i] and its matrix [h, i, o].

    torch multiplies BF16 many times more slowly than FP32 on a CPU without units for it. Its sums depend on the number
    of threads where there is one head, or where the numbers of a sum are apart in memory.
    """
    if len(w) == 1:
        return quantized_linear(x.squeeze(2), w[0].T.clone(memory_format=torch.contiguous_format)).unsqueeze(2)
    wide = x.dtype if has_bf16_units() else torch.float32
    y = x.flatten(0, 1).transpose(0, 1).to(wide) @ w.mT.contiguous().mT.to(wide)
    return y.transpose(0, 1).unflatten(0, x.shape[:2]).to(x.dtype)


def _batches(x: Tensor) -> tuple[Tensor, bytes, int]:
    """Return rows [b, t, width] with contiguous batches, their Span, and the bytes from batch to batch."""
    x = detached(x)
    b, t, width = x.shape
    if x.stride(2) != 1 or x.stride(1) != width or (b > 1 and x.stride(0) < t * width):
        x = x.contiguous()
    return x, strided(x), x.element_size() * (x.stride(0) if b > 1 else t * width)
