"""Padding: targets that teach nothing, and rows of zeros that the experts multiply.

A target is left out of the loss where it is IGNORE (-100). Positions before the last target of a row that counts are
the context of it. Positions after it reach no loss, as attention is causal: their work is for nothing, and that share
is at fault where it is above 10 %. The stream of a pretraining has no such targets.

    row        t0   t1   -100  t3   -100  -100
    counts      x    x          x
    context                x
    for nothing                       x     x       2 of 6

Grouped products may also start each expert at a multiple of 64 rows (functional/experts.py), with padding in between.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from dsmini import ops
from dsmini.diagnosis.finding import Finding
from dsmini.functional.experts import row_alignment
from dsmini.nn import Experts, Transformer
from dsmini.nn.losses import IGNORE
from dsmini.numerics.dispatch import sort_by_expert

MUCH = 0.10
"""Share of positions whose work is for nothing that is worth an action."""
KERNEL = "trained_experts"
"""Kernel that multiplies each expert's own rows, without padding."""


def padding(targets: Sequence[Tensor]) -> Finding:
    """Return the share of targets [b, s] that teach nothing; a fault if too many stand after the last that does."""
    ignored = sum(int((y == IGNORE).sum()) for y in targets)
    after = sum(int(((y != IGNORE).flip(1).cumsum(1) == 0).sum()) for y in targets)
    n = sum(y.numel() for y in targets)
    value, useless = ignored / n, after / n
    is_fault = useless > MUCH
    words = f"{value:.1%} of the {n:,} targets looked at teach nothing"
    if ignored:
        words += f"; {useless:.1%} stand after the last one of their row that does, so that their work is for nothing"
    return Finding(
        axis="Algorithm",
        name="padding",
        value=value,
        unit="share of targets",
        low=value,
        high=value,
        is_fault=is_fault,
        sentence=f"{words}.",
        fix="Pack several documents into a row, or put rows of like length into a batch." if is_fault else "",
    )


class _Ran:
    """Names of the kernels that ran."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def kernel_ran(self, call: ops.Call) -> None:
        self.names.add(call.name)


def padded_rows(model: Transformer, tokens: Tensor) -> Finding | None:
    """Return the share of padding in the rows that experts multiply in training; None for a dense model.

    Args:
        tokens: [b, s] of a forward.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    if not experts:
        return None
    ran, visits, rows = _Ran(), 0, 0

    def count(_module: object, args: tuple[Any, ...], _out: object) -> None:
        nonlocal visits, rows
        x, indices, _, counts = args
        eager = KERNEL not in ran.names and ops.serving(tokens.device.type) != "reference"
        align = row_alignment(x, indices, counts) if eager else 1
        visits += indices.numel()
        rows += len(sort_by_expert(indices, counts, align).token)
        ran.names.clear()

    with ExitStack() as stack:
        for module in experts:
            stack.callback(module.register_forward_hook(count).remove)
        stack.enter_context(ops.counting(ran))
        states = model.states(tokens)  # with gradients on, which choose between kernel and grouped products
        model.mtp(tokens, states.given, model.embedded)
    share = 1 - visits / rows
    words = "none of them is padding"
    if rows > visits:
        words = f"{share:.1%} are padding between the experts, which repeats sizes so that products are prepared once"
    return Finding(
        axis="Algorithm",
        name="padded_rows",
        value=share,
        unit="share of rows",
        low=share,
        high=share,
        is_fault=False,
        sentence=f"Experts multiply {rows:,} rows for {visits:,} visits of tokens; {words}.",
    )
