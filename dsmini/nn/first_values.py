"""First values: random numbers that follow from a seed, the name of a module in its model, and their place in a tensor.

    seed     one number of torch's generator, so torch.manual_seed decides: of a whole model, else of each tensor
    name     "layers.3.attn.wq_a"; a layer alone has none
    place    each block of BLOCK numbers of a tensor has a random stream of its own

So two models start with the same values wherever they share a name and a shape, whatever else they have and in whatever
order they are made. A process that holds some rows of a tensor, or some layers of a model, draws those alone. The
numbers are made on the CPU, in FP32, for every device and dtype.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox, whose streams are numbered).
"""

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
Marks = dict[str, int]
"""A hash of each tensor of a module, by name."""

BLOCK = 1 << 16
"""Numbers of a tensor that one stream gives."""
_drawn: ContextVar[dict[nn.Module, Marks] | None] = ContextVar("drawn", default=None)


def draw_normal(weight: Tensor, std: float, generator: torch.Generator | None, first_row: int = 0) -> None:
    """Draw the rows of a weight that are here from a normal distribution. Without memory there is nothing to draw.

    Args:
        generator: one number of it is the seed; None: of torch's own.
        first_row: number of the weight's first row, of all rows that processes share.
    """
    if not _has_memory(weight):
        return
    seed, row = _number(generator), math.prod(weight.shape[1:])
    if not hasattr(weight, "device_mesh"):
        _fill(weight, std, seed, first_row * row)
        return
    divided: Any = weight  # over processes: a DTensor, as FSDP2 makes it
    here = divided.to_local()
    for part in divided.__create_chunk_list__():
        if part.sizes[1:] == weight.shape[1:]:
            _fill(here, std, seed, (first_row + part.offsets[0]) * row)
        else:  # not by rows
            _fill(whole := torch.empty(weight.shape), std, seed, first_row * row)
            spans = zip(part.offsets, part.sizes, strict=True)
            here.detach().copy_(whole[tuple(slice(first, first + size) for first, size in spans)])


def _fill(rows: Tensor, std: float, seed: int, first: int) -> None:
    """Fill rows with numbers of a tensor from its number `first` on."""
    flat = rows.detach().view(-1)
    if std == 0:
        flat.zero_()
        return
    end = first + flat.numel()
    for begin in range(first - first % BLOCK, end, BLOCK):
        stream = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, begin // BLOCK, 0]))
        values = torch.from_numpy(stream.standard_normal(min(BLOCK, end - begin), dtype=np.float32)).mul_(std)
        skipped = max(0, first - begin)
        flat[begin + skipped - first : begin + len(values) - first].copy_(values[skipped:])


def _has_memory(tensor: Tensor) -> bool:
    """Return False for a tensor on the meta device, and for one of torch's FakeTensorMode."""
    return tensor.untyped_storage().device.type != "meta" if not hasattr(tensor, "device_mesh") else not tensor.is_meta


def _number(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


# --- by name


def draw_first(module: nn.Module) -> None:
    """Give a new module its first values. In a Transformer they are drawn again by name, if they still are as here."""
    reset: Any = module.reset_parameters
    reset()
    drawn = _drawn.get()
    if drawn is not None:
        drawn[module] = {name: _mark(tensor) for name, tensor in _own(module)}


def drawn_by_name(init: Callable[Concatenate[M, P], None]) -> Callable[Concatenate[M, P], None]:
    """Let the constructor of a model draw its layers by their names, but those that somebody changed meanwhile.

    A weight that an idea sets (in a subclass's constructor, in make_block) stays, and so does a module of another
    library. torch's generator gives one number, whatever the model is made of.
    """

    @functools.wraps(init)
    def made(model: M, *args: P.args, **options: P.kwargs) -> None:
        before, token = torch.get_rng_state(), _drawn.set({})
        try:
            init(model, *args, **options)
            drawn = _drawn.get() or {}
        finally:
            _drawn.reset(token)
        if any(drawn.values()):
            torch.set_rng_state(before)
            reset_by_name(model, None, drawn)

    return made


@torch.no_grad()
def reset_by_name(
    model: nn.Module, generator: torch.Generator | None, drawn: dict[nn.Module, Marks] | None = None
) -> None:
    """Reset each module of a model by its name, those of other libraries too.

    Args:
        drawn: modules that draw_first drew, and the marks of their tensors. Others, and those whose marks are others
            now, stay as they are. None: all are reset.
    """
    seed = _number(generator)
    for name, module in model.named_modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if module is model or not callable(reset):
            continue
        added: list[tuple[Tensor, Tensor]] = []
        if drawn is not None:
            known, own = drawn.get(module, {}), dict(_own(module))
            if not known or any(known[key] != _mark(own[key]) for key in known.keys() & own.keys()):
                continue
            added = [(own[key], own[key].clone()) for key in own.keys() - known.keys()]
        with _seeded(seed, name):
            reset()
        for tensor, value in added:  # by a subclass
            tensor.copy_(value)


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Let torch's generator of the CPU start from a seed and a name in the block."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big"))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, t) for name, t in own if _has_memory(t)]


def _mark(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
