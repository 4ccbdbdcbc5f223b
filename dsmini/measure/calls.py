"""Calls of operations that a dry run has seen, described so that each can be made again alone.

A described call keeps no tensor of the step. Each tensor among its arguments is written down as its shape, strides and
dtype, and whether its bytes came from memory or from a cache. Indices, counts and masks are kept as they are: the work
of others depends on them. Made again, the operands are pieces of one block of random numbers that is larger than the
last-level cache: those from memory are other pieces each time, so that no cache holds them, the others stay the same.
"""

import functools
import io
import itertools
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmini.inference.fused import StepWeights

INDEX_DTYPES = frozenset((torch.int64, torch.int32, torch.bool))
"""Dtypes of numbers that shapes depend on."""
BLOCKS = 4
"""Size of the block of random numbers, as a multiple of the last-level cache."""
MOST_COPIES = 64
LEAST_COLD = 1 << 14
"""Bytes below which a tensor counts as one in a cache."""


class Call(NamedTuple):
    """A call with all that its time depends on."""

    run: Callable[..., Any]
    name: str
    kind: str
    """Words of a kernel's operation, such as "attention step", or kind of torch's operation."""
    arguments: bytes
    """Positional and keyword arguments, pickled, without their tensors."""
    indices: Mapping[int, Tensor]
    """Indices, counts and masks, by their place among the tensors."""
    changed: frozenset[int]
    """Places of the tensors that the call changes."""
    flops: int
    moved: int
    """Bytes of operands and results."""
    cold: int
    """Bytes that come from memory."""
    held: int
    """Bytes of the operands that are not in a cache, those that are not read too, such as of experts not chosen."""
    cold_results: int
    """Bytes of results whose memory is in no cache."""

    @property
    def key(self) -> tuple[str, bytes, int, bool]:
        """Calls with equal keys take equally long."""
        return self.name, self.arguments, self.flops, self.cold_results > 0


def described(
    args: Any, kwargs: Any, changed: Sequence[Tensor], is_cold: Callable[[Tensor], bool]
) -> tuple[bytes, dict[int, Tensor], frozenset[int]]:
    """Return pickled arguments, their indices, and the places of those of their tensors that the call changes."""
    file = io.BytesIO()
    pickler = _Pickler(file, is_cold)
    pickler.dump((args, kwargs))
    places = [pickler.places.get(_identity(t)) for t in changed if t.dtype not in INDEX_DTYPES]
    return file.getvalue(), pickler.indices, frozenset(place for place in places if place is not None)


def _identity(t: Tensor) -> tuple[Any, ...]:
    """Return what a tensor has in common with others that are the same memory in the same way."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, is_cold: Callable[[Tensor], bool]) -> None:
        super().__init__(file)
        self.is_cold, self.places, self.indices = is_cold, dict[Any, int](), dict[int, Tensor]()

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.dtype | torch.device | torch.layout):
            return str(obj)
        if not isinstance(obj, Tensor):
            return None
        place = self.places.setdefault(_identity(obj), len(self.places))
        if obj.dtype in INDEX_DTYPES:
            if place not in self.indices:
                self.indices[place] = obj.detach().clone()
            return place, tuple(obj.shape)
        return place, tuple(obj.shape), obj.stride(), str(obj.dtype), self.is_cold(obj)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, StepWeights):
            return NotImplemented
        # what a backend prepared are addresses
        return _remade, (obj.norm, obj.layer, obj.residual, obj.weights, obj.dtype)


def _remade(norm: Any, layer: Any, residual: Any, weights: Any, dtype: torch.dtype) -> StepWeights:
    return StepWeights(norm=norm, layer=layer, residual=residual, weights=weights, dtype=dtype)


class Operands:
    """Random operands of calls, taken one after another from a block for each dtype.

    Args:
        cache_bytes: of the last-level cache.
    """

    def __init__(self, cache_bytes: int) -> None:
        self.size: int
        self.least: int = BLOCKS * cache_bytes
        self.size = self.least
        self.blocks: dict[torch.dtype, Tensor] = {}
        self.next: dict[torch.dtype, int] = {}

    def turn(self, call: Call) -> tuple[Callable[[], object], int]:
        """Return what makes a call with other cold operands each time, and the number of different ones."""
        copies = 1
        if call.cold >= LEAST_COLD:  # of large tensors, or of many small ones
            copies = max(2, min(MOST_COPIES, self.size // call.cold))
        warm: dict[int, Tensor] = {}
        self.least = max(self.size, 2 * call.held)
        sets = [_Unpickler(call, self, warm).load() for _ in range(copies)]
        kept: list[object] = [None] * (copies if call.cold_results >= LEAST_COLD else 1)
        number = itertools.count()

        def turn() -> None:
            i = next(number)
            args, kwargs = sets[i % copies]
            kept[i % len(kept)] = call.run(*args, **kwargs)

        return turn, copies

    def take(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the next piece of the block of this dtype."""
        needed = _extent(shape, stride)
        block = self.blocks.get(dtype)
        if block is None or block.nbytes < self.least or block.numel() < needed:
            block = self.blocks[dtype] = random_numbers(max(self.least // dtype.itemsize, needed), dtype)
        at = self.next.get(dtype, 0)
        if at + needed > block.numel():  # the second time around the pieces begin at other places
            at = 64 * (at // 64 % max(1, (block.numel() - needed) // 64) // 3)
        self.next[dtype] = at + -(-needed // 64) * 64
        return block.as_strided(shape, stride, at)


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def random_numbers(n: int, dtype: torch.dtype) -> Tensor:
    """Return numbers from 1 to 2 with both signs, or codes: none becomes denormal, which some CPUs multiply slowly."""
    few = _few_numbers(dtype)
    return few[:n].clone() if n <= len(few) else few.repeat(-(-n // len(few)))[:n]


@functools.cache
def _few_numbers(dtype: torch.dtype) -> Tensor:
    n, generator = 1 << 20, torch.Generator().manual_seed(0)
    if dtype.itemsize == 1:
        return torch.randint(1, 120, (n,), dtype=torch.uint8, generator=generator).view(dtype)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return ((1 + torch.rand(n, generator=generator)) * signs).to(dtype)


class _Unpickler(pickle.Unpickler):
    def __init__(self, call: Call, operands: Operands, warm: dict[int, Tensor]) -> None:
        super().__init__(io.BytesIO(call.arguments))
        self.call, self.operands, self.warm, self.made = call, operands, warm, dict[int, Tensor]()

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, str):
            return _named(pid)
        place, shape, *rest = pid
        if not rest:
            return self.call.indices[place]
        stride, dtype, is_cold = rest
        if place in self.call.changed:  # a block that calls change would drift
            if place not in self.made:
                self.made[place] = random_numbers(_extent(shape, stride), _named(dtype))
            return self.made[place].as_strided(shape, stride)
        known = self.made if is_cold else self.warm
        if place not in known:
            known[place] = self.operands.take(shape, stride, _named(dtype))
        return known[place]


def _named(name: str) -> Any:
    """Return the dtype, layout or device of that name."""
    return getattr(torch, name.removeprefix("torch.")) if name.startswith("torch.") else torch.device(name)
