"""Choose the implementation that runs an operation.

An operation is declared once, on its plain version, the equation, in the file of the idea it belongs to:

    @ops.operation("rms_norm")
    def rms_norm(x, weight, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

A faster version is found by the operation's name, wherever it is written:

    @ops.eager("rms_norm")
    def rms_norm_eager(x, weight, eps): ...          # the same, fast in plain PyTorch

A call then runs the first of these that can serve it:

    cpu, triton   the kernel of that name in dsmini_kernels.cpu (tensors in main memory) or dsmini_kernels.triton (GPU)
    eager         the tuned PyTorch version, or the plain one if there is none
    reference     the plain version, only on request: DSMINI_BACKEND=reference, or `with ops.use("reference")`

Each call chooses again. Kernels compute no gradients. So PyTorch code runs a call whose gradient is wanted, and a call
under torch.compile, fake tensors or a dispatch mode. Under torch.func and torch.export a version runs whose shapes
depend on shapes alone, mostly the plain one. An autograd function calls operations with gradients off, in forward and
in backward: kernels can serve them. It stores the backend of the forward for backward: `backend = ops.chosen()`, later
`with ops.use(backend)`.

PyTorch cannot see into a kernel, so a counter (`ops.counting`) is told of each call that a kernel served.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ClassVar, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

BACKENDS = ("reference", "eager", "cpu", "triton")
FOR_DEVICE = {"cpu": "cpu", "cuda": "triton"}
VARIABLE = "DSMINI_BACKEND"
SECOND_DERIVATIVE = (
    "create_graph=True wants second derivatives, and fast versions have first ones only; run the forward in "
    "`with dsmini.ops.use('reference')`, in any precision but fp8"
)
P = ParamSpec("P")
R = TypeVar("R")


class Call(NamedTuple):
    """A call that a kernel served."""

    name: str
    """Name of the operation."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def operands(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [t for argument in (*self.args, *self.kwargs.values()) for t in tensors_of(argument)]


class Counter(Protocol):
    """Receiver of the work of kernels, such as `Count` of dsmini.measure."""

    def kernel_ran(self, call: Call) -> None: ...


_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
"""Return the innermost transform of torch.func, or None. torch.compile cannot trace the call."""
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
_chosen: ContextVar[str | None] = ContextVar("chosen", default=None)
_counter: ContextVar[Counter | None] = ContextVar("counter", default=None)


class Operation(Generic[P, R]):
    """An operation with several implementations. Call it like its plain version; make it with `operation`."""

    fast: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {}
    """Versions by attribute, "plain" or "static", and by name. They may come before their operation."""
    declared: ClassVar[dict[str, "Operation[..., Any]"]] = {}
    """All operations by name."""

    def __init__(self, name: str, reference: Callable[P, R]) -> None:
        if name in self.declared:
            other = self.declared[name].reference.__module__
            raise ValueError(f"{reference.__module__} declares the operation {name!r} again; it is that of {other}")
        functools.update_wrapper(self, reference)
        self.name: str = name
        self.reference: Callable[P, R] = reference
        self.plain: Callable[P, R] = self.fast.get(("plain", name), reference)
        """Version in PyTorch that runs where no kernel does."""
        self.static: Callable[P, R] = self.fast.get(("static", name), reference)
        """Version for torch.func and torch.export, whose shapes depend on shapes alone."""
        self.declared[name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # cheap checks first: decoding one token calls hundreds of operations, each a few microseconds long
        if torch.compiler.is_compiling():
            return self.static(*args, **kwargs) if torch.compiler.is_exporting() else self.plain(*args, **kwargs)
        if _transform() is not None:  # torch.func refuses the autograd functions of eager versions
            return self.static(*args, **kwargs)
        forced = _chosen.get() or os.environ.get(VARIABLE) or "auto"
        if forced == "reference":
            return self.reference(*args, **kwargs)
        if forced == "eager":
            return self.plain(*args, **kwargs)
        first: Any = args[0] if args else next(x for x in kwargs.values() if hasattr(x, "device"))
        backend = FOR_DEVICE.get(first.device.type) if forced == "auto" else forced
        names = () if backend is None else _operations(backend)
        if backend is None or (names is not None and self.name not in names):
            return self.plain(*args, **kwargs)
        return self._try_kernel(backend, *args, **kwargs)

    def _try_kernel(self, backend: str, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the backend's kernel for this call, or PyTorch code where it cannot serve the call."""
        every = (*args, *kwargs.values())
        if _is_watched(every[0] if isinstance(every[0], Tensor) else next(t for a in every for t in tensors_of(a))):
            return self.plain(*args, **kwargs)
        # asked before kernels are loaded, which may compile them
        if torch.is_grad_enabled() and any(t.requires_grad for a in every for t in tensors_of(a)):
            return self.plain(*args, **kwargs)
        kernels = _load(backend)
        reason = kernels
        if isinstance(kernels, ModuleType):
            kernel = getattr(kernels, self.name)
            try:
                return kernel(*args, **kwargs) if _counter.get() is None else self._counted(kernel, args, kwargs)
            except kernels.Unserved as error:
                reason = str(error)
        if reason and chosen() is not None:
            raise ValueError(
                f"backend {chosen()!r} is forced and cannot run {self.name}: {reason}; use another, or 'auto'"
            )
        return self.plain(*args, **kwargs)

    def _counted(self, kernel: Callable[P, R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        """Run a kernel and report it to the counter."""
        with torch._C._DisableTorchDispatch():  # a counter's own work is not the call's
            result = kernel(*args, **kwargs)
            cast(Counter, _counter.get()).kernel_ran(Call(self.name, args, kwargs, result))
        return result


def operation(name: str) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Declare an operation on its plain version. A kernel of that name takes the same arguments."""
    return functools.partial(Operation, name)


def eager(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare the tuned PyTorch version of the operation of that name."""
    return functools.partial(_declare, "plain", name)


def for_transforms(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare the version for torch.func and torch.export of the operation of that name."""
    return functools.partial(_declare, "static", name)


def _declare(kind: str, name: str, version: Callable[P, R]) -> Callable[P, R]:
    Operation.fast[kind, name] = version
    if name in Operation.declared:
        setattr(Operation.declared[name], kind, version)
    return version


def find(name: str) -> Operation[..., Any]:
    """Return the operation of that name."""
    return Operation.declared[name]


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Force a backend inside the context. None lets each call choose by the device of its tensors.

    An operation without a kernel in that backend runs its eager version.

    Raises: ValueError for an unknown backend. Operations inside raise it where the backend has a kernel that cannot
        serve the call.
    """
    if torch.compiler.is_compiling():  # the eager version is what is compiled
        yield
        return
    _check(backend, "backend")
    token = _chosen.set(backend or "auto")
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str | None:
    """Return the backend that `use` or DSMINI_BACKEND forces, or None if each call chooses.

    While torch compiles it is "eager".
    """
    if torch.compiler.is_compiling():
        return "eager"
    backend = _chosen.get() or os.environ.get(VARIABLE) or "auto"
    if backend == "auto":
        return None
    _check(backend, VARIABLE)
    return backend


def check_forced() -> None:
    """Raise ValueError if DSMINI_BACKEND names a backend that is unknown, or that cannot run on this machine."""
    backend = chosen()
    reason = _load(backend) if backend in FOR_DEVICE.values() else None
    if isinstance(reason, str):
        raise ValueError(f"{VARIABLE}={backend} cannot run here: {reason}; use another, or auto")


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Report each kernel that runs inside the context to `counter`."""
    token = _counter.set(counter)
    try:
        yield
    finally:
        _counter.reset(token)


def is_counting() -> bool:
    """Return True inside `counting`."""
    return _counter.get() is not None


def serving(device: str) -> str:
    """Return the backend whose kernels serve tensors on this device type now, else "reference" or "eager"."""
    forced = chosen()
    if forced in ("reference", "eager"):
        return forced
    backend = forced or FOR_DEVICE.get(device)
    return backend if backend is not None and isinstance(_load(backend), ModuleType) else "eager"


def serves(name: str, tensor: Tensor) -> bool:
    """Return True where a call of the operation with this tensor, gradients off, would be given to a kernel now.

    That kernel's library is compiled now if it has to be.
    """
    if torch.compiler.is_compiling() or _transform() is not None or _is_watched(tensor):
        return False
    backend = serving(tensor.device.type)
    return backend in FOR_DEVICE.values() and name in (_operations(backend) or ()) and _without(name, backend) is None


def explain() -> str:
    """Print and return which backend would run each operation on this machine, and why no kernel does.

    The first lines say what is forced and which backends are ready. Then a table has a row for each operation that an
    imported module declares: `import dsmini.nn` first. `python -m dsmini.explain` prints it for all of dsmini.
    """
    from dsmini.ops.explanation import lines

    text = "\n".join(lines())
    print(text)
    return text


def prepare() -> str:
    """Compile all kernels for this machine now; print and return which backends are ready, and why one is not.

    Otherwise the first call that wants a kernel compiles its library, which takes seconds. The compiler's progress goes
    to the standard error. Once compiled, kernels are found in a cache, by later processes too.
    """
    text = "\n".join(importlib.import_module("dsmini.ops.explanation").backends())
    print(text)
    return text


def expect(device: str, *names: str) -> None:
    """Say which operations this process will want on a device type: one run of the compiler then makes them all."""
    backend = FOR_DEVICE.get(device)
    if backend is not None and _operations(backend) is not None:
        importlib.import_module(f"dsmini_kernels.{backend}").expect(*names)


@functools.cache
def _operations(backend: str) -> tuple[str, ...] | None:
    """Return the names of a backend's operations, even if it cannot run here, or None if there is no such backend."""
    try:
        return importlib.import_module(f"dsmini_kernels.{backend}").OPERATIONS
    except ImportError:
        return None


@functools.cache
def _load(backend: str) -> ModuleType | str:
    """Return the backend's kernels, ready to run, or the reason why there are none. Warn of a failure once."""
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


def _without(name: str, backend: str) -> str | None:
    """Return why a backend has no kernel of an operation ready, or None if it has."""
    kernels = _load(backend)
    return kernels.why_not(name) if isinstance(kernels, ModuleType) else kernels


def tensors_of(argument: Any) -> Sequence[Tensor]:
    """Return the tensors of an argument: itself, or the parts of a quantized tensor."""
    return (argument,) if isinstance(argument, Tensor) else getattr(argument, "tensors", ())


def can_read_values(tensor: Tensor) -> bool:
    """Return True where a check may look at a tensor's numbers without a wait: in eager mode on a CPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and _transform() is None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which torch.autocast leaves the dtypes of products alone."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # torch knows no autocast of meta
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward run without a graph, and refuse create_graph=True.

    torch's decorator refuses later, in the second backward, and not in all cases: torch.autograd.grad leaves out the
    node that would raise. The second derivative is then wrong.
    """
    traced = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError(SECOND_DERIVATIVE)
        return traced(ctx, *grads)

    return wrapper


class _Trained(torch.autograd.Function):
    """The result of a forward, with the gradients of its own backward. First derivatives only."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Any], gradients: Callable[..., Any], *inputs: Tensor) -> Tensor:
        y, saved = forward(*inputs)
        ctx.save_for_backward(*saved)
        ctx.gradients, ctx.backend = gradients, chosen()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with use(ctx.backend), without_autocast(grad):
            return None, None, *ctx.gradients(grad, *ctx.saved_tensors)


def trained(
    forward: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]],
    gradients: Callable[..., Sequence[Tensor | None]],
    *inputs: Tensor,
) -> Tensor:
    """Return the result of forward(*inputs), with gradients by a backward of its own. First derivatives only.

    Both run with gradients off, so that kernels serve them, and backward on forward's backend, outside of autocast.

    Args:
        forward: returns the result, and the tensors that backward reads.
        gradients: returns a gradient of each input, given that of the result and those tensors.
    """
    return cast(Tensor, _Trained.apply(forward, gradients, *inputs))


def recomputed(run: Callable[..., Any], *args: Any) -> Any:
    """Return run(*args). Its inputs alone are saved; backward runs it again, on the backend of the forward.

    Backward begins at the same state of the generators, and draws the same noise.
    """
    if torch.compiler.is_compiling():
        return checkpoint(run, *args, use_reentrant=False)
    backend = chosen()

    def on_the_same_backend(*inputs: Any) -> Any:
        with use(backend):
            return run(*inputs)

    return checkpoint(on_the_same_backend, *args, use_reentrant=False)


def _is_watched(tensor: Tensor) -> bool:
    """Return True where torch must see each of its own operations, so that no kernel may run.

    That holds for fake tensors, tensor subclasses, dispatch modes, traces of torch.jit and derivatives in forward mode.
    A counter is a dispatch mode too, but kernels are reported to it.
    """
    modes = torch._C._len_torch_dispatch_stack()
    if torch._C._is_tracing():  # a trace would keep the new memory of a result, and nothing that fills it
        return True
    if forward_ad._current_level >= 0:  # a dual tensor has a tangent, which kernels do not see
        return True
    if _is_batched(tensor):  # is_grads_batched=True
        return True
    return type(tensor) not in (Tensor, torch.nn.Parameter) or modes > (_counter.get() is not None)


def _check(backend: Any, what: str) -> None:
    if backend not in (*BACKENDS, "auto", None):
        raise ValueError(f"{what}={backend!r} is unknown; use one of {', '.join(BACKENDS)}, or auto")
