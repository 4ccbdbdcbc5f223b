"""The routed experts, fast in plain PyTorch.

Rows are sorted by expert (dispatch), one grouped product runs for each matrix, and the results are summed by token
(combine). Between dispatch and combine each row needs its expert alone: an exchange of rows between devices fits there.

In training there are two more operations with a backward of their own, which kernels can serve; where none does,
autograd differentiates the grouped products. Their forward keeps what w1 and w3 made of each token-expert pair, g and
u. For a pair with weight p and the gradient dy of its token:

    h  = silu(g) u,    dh = p w2^T dy,    dg = dh u silu'(g),    du = dh silu(g)
    dp = h (w2^T dy),  dx = w1^T dg + w3^T du,  dw1 = dg x^T,  dw3 = du x^T,  dw2 = p dy h^T

dx is summed over a token's pairs, the weights' gradients over an expert's. With a limit h is of g and u
cut to it, and dg and du are 0 outside of it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.functional.layers import product_dtype
from dsmini.numerics import (
    QuantizedTensor,
    Weight,
    at_least_fp32,
    dense,
    fp8_matmul,
    fp8_swiglu_matmul,
    grouped_linear,
    matrix_of,
    rows_of,
    swiglu,
)
from dsmini.numerics.dispatch import combine, dispatch, dispatch_quantized, sort_by_expert, weights_of_slots
from dsmini.numerics.quantization import X, group_sizes

W1 = Float[Tensor, "e f m"]
W2 = Float[Tensor, "e m f"]
KERNEL_FROM = 1 << 20
"""Number of multiplications of a forward below which autograd's operations cost no more than those of training."""


@ops.eager("experts")
def experts_eager(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float | None = None
) -> Tensor:
    slow = x.dtype == torch.bfloat16 and product_dtype(x) != x.dtype
    if not torch.is_grad_enabled() and (slow or prefer_loop(x, indices, w1.shape[0])):
        return run_experts(_expert, x, indices, weights, (w1, w2, w3), limit)
    if torch.is_grad_enabled() and trains_by_kernel(x, indices, weights, w1, w2, w3):
        return train_experts(x, indices, weights, w1, w2, w3, limit)
    given, dtype = x.dtype, product_dtype(x)
    if dtype != given:  # weights are rounded as x is, and then widened
        x, w1, w2, w3 = (t.to(given).to(dtype) for t in (x, w1, w2, w3))
    y = run_together(_grouped_experts, x, indices, weights, (w1, w2, w3), limit)
    return y.to(given) if limit is None else y


@ops.eager("quantized_experts")
def quantized_experts_eager(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None = None
) -> Tensor:
    # only chosen experts are dequantized, one after the other
    return run_experts(_expert, x, indices, weights, (w1, w2, w3), limit)


@ops.eager("fp8_experts")
def fp8_experts_eager(
    x: QuantizedTensor, indices: Tensor, weights: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None = None
) -> Tensor:
    coded = any(isinstance(w, QuantizedTensor) for w in (w1, w2, w3))
    if coded or (not torch.is_grad_enabled() and prefer_loop(x, indices, w1.shape[0])):
        return run_experts(_fp8_experts, x, indices, weights, (w1, w2, w3), limit)
    return run_together(_fp8_experts, x, indices, weights, (w1, w2, w3), limit)


def run_experts(
    run: Callable[..., Tensor], x: X, indices: Tensor, weights: Tensor, w123: Sequence[Weight], limit: float | None
) -> Tensor:
    """Run the chosen experts one after the other.

    Args:
        run: run(rows, w123, limit, share) returns an expert's output for its rows. With a limit, share [rows, 1] has
            their weights, which it multiplies before w2.
        w123: w1, w2 and w3 of all experts.
    """
    e, weighed = w123[0].shape[0], limit is not None

    def expert(i: int, rows: X, share: Tensor | None) -> Tensor:
        return run(rows, [matrix_of(w, i) for w in w123], limit, share)

    if x.shape[0] == 1:  # decoding: nothing to sort
        shares = weights.view(-1, 1, 1) if weighed else [None] * indices.shape[1]
        y = torch.cat([expert(i, x, share) for i, share in zip(indices[0].tolist(), shares, strict=True)])
        return at_least_fp32(y).sum(0, keepdim=True) if weighed else weights.to(x.dtype) @ y
    slots = sort_by_expert(indices, e)
    sizes = group_sizes(slots.ends).tolist()
    shares = weights_of_slots(weights, slots).split(sizes) if weighed else [None] * e
    out: list[Tensor] = []
    for i, (tokens, share) in enumerate(zip(slots.token.split(sizes), shares, strict=True)):
        if len(tokens):
            out.append(expert(i, rows_of(x, tokens), share))
    y = torch.cat(out) if out else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return combine(y, weights, slots, weighed)


def run_together(
    run: Callable[..., Tensor], x: X, indices: Tensor, weights: Tensor, w123: Sequence[Weight], limit: float | None
) -> Tensor:
    """Run all experts at once, by grouped products.

    Args:
        run: as in run_experts, with all experts' matrices, and the `ends` of their rows.
    """
    e = w123[0].shape[0]
    slots = sort_by_expert(indices, e, row_alignment(x, indices, e))
    share = None if limit is None else weights_of_slots(weights, slots)
    rows = dispatch(x, slots) if isinstance(x, Tensor) else dispatch_quantized(x, slots)
    return combine(run(rows, w123, limit, share, slots.ends), weights, slots, limit is not None)


def prefer_loop(x: Tensor | QuantizedTensor, indices: Tensor, e: int) -> bool:
    """Return True where the chosen experts one after the other are faster than a grouped product.

    A grouped product on a CPU spends time on experts without rows too (docs/log.md). On a GPU it serves BF16 alone:
    other products run expert by expert in any case, in all of them.
    """
    kind = x.device.type
    return (kind == "cpu" or (kind != "meta" and x.dtype != torch.bfloat16)) and 2 * indices.numel() <= e


def row_alignment(x: Tensor | QuantizedTensor, indices: Tensor, e: int) -> int:
    """Return the multiple of rows at which each expert's rows start.

    oneDNN prepares a BF16 product for each new number of rows. Multiples of 64 repeat, so it reuses them (docs/log.md).
    """
    enough = indices.numel() >= 64 * e
    return 64 if enough and x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1


def _expert(rows: Tensor, w123: Sequence[Weight], limit: float | None, share: Tensor | None) -> Tensor:
    dtype = product_dtype(rows)
    x, *matrices = rows.to(dtype), *(dense(w, rows.dtype).to(dtype) for w in w123)
    hidden = swiglu(F.linear(x, matrices[0]), F.linear(x, matrices[2]), limit, share)
    return F.linear(hidden, matrices[1]).to(rows.dtype)


def _grouped_experts(
    rows: Tensor, w123: Sequence[Tensor], limit: float | None, share: Tensor | None, ends: Tensor
) -> Tensor:
    w1, w2, w3 = w123
    if torch.is_grad_enabled():
        w13 = torch.cat((w1.to(rows.dtype), w3.to(rows.dtype)), 1)  # one product reads the rows once
        gate, up = grouped_linear(rows, w13, ends).chunk(2, -1)
    else:  # joining them costs more than it saves where the step has no backward
        gate, up = grouped_linear(rows, w1, ends), grouped_linear(rows, w3, ends)
    return grouped_linear(swiglu(gate, up, limit, share), w2, ends)


def _fp8_experts(
    rows: QuantizedTensor, w123: Sequence[Weight], limit: float | None, share: Tensor | None, ends: Tensor | None = None
) -> Tensor:
    w1, w2, w3 = w123
    gate, up = (fp8_matmul(rows, w, ends=ends) for w in (w1, w3))
    return fp8_swiglu_matmul(gate, up, w2, ends=ends, limit=limit, weights=share)


@ops.operation("trained_experts")
def trained_experts(
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    w1: W1,
    w2: W2,
    w3: W1,
    limit: float | None = None,
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n*k f"], Float[Tensor, "n*k f"]]:
    """Return y, and g and u of each token-expert pair, in the order of experts, and of tokens within an expert."""
    slots = sort_by_expert(indices, w1.shape[0])
    rows = x[slots.token]
    gate, up = grouped_linear(rows, w1, slots.ends), grouped_linear(rows, w3, slots.ends)
    return ops.find("experts").reference(x, indices, weights, w1, w2, w3, limit), gate, up


@ops.operation("trained_experts_gradients")
def trained_experts_gradients(
    grad: Float[Tensor, "n m"],
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    gate: Float[Tensor, "n*k f"],
    up: Float[Tensor, "n*k f"],
    w1: W1,
    w2: W2,
    w3: W1,
    limit: float | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weights, w1, w2 and w3. An expert that nobody chose has gradients of zero.

    The plain version is autograd's, which computes g and u again.
    """
    with torch.enable_grad():
        x, weights, w1, w2, w3 = leaves = [t.detach().requires_grad_() for t in (x, weights, w1, w2, w3)]
        y = ops.find("experts").reference(x, indices, weights, w1, w2, w3, limit)
        return torch.autograd.grad(y, leaves, grad.to(y.dtype))


def train_experts(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float | None = None
) -> Tensor:
    """Compute `experts` by the two operations. First derivatives only."""

    def forward(x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, gate, up = trained_experts(x, indices, weights, w1, w2, w3, limit)
        return y, (x, indices, weights, gate, up, w1, w2, w3)

    def gradients(grad: Tensor, x: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        indices, weights, gate, up, w1, w2, w3 = saved
        # V4's is FP32, and that of each result has x's dtype
        return trained_experts_gradients(grad.to(x.dtype), x, indices, weights, gate, up, w1, w2, w3, limit)

    return ops.trained(forward, gradients, x, weights, w1, w2, w3)


def trains_by_kernel(x: Tensor, indices: Tensor, weights: Tensor, *matrices: Tensor) -> bool:
    """Return True where a kernel with a backward of its own serves `experts`."""
    if torch.compiler.is_compiling() or 3 * indices.numel() * matrices[0][0].numel() < KERNEL_FROM:
        return False
    plain = all(w.dtype == torch.float32 and w.is_contiguous() for w in matrices)
    known = plain and weights.dtype == torch.float32 and x.dtype in (torch.float32, torch.bfloat16)
    # frozen ones want no gradients, which the kernel would make; an expert is computed by one thread
    if not known or not all(w.requires_grad for w in matrices) or len(matrices[0]) < 2 * torch.get_num_threads():
        return False
    return not torch.is_autocast_enabled(x.device.type) and ops.serves("trained_experts", x)
