"""Say which backend runs each operation on this machine, and why no kernel does."""

import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from dsmini import ops
from dsmini.ops import FOR_DEVICE, VARIABLE, Operation

ISA_VARIABLE = "DSMINI_CPU_ISA"


class Choice(NamedTuple):
    """The backend of a call, and the reason, in a few words, if it is not a kernel."""

    backend: str
    why: str = ""


def choices(device: str) -> dict[str, Choice]:
    """Return for each declared operation the backend of a call without gradients on a device type, "cpu" or "cuda".

    Raises: ValueError if DSMINI_BACKEND is unknown.
    """
    forced = ops.chosen()
    return {name: _choice(operation, device, forced) for name, operation in sorted(Operation.declared.items())}


def _choice(operation: Operation[..., object], device: str, forced: str | None) -> Choice:
    if forced == "reference":
        return Choice("reference", "forced")
    plain = "reference" if operation.plain is operation.reference else "eager"
    backend = forced or FOR_DEVICE.get(device)
    if forced == "eager":
        return Choice(plain, "forced" if plain == "eager" else "no eager version")
    if backend is None or operation.name not in (ops._operations(backend) or ()):
        return Choice(plain, f"no {backend} kernel" if backend else f"no kernels for {device}")
    kernels = _kernels(backend)
    reason = kernels.why_not(operation.name) if isinstance(kernels, ModuleType) else f"{backend} is not here"
    if reason is None:
        return Choice(backend)
    raises = forced or isinstance(kernels, ValueError)
    return Choice("none", f"a call raises: {reason}") if raises else Choice(plain, reason)


def _kernels(backend: str) -> ModuleType | str | ValueError:
    """Return a backend's kernels, or the reason why there are none: an error if a call would raise it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is shown
            return ops._load(backend)
    except ValueError as error:  # a variable that asks for what is not here
        return error


def backends() -> Iterator[str]:
    """Compile all kernels that this machine can run, and yield a line for each backend: ready, or why not."""
    for backend in FOR_DEVICE.values():
        kernels = _kernels(backend)
        if isinstance(kernels, ModuleType):
            missing = [f"; none for {part}: {reason}" for part, reason in kernels.prepare().items() if reason]
            yield f"{backend}: ready: {kernels.describe()}{''.join(missing)}"
        else:
            yield f"{backend}: not here: {kernels}"


def lines() -> Iterator[str]:
    """Yield the backends with their state, and a table of the operations for each device."""
    try:
        forced = f"forced here: {ops.chosen() or 'nothing'}"
    except ValueError as error:
        yield f"{VARIABLE}: {error}"
        return
    yield f"{VARIABLE}: {os.environ.get(VARIABLE) or 'not set'}; {forced}"
    yield f"{ISA_VARIABLE}: {os.environ.get(ISA_VARIABLE) or 'not set'}"
    yield from backends()
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        table = [("operation", f"on {device}", "why"), *((name, *choice) for name, choice in choices(device).items())]
        wide = [max(map(len, column)) for column in zip(*table, strict=True)]
        yield ""
        yield from ("  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in table)
    yield ""
    yield "Calls that want a gradient, run under torch.compile, or that a kernel does not serve run in PyTorch:"
    yield "eager, which is tuned, where there is such a version, else reference, the equation. Steps of decoding run"
    yield "as modules where a block has more than the kernels know, such as hooks or FP4 outside of experts:"
    yield "dsmini.inference.fused.Decoder(model).why names it."


def instruction_set(backend: str = "cpu") -> str:
    """Return the instruction set of a backend's kernels, such as "avx512"; "" if they cannot run here."""
    kernels = _kernels(backend)
    return kernels.describe().partition(",")[0] if isinstance(kernels, ModuleType) else ""
