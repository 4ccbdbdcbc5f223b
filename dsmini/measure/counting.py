"""Bytes and FLOPs that really happen: every operation that runs is seen, and what it reads and writes is counted.

Counted is what an operation must move; torch_operations.py says how. Where a kernel serves one of dsmini's operations,
PyTorch sees nothing of it: then the cost that the operation declares is counted, in dsmini.functional and
dsmini.numerics.
"""

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops
from dsmini.machine import once, synchronize
from dsmini.measure.torch_operations import Work, is_composite, is_free, name_of, size_of, tensors_in, work_of


@dataclass(frozen=True, kw_only=True)
class CountedOperation:
    """One operation that ran."""

    name: str
    kind: str
    """As in torch_operations.Work; of a kernel: move where it only converts, else product."""
    flops: int
    """Multiply-adds are two; 0 for all but products and attention."""
    read: int
    """Bytes."""
    written: int
    """Bytes."""
    cold: int
    """Bytes that are not in the last-level cache, if it keeps what was used last."""
    dtype: torch.dtype
    rows: int
    """Rows of a product that share a matrix, of each group on average; else 0."""
    shape: tuple[tuple[int, ...], ...]
    seconds: float
    """Time that it took, without the counting."""

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
        self.operations: list[CountedOperation] = []
        self.views = 0
        """Calls that move nothing."""
        self.overhead = 0.0
        """Seconds that being watched adds to an operation."""
        self.overhead = self._measured_overhead()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        device = next((t.device for t in tensors_in([*args, *kwargs.values()])), torch.device("cpu"))
        start = time.perf_counter()
        out = func(*args, **kwargs)
        synchronize(device)
        seconds = max(1e-7, time.perf_counter() - start - self.overhead)
        if is_free(func):
            self.views += 1
        else:
            self._torch_ran(func, args, kwargs, out, seconds)
        return out

    def _torch_ran(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, seconds: float) -> None:
        work = work_of(func, args, kwargs, out)
        moved = work.read + work.written
        # a table's rows that are not named stay where they are
        cold = min(moved, sum(self.cache.touch(t, min(size_of(t), moved)) for t in work.touched))
        dtype = next((t.dtype for t in [*tensors_in(out), *work.touched] if t.is_floating_point()), torch.int64)
        self._add(name_of(func), work, cold, dtype, tensors_in([*args, *kwargs.values()])[:3], seconds)

    def kernel_ran(self, name: str, cost: ops.Cost, result: Any, seconds: float) -> None:
        """Count a kernel by the cost that its operation declares."""
        results = tensors_in(result)
        moved = cost.read + cost.written
        cold = min(moved, cost.read + sum(self.cache.touch(t, size_of(t)) for t in results))
        kind, rows = ("product", 1) if cost.flops else ("move", 0)
        work = Work(cost.read, cost.written, cost.flops, rows, kind, results)
        self._add(name, work, cold, results[0].dtype, results, max(1e-7, seconds))

    def _add(
        self, name: str, work: Work, cold: int, dtype: torch.dtype, tensors: Sequence[Tensor], seconds: float
    ) -> None:
        counted = {key: value for key, value in work._asdict().items() if key != "touched"}
        shape = tuple(tuple(t.shape) for t in tensors)
        self.operations.append(
            CountedOperation(name=name, cold=cold, dtype=dtype, shape=shape, seconds=seconds, **counted)
        )

    def _measured_overhead(self) -> float:
        x = torch.ones(1)
        plain = statistics.median(once(lambda: x * x, x.device) for _ in range(99))
        with self:
            for _ in range(99):
                torch.mul(x, x)
        watched = statistics.median(op.seconds for op in self.operations)
        self.operations.clear()
        self.cache.clear()
        return max(0.0, watched - plain)

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


class _Cache:
    """A cache that keeps what was used last, whole tensors at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self.held: OrderedDict[int, int] = OrderedDict()

    def clear(self) -> None:
        self.used = 0
        self.held.clear()

    def touch(self, t: Tensor, size: int) -> int:
        """Return the bytes of t that come from memory."""
        pointer = t.data_ptr()
        before = self.held.pop(pointer, 0)
        self.used += size - before
        self.held[pointer] = size
        while self.used > self.room and len(self.held) > 1:
            self.used -= self.held.popitem(last=False)[1]
        return max(0, size - before) if size <= self.room else size


def count(run: Callable[[], object], cache_bytes: int = 32 << 20) -> Count:
    """Run, and return what it did, counted."""
    counted = Count(cache_bytes)
    with ops.counting(counted), counted:
        run()
    return counted
