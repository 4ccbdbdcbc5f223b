"""Count bytes and FLOPs of every operation that runs.

The bytes are those that an operation must move; torch_operations.py has the rules. PyTorch cannot see into dsmini's own
kernels. For them the cost counts that costs.py has for their operation.
"""

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops
from dsmini.measure.costs import cost_of
from dsmini.measure.torch_operations import is_composite, is_free, name_of, size_of, tensors_in, work_of

C = TypeVar("C", bound="Count")


@dataclass(frozen=True, kw_only=True)
class CountedOperation:
    """Operation that ran."""

    name: str
    kind: str
    """Kind as in torch_operations.Work; of dsmini's own kernels the words of their operation, "attention step"."""
    flops: int
    """FLOPs of products and attention, two for a multiply-add; 0 for other operations."""
    read: int
    """Bytes read."""
    written: int
    """Bytes written."""
    cold: int
    """Bytes that are not in the last-level cache, which keeps the tensors that were used last."""
    dtype: torch.dtype
    shape: tuple[tuple[int, ...], ...]

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Count(TorchDispatchMode):
    """Counter of all operations inside `with Count() as count:`, backward and optimizer included.

    It also knows which results exist, and the most bytes that they took at a time.
    """

    def __init__(self, cache_bytes: int = 32 << 20) -> None:
        super().__init__()
        self.cache: _Cache = _Cache(cache_bytes)
        self.operations: list[CountedOperation] = []
        self.views: int = 0
        """Number of calls that move nothing."""
        self.held: int = 0
        self.peak: int = 0
        """Bytes of all results that exist, and the most that existed at a time."""
        self._known: set[int] = set()
        self.cold_parts: dict[int, int] = {}
        """Bytes of the last operation's tensors that came from memory, by address."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = self._execute(func, args, kwargs)
        self._hold(out)
        if is_free(func):
            self.views += 1
        else:
            self._torch_ran(func, args, kwargs, out)
        return out

    def _execute(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _torch_ran(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        counts = work_of(func, args, kwargs, out)._asdict()
        touched, moved = counts.pop("touched"), counts["read"] + counts["written"]
        # rows of a table that are not indexed do not move
        self.cold_parts.clear()
        cold = min(moved, self._touch(touched, moved))
        dtype = next((t.dtype for t in [*tensors_in(out), *touched] if t.is_floating_point()), torch.int64)
        shown = tensors_in([*args, *kwargs.values()])[:3]
        self._add(shown, name=name_of(func), cold=cold, dtype=dtype, **counts)

    def kernel_ran(self, call: ops.Call) -> None:
        """Count a kernel by the cost of its operation. Bytes beyond the operands are cold."""
        cost, operands = cost_of(call), call.operands
        results = tensors_in(call.result) or operands  # no result: it changes its operands
        self.cold_parts.clear()
        warm = sum(map(size_of, operands)) - self._touch(operands)
        cold = max(0, cost.read - warm) + min(cost.written, self._touch(results))
        counts = cost._asdict() | {"dtype": results[0].dtype, "kind": call.name.replace("_", " ")}
        self._add(results, name=call.name, cold=cold, **counts)
        self._hold(call.result)

    def _touch(self, tensors: Sequence[Tensor], most: float = math.inf) -> int:
        """Return the bytes of tensors that come from memory, of each at most so many, and put them into the cache."""
        total = 0
        for t in tensors:
            cold = self.cache.touch(t, int(min(size_of(t), most)))
            self.cold_parts.setdefault(t.data_ptr(), cold)
            total += cold
        return total

    def _add(self, tensors: Sequence[Tensor], **counts: Any) -> None:
        self.operations.append(CountedOperation(shape=tuple(tuple(t.shape) for t in tensors), **counts))

    def _hold(self, result: Any) -> None:
        for t in tensors_in(result):
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.held += size
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size

    def clear(self) -> None:
        """Forget the operations until now; what is in the cache stays."""
        self.operations.clear()
        self.views = 0

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.operations)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.operations)


class _Cache:
    """Model of a cache that keeps the tensors that were used last, each as a whole."""

    def __init__(self, room: int) -> None:
        self.room: int = room
        self.used: int = 0
        self.held: OrderedDict[int, int] = OrderedDict()

    def touch(self, t: Tensor, size: int) -> int:
        """Return the bytes of t that come from memory, and put t into the cache."""
        pointer = t.data_ptr()
        before = self.held.pop(pointer, 0)
        self.used += size - before
        self.held[pointer] = size
        while self.used > self.room and len(self.held) > 1:
            self.used -= self.held.popitem(last=False)[1]
        return max(0, size - before) if size <= self.room else size


def count(run: Callable[[], object], cache_bytes: int = 32 << 20) -> Count:
    """Run a function and return the count of its operations."""
    counted = Count(cache_bytes)
    with ops.counting(counted), counted:
        run()
    return counted


def counted_twice(make: Callable[[], Callable[[], object]], counted: C) -> C:
    """Make a step, run it twice, and return the count of the second time: the first fills caches and optimizer states.

    `peak` is the most that existed in a step, with all that `make` made.
    """
    with ops.counting(counted), counted:
        step = make()
        counted.peak = counted.held
        step()
        counted.clear()
        step()
    return counted
