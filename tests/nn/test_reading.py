"""Count the files and functions of dsmini that run in a training step and in generation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import dsmini
from dsmini import Transformer, ops

ROOT = Path(__file__).parents[2]
PACKAGES = (str(ROOT / "dsmini"), str(ROOT / "kernels"))
GENERATED = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<module>")


@contextmanager
def functions_that_run() -> Iterator[set[tuple[str, str]]]:
    """Yield the set of (file, function) of dsmini and kernels that are called inside, lambdas included."""
    seen: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGES) and code.co_name not in GENERATED:
            seen.add((code.co_filename, f"{code.co_qualname}:{code.co_firstlineno}"))

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def losses(model: Transformer) -> None:
    tokens = torch.zeros(1, 200, dtype=torch.int64)
    model.losses(tokens, tokens)


def generate(model: Transformer) -> None:
    dsmini.generate(model, torch.arange(16)[None], 4)


@pytest.mark.parametrize(
    ("call", "backend", "files", "functions"),
    [
        (losses, "reference", 11, 52),
        (losses, None, 22, 91),
        (generate, "reference", 16, 110),
        (generate, None, 25, 145),
    ],
)
def test_few_files_and_functions_run(
    call: Callable[[Transformer], None], backend: str | None, files: int, functions: int
) -> None:
    """Count those of the default model after a first call, which may compile kernels. pytest -rP prints them."""
    model = Transformer()
    with ops.use(backend):
        call(model)
        with functions_that_run() as seen:
            call(model)
    met = sorted({file for file, _ in seen})
    print(f"{call.__name__}, {backend or 'default'}: {len(met)} files, {len(seen)} functions")
    print(*(f"{Path(file).relative_to(ROOT)} {name}" for file, name in sorted(seen)), sep="\n")
    assert {"MLA.forward", "route"} <= {name.split(":")[0] for _, name in seen}
    assert len(met) <= files and len(seen) <= functions


def test_every_public_name_exists() -> None:
    for module in (dsmini, dsmini.nn, dsmini.numerics):
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
        assert len(set(module.__all__)) == len(module.__all__)
