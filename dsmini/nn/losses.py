"""The losses of a training step: next token, multi-token prediction, expert balance, and those of indexers."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from dsmini.functional.indexer_loss import IndexerFit
from dsmini.nn.gate import Routing


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
    indexers: list[IndexerFit]
    """One for each layer whose indexer learns, those of the MTP blocks last."""
