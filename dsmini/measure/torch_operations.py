"""Count bytes and FLOPs of PyTorch's own operations from their schema and tensors.

An operation must move each element of each input and of each output once, even if a cache serves it more often.

    views                  nothing: the same memory with another shape
    in place               the changed tensor, read and written once; only written if it is overwritten
    expanded tensors       the elements that exist
    gathering, scattering  the indexed rows, as often as they are indexed, not the table
    grouped products       the matrices whose group is not empty
    torch.empty            nothing, until something is written there

Grouped products and flash attention on a CPU count too, although torch's own FLOP counter misses them. Padding counts
as computed; causal attention counts as half of the square plus the diagonal.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmini.numerics.quantization import group_sizes


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OVERWRITES = _names("copy_ fill_ zero_ normal_ uniform_ random_ bernoulli_ exponential_ _foreach_copy_")
FREE = _names(
    "detach lift_fresh _local_scalar_dense _unsafe_view is_same_size promote_types _record_function_enter_new "
    "_record_function_exit empty empty_like new_empty empty_strided new_empty_strided set_"
)
"""Operations that move nothing: they allocate memory, name it, or return a property."""
ATTENTION = frozenset(
    f"_scaled_dot_product_{kind}{backward}"
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    for backward in ("", "_backward")
)
PRODUCTS: dict[str, str] = {
    **dict.fromkeys(("mm", "addmm", "mv", "addmv", "dot"), "product"),
    **dict.fromkeys(("bmm", "baddbmm"), "batched product"),
}
BAGS = _names("_embedding_bag _embedding_bag_forward_only")
KINDS = {
    "move": "copy_ clone _to_copy cat stack constant_pad_nd contiguous repeat_interleave",
    "gather": "index_select embedding gather index take _embedding_bag _embedding_bag_forward_only",
    "scatter": "scatter scatter_add index_copy index_put index_add index_fill masked_fill slice_scatter",
    "order": "sort argsort topk cumsum searchsorted bincount unique nonzero",
    "reduction": "sum mean amax linalg_vector_norm max min any all prod aminmax",
}
"""Operations by kind; all others are pointwise."""
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


class Work(NamedTuple):
    """Work of one operation."""

    read: int
    """Bytes read."""
    written: int
    """Bytes written."""
    flops: int
    """FLOPs of products and attention; 0 for other operations."""
    kind: str
    """One of product, batched product, grouped product, attention, pointwise, reduction, move, gather, scatter, order,
    optimizer."""
    touched: list[Tensor]
    """Inputs and outputs, each storage once."""


def work_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    """Count one operation that ran with these arguments and this result."""
    name = name_of(func)
    inputs, changed = operands_of(func, args, kwargs)
    outputs = [t for t in tensors_in(out) if not any(t is c for c in changed)]
    base = name.rstrip("_") if name not in OVERWRITES else name
    touched = list({t.data_ptr(): t for t in [*inputs, *changed, *outputs]}.values())
    flops, kind = _flops(base, inputs, args, kwargs, out)
    kind = kind or _kind(name, base)
    if kind == "scatter" and changed:
        read, written = _scattered(base, inputs, changed[0], args, kwargs)
        return Work(read, written, flops, kind, touched)
    read, written = sum(map(size_of, inputs)), sum(map(size_of, outputs))
    if kind == "gather" and inputs:
        read, written = _gathered(base, inputs, outputs)
    elif base == "_grouped_mm":
        read -= _unused_matrices(inputs)
    in_place = sum(map(size_of, changed))
    only_written = name in OVERWRITES or func._overloadname == "out"
    read += 0 if only_written else in_place
    return Work(read, written + in_place, flops, kind, touched)


def name_of(func: Any) -> str:
    """Return an operation's name without its namespace."""
    return func._schema.name.split("::")[1]


def is_composite(func: Any) -> bool:
    """Return True if an operation consists of others, as linear does in inference mode."""
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) and not _is_view(func)


def is_free(func: Any) -> bool:
    """Return True if an operation moves nothing: a view, or an operation that only allocates memory."""
    return name_of(func) in FREE or _is_view(func)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of an argument or a result."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_in(v)]
    return []


def size_of(t: Tensor) -> int:
    """Return the bytes of the elements that exist; an expanded dimension has one."""
    if t.device.type == "meta":
        return 0
    held = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
    return held * t.element_size()


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def operands_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that are only read, and the tensors that are changed."""
    inputs: list[Tensor] = []
    changed: list[Tensor] = []
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        # fused optimizers write gradients only to unscale them
        writes = writes and not (argument.name == "grads" and kwargs.get("grad_scale") is None)
        (changed if writes else inputs).extend(tensors_in(values.get(argument.name)))
    return inputs, changed


def _gathered(base: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[int, int]:
    """Return the bytes read and written by taking rows of a table."""
    table, indices = inputs[0], sum(size_of(t) for t in inputs[1:])
    taken = inputs[1].numel() * table.shape[1] if base in BAGS else outputs[0].numel()
    return indices + taken * table.element_size(), size_of(outputs[0])


def _scattered(
    base: str, inputs: Sequence[Tensor], target: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[int, int]:
    """Return the bytes read and written by putting values into places of a tensor."""
    written = max((size_of(t) for t in inputs if t.dtype == target.dtype), default=0)
    if base.startswith("scatter"):
        written = inputs[0].numel() * target.element_size()
    elif base == "index_put":
        places = tuple(slice(None) if index is None else index for index in args[1])
        written = target.new_empty(()).expand(target.shape)[places].numel() * target.element_size()
    elif base == "index_fill":
        written = inputs[0].numel() * target.numel() // max(1, target.shape[0]) * target.element_size()
    elif base == "masked_fill":
        written = int(inputs[0].expand_as(target).sum()) * target.element_size()
    adds = "add" in base or kwargs.get("accumulate") or any(a is True for a in args)
    return sum(map(size_of, inputs)) + (written if adds else 0), written


def _kind(name: str, base: str) -> str:
    if name.startswith(("_fused_", "_foreach_")):
        return "optimizer"
    return KIND_OF.get(name) or KIND_OF.get(base, "pointwise")


def _flops(
    base: str, inputs: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any], out: Any
) -> tuple[int, str]:
    """Return the FLOPs of a product and its kind; 0 and "" for other operations."""
    if base in PRODUCTS:  # each number of the result is a sum over the last dimension of the first factor
        return 2 * out.numel() * inputs[-2].shape[-1], PRODUCTS[base]
    if base == "_grouped_mm":
        a, b = inputs[:2]  # groups of rows, each with its matrix, or products of groups
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1], "grouped product"
    if base in ATTENTION:
        backward = base.endswith("backward")
        q, k, v = inputs[1:4] if backward else inputs[:3]
        batch, heads, s, d = q.shape
        causal = kwargs.get("is_causal", any(a is True for a in args))
        pairs = s * (s + 1) // 2 if causal else s * k.shape[2]
        forward = 2 * batch * heads * pairs * (d + v.shape[3])
        # backward recomputes the logits, and computes gradients of values, weights, queries and keys: 5 products for 2
        return (forward * 5 // 2 if backward else forward), "attention"
    return 0, ""


def _unused_matrices(inputs: Sequence[Tensor]) -> int:
    """Return the bytes of the experts' matrices that no row uses."""
    if inputs[1].dim() != 3 or len(inputs) < 3:
        return 0
    ends = inputs[2].long()
    empty = int((group_sizes(ends) == 0).sum())
    return empty * inputs[1][0].numel() * inputs[1].element_size()
