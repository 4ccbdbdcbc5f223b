"""Enter the C++, or describe its calls without running them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.build import BuildError, library
from dsmini_kernels.cpu.structs import CALLS, LAYOUTS

SPAN = LAYOUTS["Span"].struct
MOST_THREADS = 256
GROUPS = 4
ERRORS = {
    1: "the call is malformed",
    2: "a size is negative, or a tile has none",
    3: "a stride is negative",
    GROUPS: "`ends` must not fall, and must end with the number of rows",
    5: "the tensors reach beyond their memory",
    6: "there is no memory left",
}
_runs: ContextVar[bool] = ContextVar("runs", default=True)
"""False inside `without_running`."""


def run(function: str, **fields: Any) -> None:
    """Call a function of a library with the fields of its struct in calls.h; inside `without_running` do nothing.

    Args:
        fields: all but `threads`, which is torch's number unless it is given. A tensor is an operand, of which the
            function gets a contiguous copy if it must; None is a null pointer. Results are the `span` of their memory.

    Raises: RuntimeError where it refuses; Unserved for groups of rows that do not cover them, and as `detached`.
    """
    held = list[Tensor]()
    for name, field in fields.items():
        if field is None:
            fields[name] = b""
        elif isinstance(field, Tensor):
            held.append(detached(field).contiguous())
            fields[name] = span(held[-1])
    fields.setdefault("threads", n_threads())
    enter(function, CALLS[function].pack_all(fields))


def enter(function: str, call: bytes) -> None:
    """Call a function with a packed call, as `run` does.

    Raises: Unserved, with a warning, where its library cannot be built.
    """
    loaded = library()
    try:
        entry = loaded.entries.get(function) or loaded.entry(function)
    except BuildError as error:  # after another library was built
        warnings.warn(f"dsmini's kernel {function} is out, plain PyTorch runs instead: {error}", stacklevel=2)
        raise Unserved(str(error)) from None
    if _runs.get() and (error := entry(call, len(call))):
        raise (Unserved if error == GROUPS else RuntimeError)(ERRORS[error])


def n_threads() -> int:
    """Return torch's number of threads, limited to the C++'s maximum."""
    return min(torch.get_num_threads(), MOST_THREADS)


def span(x: Tensor | None) -> bytes:
    """Return a Span: the address of a contiguous tensor, and the bytes from there on."""
    return b"" if x is None else SPAN.pack(x.data_ptr(), x.nbytes)


def strided(x: Tensor) -> bytes:
    """Return the Span of a tensor with gaps: the bytes up to the end of its last number."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return SPAN.pack(x.data_ptr(), (last + 1) * x.element_size() if x.numel() else 0)


def detached(x: Tensor) -> Tensor:
    """Return x as numbers in main memory.

    Raises: Unserved where that is not all that it is.
    """
    if not x.is_cpu or x.layout is not torch.strided:
        raise Unserved(f"a tensor on {x.device}")
    if torch.is_autocast_enabled("cpu"):
        raise Unserved("autocast, which changes dtypes")
    if x.requires_grad and torch.is_grad_enabled():
        raise Unserved("kernels have no gradients, and this tensor wants one")
    return x.resolve_neg()


def is_bf16(*tensors: Tensor) -> bool:
    """Return True for tensors in BF16, and False for tensors in FP32.

    Raises: Unserved for other dtypes, and several.
    """
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise Unserved(f"tensors in {', '.join(sorted(map(str, dtypes)))}")
    return torch.bfloat16 in dtypes


@contextmanager
def without_running() -> Iterator[None]:
    """Let calls inside the context be checked and described, and compute nothing: their results are not written."""
    token = _runs.set(False)
    try:
        yield
    finally:
        _runs.reset(token)
