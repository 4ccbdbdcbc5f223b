"""The losses of a training step: next token, multi-token prediction, expert balance, and those of indexers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.nn.dsa import IndexerLoss
from dsmini.nn.gate import Routing
from dsmini.numerics import at_least_fp32

IGNORE = -100
"""Target of a row that the loss leaves out, as in torch's cross_entropy."""


class Losses(NamedTuple):
    """Losses of a training step, FP32 scalars, and the decisions of the gates."""

    main: Float[Tensor, ""]
    """Mean cross-entropy of the next token, in nats."""
    mtp: Float[Tensor, ""]
    """Mean over depths of the multi-token prediction losses, without its weight; 0 without MTP."""
    balance: Float[Tensor, ""]
    """Sum over MoE layers of the sequence-wise balance losses, without their weight; 0 without MoE."""
    total: Float[Tensor, ""]
    """main + mtp_weight * mtp + balance_alpha * balance + the sum of indexers' kl: the loss to minimise."""
    routing: list[Routing]
    """One for each MoE layer, those of the MTP blocks last."""
    indexers: list[IndexerLoss]
    """One for each layer whose indexer learns, those of the MTP blocks last."""


@ops.operation("linear_cross_entropy")
def linear_cross_entropy(
    hidden: Float[Tensor, "n m"],
    weight: Float[Tensor, "v m"],
    targets: Int[Tensor, " n"],
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over rows of the cross-entropy of logits hidden @ weight^T, in nats, FP32.

    Rows with the target IGNORE are left out. The eager version has first derivatives only, and does not store all
    logits: with a vocabulary of 129280 those of one 4096-token sequence take 2.1 GB in FP32.

    Args:
        chunk_rows: rows of logits that exist at a time. None: about 16 MiB of them. The plain version holds all rows.
    """
    logits = at_least_fp32(hidden @ weight.to(hidden.dtype).T)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "n m"], targets: Int[Tensor, " n"], chunk_rows: int
) -> Float[Tensor, ""]:
    """Compute linear_cross_entropy of any head, a function from hidden states to logits.

    Backward computes the logits of each chunk again.
    """

    def chunk(h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(at_least_fp32(head(h)), target, ignore_index=IGNORE, reduction="sum")

    parts = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    return torch.stack([ops.recomputed(chunk, h, target) for h, target in parts]).sum()
