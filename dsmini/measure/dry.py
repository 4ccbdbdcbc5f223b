"""Count the operations of a run without running them: no numbers are computed, and almost no memory is used.

Inside `with Dry() as counted, ops.counting(counted):` a model is built and run as always. PyTorch's operations on
floating-point tensors compute the shape of their result and nothing else. The result is memory that nobody touches, so
the system never has to find it. Operations on indices, counts, positions and masks do run, because the shapes of
others depend on them. dsmini's kernels check and describe their calls as always; the C++ is not entered.

So the same code decides what would run here: which kernel serves, which product is explicit, how rows are grouped.

Simulated: experts are chosen at random, each token's distinct, all alike likely. A number that the code asks for
(`item()`) is 1, and a comparison of floating-point numbers is true.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dsmini import ops
from dsmini.measure.calls import INDEX_DTYPES, LEAST_COLD, Call, described
from dsmini.measure.counting import Count, counted_twice
from dsmini.measure.torch_operations import is_free, name_of, operands_of, size_of, tensors_in

CPU, META = torch.device("cpu"), torch.device("meta")


class Dry(Count):
    """Counter of operations that do not run, and of the memory that their results would take."""

    def __init__(self, cache_bytes: int = 32 << 20) -> None:
        super().__init__(cache_bytes)
        self.generator: torch.Generator = torch.Generator().manual_seed(0)
        self.calls: dict[Any, tuple[Call, int]] = {}
        """Each distinct call, and how often it was made, by its key."""

    def clear(self) -> None:
        """Forget the operations and calls until now."""
        super().clear()
        self.calls.clear()

    def _execute(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        given = tensors_in([*args, *kwargs.values()])
        if name == "_local_scalar_dense" and given[0].dtype not in INDEX_DTYPES:
            return 1.0
        _, changed = operands_of(func, args, kwargs)
        on_indices = all(t.dtype in INDEX_DTYPES for t in (*given, *changed))
        if is_free(func) or (on_indices and changed):
            if name == "scatter_":  # places that are counted from a mask, which is true everywhere, may not exist
                x, dim, index, *source = args
                args = (x, dim, index.clamp(max=x.shape[dim] - 1), *source)
            return func(*args, **kwargs)
        if changed:
            return _returned(func, changed)
        if name == "_grouped_mm" and given[0].dtype != torch.bfloat16:  # torch has its shapes for BF16 only
            shapes = func(*(_meta(t, torch.bfloat16) for t in given[:2]), *_on_meta(args[2:]), **_on_meta(kwargs))
            return _empty(_meta(shapes, given[0].dtype))
        try:
            shapes = func(*_on_meta(args), **_on_meta(_placed(func, kwargs)))
        except NotImplementedError:  # the shape depends on numbers
            if not on_indices:
                raise
            return func(*args, **kwargs)
        if on_indices and all(t.dtype in INDEX_DTYPES for t in tensors_in(shapes)):
            return func(*args, **kwargs)
        if name in ("sort", "topk"):
            return type(shapes)((_empty(shapes[0]), self._chosen(shapes[1], given[0].shape[-1])))
        return tree_map(lambda t: _empty(t) if isinstance(t, Tensor) else t, shapes)

    def _chosen(self, places: Tensor, choices: int) -> Tensor:
        """Return distinct random places in each row, as sorting random numbers gives them."""
        drawn = torch.rand(*places.shape[:-1], choices, generator=self.generator)
        return drawn.argsort(-1)[..., : places.shape[-1]].contiguous()

    def kernel_ran(self, call: ops.Call) -> None:
        """Count a kernel, after experts are chosen for the tokens of one that would have chosen them."""
        if call.name == "feed_forward_step" and call.result[1].numel():
            _, indices, _, scores, counts = call.result
            indices.copy_(self._chosen(indices, scores.shape[1]))
            counts.copy_(torch.bincount(indices.flatten(), minlength=scores.shape[1]))
        elif call.name == "topk_keys":
            call.result.copy_(self._chosen(call.result, call.args[1].shape[1]))
        super().kernel_ran(call)
        changed = call.operands if call.result is None else []
        self._saw(ops.find(call.name), call.name, call.args, call.kwargs, call.result, call.operands, changed)

    def _torch_ran(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        super()._torch_ran(func, args, kwargs, out)
        read, changed = operands_of(func, args, kwargs)
        self._saw(func, str(func), args, kwargs, out, [*read, *changed], changed)

    def _saw(
        self,
        run: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        operands: Sequence[Tensor],
        changed: Sequence[Tensor],
    ) -> None:
        """Keep the last operation as a call to be made again, or count it where its like was seen."""

        def is_cold(t: Tensor) -> bool:
            size = size_of(t)
            return size >= LEAST_COLD and 2 * self.cold_parts.get(t.data_ptr(), 0) > size

        op = self.operations[-1]
        arguments, indices, places = described(args, kwargs, changed, is_cold)
        made = [t for t in tensors_in(out) if not any(t is each for each in changed)]
        call = Call(
            run=run,
            name=name,
            kind=op.kind,
            arguments=arguments,
            indices=indices,
            changed=places,
            flops=op.flops,
            moved=op.bytes,
            cold=op.cold,
            held=sum(size_of(t) for t in operands if is_cold(t)),
            cold_results=sum(size_of(t) for t in made if is_cold(t)),
        )
        first, number = self.calls.get(call.key, (call, 0))
        self.calls[call.key] = first, number + 1


def _returned(func: Any, changed: list[Tensor]) -> Any:
    """Return what an operation in place returns: nothing, or the tensors that it changed."""
    returns = func._schema.returns
    if not returns:
        return None
    return changed[0] if len(returns) == 1 and len(changed) == 1 else tuple(changed[: len(returns)])


def _placed(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords with the device that has shapes only, where an operation takes a device."""
    takes = any(argument.name == "device" for argument in func._schema.arguments)
    return {**kwargs, "device": META} if takes else kwargs


def _on_meta(values: Any) -> Any:
    return tree_map(lambda v: _meta(v) if isinstance(v, Tensor) else v, values)


def _meta(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype if dtype is not None and t.dtype not in INDEX_DTYPES else t.dtype
    return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=META)


def _empty(t: Tensor) -> Tensor:
    """Return memory of this shape that nobody touches; a mask is true everywhere, an index zero."""
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CPU)
    return made.fill_(t.dtype == torch.bool) if t.dtype in INDEX_DTYPES else made


def dry_count(make: Callable[[], Callable[[], object]], cache_bytes: int = 32 << 20) -> Dry:
    """Return the count of a step as `counted_twice` does, without running it."""
    with idle_kernels():
        return counted_twice(make, Dry(cache_bytes))


@contextmanager
def idle_kernels() -> Iterator[None]:
    """Let kernels on CPUs check their calls and make their results, but compute nothing."""
    try:
        idle = importlib.import_module("dsmini_kernels.cpu").without_running()
    except ImportError:  # there are none
        idle = nullcontext()
    with idle:
        yield
