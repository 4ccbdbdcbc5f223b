"""The one door to fast kernels.

An operation with a fast version is declared where its idea lives, on its plain reference:

    @ops.door("quantize")
    def quantize_tiles(x, ...): ...

When it is called, the door asks `dsmini_kernels.<backend>` for a function of that name and the same arguments: `cpu`
(C++, compiled on first use) for tensors in main memory, `triton` for those on a GPU. Where there is no backend, or it
does not serve the call, the reference runs. Nothing is chosen before a call, and what is chosen changes no bit.

Kernels are forward primitives on detached tensors. Autograd lives above the door and remembers its backend for the
backward pass, which may run in another thread: `backend = ops.chosen()`, later `with ops.use(backend)`.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton")
FOR_DEVICE = {"cpu": "cpu", "cuda": "triton"}
VARIABLE = "DSMINI_BACKEND"
P = ParamSpec("P")
R = TypeVar("R")

_chosen: ContextVar[str | None] = ContextVar("chosen", default=None)


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Force a backend inside the context; None lets each call choose again, by its device.

    Raises: ValueError for an unknown backend; and the operations inside, where the backend cannot serve them.
    """
    if torch.compiler.is_compiling():  # the reference is what is compiled
        yield
        return
    _check(backend, "backend")
    token = _chosen.set(backend or "auto")
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str | None:
    """The backend that is forced here, by `use` or else by DSMINI_BACKEND; None if each call chooses. While torch
    compiles it is the reference."""
    if torch.compiler.is_compiling():
        return "reference"
    backend = _chosen.get() or os.environ.get(VARIABLE) or "auto"
    _check(backend, VARIABLE)
    return None if backend == "auto" else backend


def door(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let the fast versions called `name` stand in for the decorated reference, whose first argument is a tensor."""

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return reference(*args, **kwargs)
            forced = chosen()
            tensor = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
            if forced == "reference" or _is_watched(tensor):
                return reference(*args, **kwargs)
            backend = forced or FOR_DEVICE.get(tensor.device.type)
            kernels = None if backend is None else _load(backend)
            if not isinstance(kernels, ModuleType):
                if forced is not None:
                    raise ValueError(_cannot(forced, name, str(kernels)))
                return reference(*args, **kwargs)
            try:
                return getattr(kernels, name)(*args, **kwargs)
            except kernels.Unserved as reason:
                if forced is not None:
                    raise ValueError(_cannot(forced, name, str(reason))) from None
                return reference(*args, **kwargs)

        return call

    return decorate


def serving(device: str) -> str:
    """The backend that serves tensors on such a device here and now, or "reference"."""
    forced = chosen()
    backend = forced or FOR_DEVICE.get(device)
    served = backend not in (None, "reference") and isinstance(_load(str(backend)), ModuleType)
    return str(backend) if served else "reference"


def explain() -> str:
    """What would run for tensors on each device, and why; printed and returned."""
    try:
        forced = f"forced here: {chosen() or 'nothing'}"
    except ValueError as error:
        forced = f"{error}"
    lines = [f"{VARIABLE}: {os.environ.get(VARIABLE, 'not set')}; {forced}"]
    lines.append("reference: plain PyTorch, serves everything")
    for device, backend in FOR_DEVICE.items():
        try:
            kernels = _load(backend)
        except ValueError as error:  # a variable that asks for what is not here
            kernels = f"{error}"
        what = f"{backend}, for tensors on {device}: "
        if isinstance(kernels, ModuleType):
            lines.append(f"{what}{', '.join(kernels.OPERATIONS)}; {kernels.describe()}")
        else:
            lines.append(f"{what}nothing, the reference serves instead: {kernels}")
    text = "\n".join(lines)
    print(text)
    return text


@functools.cache
def _load(backend: str) -> ModuleType | str:
    """The backend's kernels, ready to run, or why there are none. Looked for once; a failure is reported once."""
    try:
        kernels = importlib.import_module(f"dsmini_kernels.{backend}")
    except ImportError as error:
        return f"{error}"
    reason = kernels.why_not()
    if reason is None:
        return kernels
    if kernels.expected():
        warnings.warn(f"dsmini's {backend} kernels are out, plain PyTorch runs instead: {reason}", stacklevel=4)
    return reason


def _is_watched(tensor: Tensor) -> bool:
    """Whether torch looks on: fake tensors, subclasses, dispatch modes and function transforms see no foreign code."""
    return (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    )


def _check(backend: Any, what: str) -> None:
    if backend not in (*BACKENDS, "auto", None):
        raise ValueError(f"{what}={backend!r} is unknown; use one of {', '.join(BACKENDS)}, or auto")


def _cannot(backend: str, name: str, reason: str) -> str:
    return f"backend {backend!r} is forced and cannot run {name}: {reason}; use another, or 'auto'"
