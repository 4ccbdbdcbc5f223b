"""Sections: which part of a step runs now, told by hooks, forward and backward.

    attention            Block.attn, of multi-token prediction too
    feed-forward         Block.ffn: experts with their gate, or one feed-forward
    head and losses      the cross-entropies, with the product of the head
    optimizer            the steps of the optimizers; clipping is left out

A module's backward starts when the gradient of its output is there, and ends with that of its input: no other module
reads this input, so nothing else runs in between. Norms, residuals, the embedding and the balance loss are in none.

The same hooks run in a step of which nothing is computed (dry.py). There a section is the operations between two marks,
and a mark is an operation that no model has.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dsmini.diagnosis.evidence.evidence import patched
from dsmini.measure.counting import CountedOperation
from dsmini.measure.dry import dry_count
from dsmini.measure.step_rates import Rates
from dsmini.measure.workloads import StepShape, random_tokens
from dsmini.nn import Block, Routing, Transformer
from dsmini.training.optim import optimizers

MODULES = ("attention", "feed-forward", "head and losses", "optimizer")
PHASES = ("forward", "backward", "update")
MARK = "digamma"
"""Operation that marks places of a dry step. Its size says which."""


class SectionClock:
    """Seconds spent in each section."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """Begin a section."""
        self._since[name] = time.perf_counter()

    def leave(self, name: str) -> None:
        """End it; an end without a beginning counts nothing."""
        since = self._since.pop(name, None)
        if since is not None:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


Told = Callable[[str], None]


@contextmanager
def watched(model: Transformer, moving: Sequence[Optimizer], enter: Told, leave: Told) -> Iterator[None]:
    """Tell when a step of a model enters and leaves each of MODULES, until the context ends."""
    with ExitStack() as stack:
        for block in [m for m in model.modules() if isinstance(m, Block)]:
            for module, name in ((block.attn, "attention"), (block.ffn, "feed-forward")):
                for handle in _hooked(module, name, enter, leave):
                    stack.callback(handle.remove)
        head = _around(model.cross_entropy, "head and losses", enter, leave)
        stack.enter_context(patched(model, "cross_entropy", head))
        for optimizer in moving:
            stack.enter_context(patched(optimizer, "step", _around(optimizer.step, "optimizer", enter, leave)))
        yield


def _hooked(module: torch.nn.Module, name: str, enter: Told, leave: Told) -> Iterator[Any]:
    """Yield the handles of the hooks around a module."""

    def before(_module: object, args: tuple[Any, ...]) -> None:
        enter(name)
        _at_gradient(args[0], name, leave)

    def after(_module: object, _args: object, out: Any) -> None:
        leave(name)
        _at_gradient(out[0] if isinstance(out, tuple) else out, name, enter)

    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after)


def _around(run: Callable[..., Any], name: str, enter: Told, leave: Told) -> Callable[..., Any]:
    """Return a function that runs another as a section; its first argument and its result have the gradients."""

    def section(*args: Any, **kwargs: Any) -> Any:
        if args:
            _at_gradient(args[0], name, leave)
        enter(name)
        out = run(*args, **kwargs)
        leave(name)
        _at_gradient(out, name, enter)
        return out

    return section


def _at_gradient(x: Any, name: str, told: Told) -> None:
    if isinstance(x, Tensor) and x.requires_grad:
        x.register_hook(lambda _gradient: told(name))


def predicted_sections(shape: StepShape, rates: Rates) -> dict[str, float]:
    """Return the predicted seconds of MODULES and of PHASES in a step of training."""
    names = (*MODULES, *PHASES)
    with ExitStack() as stack:

        def enter(name: str) -> None:
            torch.digamma(torch.empty(1 + 2 * names.index(name)))

        def leave(name: str) -> None:
            torch.digamma(torch.empty(2 + 2 * names.index(name)))

        counted = dry_count(lambda: _step(shape, stack, enter, leave), rates.roofs.cache_bytes)
    parts = between_marks(counted.operations, names)
    views = counted.views / max(1, len(counted.operations))
    step_rates = rates.steps[f"{shape.work} {shape.dtype}"]
    return {n: sum(step_rates.seconds(ops, round(views * len(ops)), rates.roofs).values()) for n, ops in parts.items()}


def between_marks(operations: Sequence[CountedOperation], names: Sequence[str]) -> dict[str, list[CountedOperation]]:
    """Return the operations of each section. Sections may lie inside others."""
    found: dict[str, list[CountedOperation]] = {name: [] for name in names}
    inside: set[str] = set()
    for op in operations:
        if op.name == MARK:
            place, leaves = divmod(op.shape[0][0] - 1, 2)
            (inside.discard if leaves else inside.add)(names[place])
        else:
            for name in inside:
                found[name].append(op)
    return found


def _step(shape: StepShape, stack: ExitStack, enter: Told, leave: Told) -> Callable[[], list[Routing]]:
    """Return a step of training that tells its sections and its phases."""
    c, train = shape.config, shape.train
    compute = torch.float32 if shape.dtype == "float32" else torch.bfloat16
    model = Transformer(c, compute_dtype=compute)
    moving = optimizers(model, train, compute)
    stack.enter_context(watched(model, moving, enter, leave))
    text = random_tokens(c, shape.batch, shape.tokens + 1, torch.device("cpu"))

    def step() -> list[Routing]:
        for part in text.chunk(train.grad_accum):
            enter("forward")
            losses = model.losses(part[:, :-1], part[:, 1:], recompute=train.recompute)
            leave("forward")
            enter("backward")
            (losses.total / train.grad_accum).backward()
            leave("backward")
        enter("update")
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip, foreach=True)
        for optimizer in moving:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        leave("update")
        return []

    return step
