"""Bytes and FLOPs that really happen: every operation that torch runs is seen, and what it reads and writes is counted.

Counted is what an operation must move: each element of each input once, however often a cache serves it, and each
element of each output once.

    views                  nothing: the same memory under another shape
    in place               the changed tensor is read and written once; only written where it is overwritten
    expanded tensors       the elements that exist
    gathering, scattering  the rows that are named, as often as they are, not the table
    grouped products       the matrices whose group is not empty
    torch.empty            nothing, until something is written there

Where torch's own FLOP counter is blind (grouped products, flash attention on a CPU) it is counted too: padding as
computed, causal attention as half of the square plus the diagonal. While counting, plain PyTorch runs, no kernels.
"""

import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini.measure.machine import synchronize

OVERWRITES = {
    "copy_",
    "fill_",
    "zero_",
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
    "_foreach_copy_",
}
FREE = {"detach", "lift_fresh", "_local_scalar_dense", "_unsafe_view", "is_same_size", "promote_types"}
FREE |= {"_record_function_enter_new", "_record_function_exit"}
ALLOCATES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
ATTENTION = {
    f"_scaled_dot_product_{kind}{backward}"
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    for backward in ("", "_backward")
}
GATHERS = {"index_select", "embedding", "gather", "index", "take", "_embedding_bag", "_embedding_bag_forward_only"}
SCATTERS = {
    "scatter",
    "scatter_add",
    "index_copy",
    "index_put",
    "index_add",
    "index_fill",
    "masked_fill",
    "slice_scatter",
}
ORDERS = {"sort", "argsort", "topk", "cumsum", "searchsorted", "bincount", "unique", "nonzero"}
SLOW_POINTS = {"silu", "silu_backward", "sigmoid", "exp", "log", "_softmax", "_log_softmax", "_softmax_backward_data"}
SLOW_POINTS |= {"_log_softmax_backward_data", "sigmoid_backward", "logsumexp", "pow", "rsqrt", "sin", "cos"}
REDUCES = {"sum", "mean", "amax", "linalg_vector_norm", "max", "min", "any", "all", "prod", "aminmax"}
MOVES = {"copy_", "clone", "_to_copy", "cat", "stack", "constant_pad_nd", "contiguous", "repeat_interleave"}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation that ran."""

    name: str
    kind: str
    """product, batched product, grouped product, attention, pointwise, slow pointwise, reduction, move, gather,
    scatter, order, optimizer."""
    flops: int
    """Multiply-adds are two; 0 for all but products and attention."""
    read: int
    written: int
    cold: int
    """Of these bytes, those that are not in the last-level cache, if it kept what was used last."""
    dtype: torch.dtype
    rows: int
    """Of a product: those that share a matrix, of each group on average; else 0."""
    shape: tuple[tuple[int, ...], ...]
    seconds: float
    """That it took, the counting left out."""

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def cold_share(self) -> float:
        return min(1.0, self.cold / max(1, self.bytes))


class Count(TorchDispatchMode):
    """Counts inside `with Count() as count:`; forward, backward and the optimizer's step alike."""

    def __init__(self, cache_bytes: int = 32 << 20) -> None:
        super().__init__()
        self.cache = _Cache(cache_bytes)
        self.operations: list[Operation] = []
        self.overhead = 0.0
        """Seconds that being watched adds to an operation."""
        self.views = 0
        """Calls that move nothing."""
        self._nested = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # in inference mode torch leaves linear and the like whole
            self._nested = True
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        device = next((t.device for t in _tensors([*args, *kwargs.values()])), torch.device("cpu"))
        start = time.perf_counter()
        out = func(*args, **kwargs)
        synchronize(device)
        seconds = max(1e-7, time.perf_counter() - start - self.overhead)
        name = func._schema.name.split("::")[1]
        if _is_free(func, name):
            self.views += 1
        else:
            self.operations.append(_operation(func, name, args, kwargs, out, seconds, self.cache))
        return out

    def __enter__(self) -> "Count":
        if self._nested:
            self._nested = False
            super().__enter__()
            return self
        x = torch.ones(1)
        plain = statistics.median(_timed(lambda: x * x) for _ in range(99))
        super().__enter__()
        for _ in range(99):
            x * x
        watched = statistics.median(op.seconds for op in self.operations)
        self.operations.clear()
        self.cache.clear()
        self.overhead = max(0.0, watched - plain)
        return self

    @property
    def read(self) -> int:
        return sum(op.read for op in self.operations)

    @property
    def written(self) -> int:
        return sum(op.written for op in self.operations)

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.operations)


def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) and not _is_view(func)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_free(func: Any, name: str) -> bool:
    """Views, and what only makes room."""
    return name in ALLOCATES or name in FREE or _is_view(func)


class _Cache:
    """A cache that keeps what was used last, whole tensors at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self.held: OrderedDict[int, int] = OrderedDict()

    def clear(self) -> None:
        self.used = 0
        self.held.clear()

    def touch(self, t: Tensor, size: int) -> int:
        """The bytes of t that come from memory."""
        pointer = t.data_ptr()
        before = self.held.pop(pointer, 0)
        self.used += size - before
        self.held[pointer] = size
        while self.used > self.room and len(self.held) > 1:
            self.used -= self.held.popitem(last=False)[1]
        return max(0, size - before) if size <= self.room else size


def _operation(
    func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any, seconds: float, cache: _Cache
) -> Operation:
    inputs, changed = [], []
    for argument, value in _arguments(func, args, kwargs):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        # fused optimizers write gradients only where they unscale them
        writes = writes and not (argument.name == "grads" and kwargs.get("grad_scale") is None)
        (changed if writes else inputs).extend(_tensors(value))
    outputs = [t for t in _tensors(out) if not any(t is c for c in changed)]
    read, written = sum(map(_size, inputs)), sum(map(_size, outputs))
    base = name.rstrip("_") if name not in OVERWRITES else name
    only_written = name in OVERWRITES or _is_out_variant(func)
    if base in GATHERS and inputs:
        table, named = inputs[0], sum(_size(t) for t in inputs[1:])
        rows = outputs[0].numel() if base != "_embedding_bag" and base != "_embedding_bag_forward_only" else None
        taken = rows if rows is not None else inputs[1].numel() * table.shape[1]
        read = named + taken * table.element_size()
        written = _size(outputs[0])
    elif base in SCATTERS and changed:
        moved = sum(_size(t) for t in inputs)
        written = max((_size(t) for t in inputs if t.dtype == changed[0].dtype), default=0)
        if base.startswith("scatter"):
            written = inputs[0].numel() * changed[0].element_size()
        elif base == "index_put":
            written = _named(changed[0], args[1]) * changed[0].element_size()
        if "fill" in base:  # what is selected; of a mask, all that is true
            chosen = inputs[0]
            whole = changed[0].numel() // max(1, changed[0].shape[0]) if base == "index_fill" else 1
            count_of = chosen.numel() * whole if base == "index_fill" else int(chosen.expand_as(changed[0]).sum())
            written = count_of * changed[0].element_size()
        adds = "add" in base or kwargs.get("accumulate") or any(a is True for a in args)
        read = moved + (written if adds else 0)
        changed = []
    elif base == "_grouped_mm":
        read -= _unused_matrices(inputs)
    written += sum(map(_size, changed))
    read += 0 if only_written else sum(map(_size, changed))
    touched = {t.data_ptr(): t for t in [*inputs, *changed, *outputs]}.values()
    # a table's rows that are not named stay where they are
    cold = min(read + written, sum(cache.touch(t, min(_size(t), read + written)) for t in touched))
    flops, rows, kind = _flops(base, inputs, outputs, args, kwargs)
    dtype = next((t.dtype for t in [*outputs, *changed, *inputs] if t.is_floating_point()), torch.int64)
    return Operation(
        name=name,
        kind=kind or _kind(name, base),
        flops=flops,
        read=read,
        written=written,
        cold=cold,
        dtype=dtype,
        rows=rows,
        shape=tuple(tuple(t.shape) for t in [*inputs, *changed][:3]),
        seconds=seconds,
    )


def _kind(name: str, base: str) -> str:
    if name.startswith(("_fused_", "_foreach_")):
        return "optimizer"
    kinds = (("move", MOVES), ("gather", GATHERS), ("scatter", SCATTERS), ("order", ORDERS), ("reduction", REDUCES))
    for kind, names in (*kinds, ("slow pointwise", SLOW_POINTS)):
        if name in names or base in names:
            return kind
    return "pointwise"


def _flops(
    base: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[int, int, str]:
    """FLOPs of a product, the rows that share a matrix, and its kind; zeros and "" for another operation."""
    if base in ("mm", "addmm", "mv", "addmv", "dot"):
        a, b = inputs[-2:]
        rows, k = (a.shape[0], a.shape[1]) if a.dim() == 2 else (1, a.shape[0])
        columns = b.shape[1] if b.dim() == 2 else 1
        return 2 * rows * k * columns, min(rows, columns), "product"
    if base in ("bmm", "baddbmm"):
        a, b = inputs[-2:]
        rows = min(a.shape[1], b.shape[2])
        return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2], rows, "batched product"
    if base == "_grouped_mm":
        a, b = inputs[:2]
        if b.dim() == 3:  # rows in groups, a matrix each
            return 2 * a.shape[0] * a.shape[1] * b.shape[2], a.shape[0] // b.shape[0], "grouped product"
        groups = outputs[0].shape[0]
        return 2 * a.shape[0] * a.shape[1] * b.shape[1], a.shape[1] // groups, "grouped product"
    if base in ATTENTION:
        backward = base.endswith("backward")
        q, k, v = inputs[1:4] if backward else inputs[:3]
        batch, heads, s, d = q.shape
        causal = kwargs.get("is_causal", any(a is True for a in args))
        pairs = s * (s + 1) // 2 if causal else s * k.shape[2]
        forward = 2 * batch * heads * pairs * (d + v.shape[3])
        # backward makes the logits again, and the gradients of values, weights, queries and keys: 5 products for 2
        return (forward * 5 // 2 if backward else forward), s, "attention"
    return 0, 0, ""


def _named(t: Tensor, indices: Sequence[Tensor | None]) -> int:
    """Elements of t[indices]."""
    places, whole, at = [], 1, 0
    for index in indices:
        if index is None:
            whole, at = whole * t.shape[at], at + 1
        elif index.dtype in (torch.bool, torch.uint8):
            places.append((int(index.sum()),))
            at += index.dim()
        else:
            places.append(tuple(index.shape))
            at += 1
    return math.prod(torch.broadcast_shapes(*places)) * whole * math.prod(t.shape[at:])


def _unused_matrices(inputs: Sequence[Tensor]) -> int:
    """Bytes of the experts' matrices that no row needs."""
    if inputs[1].dim() != 3 or len(inputs) < 3:
        return 0
    ends = inputs[2].long()
    empty = int((torch.diff(ends, prepend=ends.new_zeros(1)) == 0).sum())
    return empty * inputs[1][0].numel() * inputs[1].element_size()


def _arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return []


def _is_out_variant(func: Any) -> bool:
    return func._overloadname == "out"


def _size(t: Tensor) -> int:
    """Bytes of the elements that exist: an expanded dimension has one."""
    if t.device.type == "meta":
        return 0
    held = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
    return held * t.element_size()


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def count(run: Callable[[], object], cache_bytes: int = 32 << 20) -> Count:
    """What run does, counted."""
    with Count(cache_bytes) as counted:
        run()
    return counted
