"""Say which implementation of each operation runs on this machine, and why the others do not."""

import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from dsmini import ops
from dsmini.ops import BACKENDS, FOR_DEVICE, VARIABLE, Operation

ISA_VARIABLE = "DSMINI_CPU_ISA"
DECLARE = ("dsmini.nn", "dsmini.inference.fused", "dsmini.numerics.orthogonalize")
"""Modules that declare operations."""
RUNS = "runs"
REASONS = {
    RUNS: "this implementation serves a call",
    "gradient": "it serves a wanted gradient, torch.compile, and calls that the kernel does not serve",
    "on request": f"it serves under {VARIABLE}=reference, or `with dsmini.ops.use('reference')`",
    "forced away": f"{VARIABLE} or ops.use forces another backend",
    "not here": "the backend cannot run here, for the reason above",
    "raises": "the environment asks for what cannot run here: a call raises the reason above",
    "other device": "it serves tensors on another device",
    "no kernel": "the backend has none for this operation",
    "none": "there is no tuned version: the reference runs in its place",
}
"""Meaning of each cell of the table."""


def operations() -> dict[str, Operation[..., Any]]:
    """Return the operations of dsmini by name."""
    for module in DECLARE:
        importlib.import_module(module)
    return dict(sorted(Operation.declared.items()))


def rows(device: str) -> dict[str, dict[str, str]]:
    """Return for each operation what each backend does with a call on a device type, "cpu" or "cuda".

    The words are keys of REASONS, by the name of the backend.

    Raises: ValueError if DSMINI_BACKEND is unknown.
    """
    forced, found = ops.chosen(), {}
    for name, operation in operations().items():
        kernels = {backend: _kernel_cell(name, backend, device, forced) for backend in FOR_DEVICE.values()}
        plain = "gradient" if {RUNS, "raises"} & set(kernels.values()) else RUNS
        cells = (RUNS, "forced away") if forced == "reference" else ("on request", plain)
        if operation.plain is operation.reference:
            cells = (RUNS if forced == "reference" else plain, "none")
        found[name] = {"reference": cells[0], "eager": cells[1], **kernels}
    return found


def _kernel_cell(name: str, backend: str, device: str, forced: str | None) -> str:
    if name not in (ops._operations(backend) or ()):
        return "no kernel"
    if forced not in (None, backend):
        return "forced away"
    if forced is None and FOR_DEVICE.get(device) != backend:
        return "other device"
    kernels = _kernels(backend)
    if isinstance(kernels, ModuleType) and kernels.why_not(name) is None:
        return RUNS
    return "raises" if forced or isinstance(kernels, ValueError) else "not here"


def _kernels(backend: str) -> ModuleType | str | ValueError:
    """Return a backend's kernels, or the reason why there are none: an error if a call would raise it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is shown
            return ops._load(backend)
    except ValueError as error:  # a variable that asks for what is not here
        return error


def lines() -> Iterator[str]:
    """Yield the backends with their state, a table of the operations for each device, and what its cells mean."""
    try:
        forced = f"forced here: {ops.chosen() or 'nothing'}"
    except ValueError as error:
        yield f"{VARIABLE}: {error}"
        return
    yield f"{VARIABLE}: {os.environ.get(VARIABLE) or 'not set'}; {forced}"
    yield f"{ISA_VARIABLE}: {os.environ.get(ISA_VARIABLE) or 'not set'}"
    for backend in FOR_DEVICE.values():
        kernels = _kernels(backend)
        ready = isinstance(kernels, ModuleType)
        yield f"{backend}: " + (f"ready: {kernels.describe()}" if ready else f"not here: {kernels}")
    columns, met = [*reversed(BACKENDS)], set[str]()
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        isas = {name: instruction_set(name) for name in columns}
        table = [(f"tensors on {device}", *(f"{name} ({isa})" if isa else name for name, isa in isas.items()))]
        table += [(name, *(cells[backend] for backend in columns)) for name, cells in rows(device).items()]
        met |= {cell for row in table[1:] for cell in row[1:]}
        wide = [max(map(len, column)) for column in zip(*table, strict=True)]
        yield ""
        yield from ("  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in table)
    yield ""
    longest = max(map(len, met))
    yield from (f"{cell:{longest}}  {meaning}" for cell, meaning in REASONS.items() if cell in met)


def instruction_set(backend: str = "cpu") -> str:
    """Return the instruction set of a backend's kernels, such as "avx512"; "" if they cannot run here."""
    kernels = _kernels(backend) if backend in FOR_DEVICE.values() else None
    return kernels.describe().partition(",")[0] if isinstance(kernels, ModuleType) else ""
