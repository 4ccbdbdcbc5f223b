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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
Marks = dict[str, tuple[int, int]]
"""A mark of each tensor of a module, by name."""

BLOCK = 1 << 16
"""Numbers of a tensor that one stream gives."""
SEVERAL = 4
"""Number of blocks from which threads share them."""
Drawn = dict[nn.Module, Marks | None]
"""The modules that a model in the making draws, with the marks of their first values; None: they have none yet."""
_drawn: ContextVar[Drawn | None] = ContextVar("drawn", default=None)
_at_once: ContextVar[bool] = ContextVar("at_once", default=True)
"""False while a model is made of which nobody sees a weight before its layers have names."""


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

    def fill_block(begin: int) -> None:
        stream = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, begin // BLOCK, 0]))
        values = torch.from_numpy(stream.standard_normal(min(BLOCK, end - begin), dtype=np.float32)).mul_(std)
        skipped = max(0, first - begin)
        flat[begin + skipped - first : begin + len(values) - first].copy_(values[skipped:])

    inferring = torch.is_inference_mode_enabled()  # a thread's own state

    def fill_in_thread(begin: int) -> None:
        with torch.inference_mode(inferring):
            fill_block(begin)

    begins = range(first - first % BLOCK, end, BLOCK)
    if len(begins) < SEVERAL:
        for begin in begins:
            fill_block(begin)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy draws outside of Python's lock
        list(pool.map(fill_in_thread, begins))


def _has_memory(tensor: Tensor) -> bool:
    """Return False for a tensor on the meta device, and for one of torch's FakeTensorMode."""
    return tensor.untyped_storage().device.type != "meta" if not hasattr(tensor, "device_mesh") else not tensor.is_meta


def _number(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


# --- by name


def draw_first(module: nn.Module) -> None:
    """Give a new module its first values. In a Transformer they are drawn by name, if they still are as here.

    A block that somebody else wrote may read them, and change them, so there they are drawn here too.
    """
    drawn = _drawn.get()
    if drawn is not None and not _at_once.get():
        drawn[module] = None
        return
    reset: Any = module.reset_parameters
    reset()
    if drawn is not None:
        drawn[module] = {name: _mark(tensor) for name, tensor in _own(module)}


def drawn_by_name(init: Callable[Concatenate[M, P], None]) -> Callable[Concatenate[M, P], None]:
    """Let the constructor of a model draw its layers by their names, but those that somebody changed meanwhile.

    A weight that an idea sets (in a subclass's constructor, in make_block) stays, and so does a module of another
    library. torch's generator gives one number, whatever the model is made of.
    """

    @functools.wraps(init)
    def made(model: M, *args: P.args, **options: P.kwargs) -> None:
        drawn: Drawn = {}
        before, token, when = torch.get_rng_state(), _drawn.set(drawn), _at_once.set("make_block" in options)
        try:
            init(model, *args, **options)
        finally:
            _drawn.reset(token)
            _at_once.reset(when)
        if any(_own(module) for module in drawn):
            torch.set_rng_state(before)
            reset_by_name(model, None, drawn)

    return made


@torch.no_grad()
def reset_by_name(model: nn.Module, generator: torch.Generator | None, drawn: Drawn | None = None) -> None:
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
            if module not in drawn:
                continue
            known, own = drawn[module], dict(_own(module))
            if known is not None:
                if any(known[key] != _mark(own[key]) for key in known.keys() & own.keys()):
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


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return what shows a change in place, and one of .data, which nobody counts: the sum of all bits, as integers."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    sums = flat[: flat.numel() // 8 * 8].view(torch.int64).sum() + flat[flat.numel() // 8 * 8 :].sum()
    return (0 if tensor.is_inference() else tensor._version), int(sums)
