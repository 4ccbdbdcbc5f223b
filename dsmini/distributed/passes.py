"""The forward and backward passes of a step, and the forward of a validation, through the whole model here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmini.nn import Transformer


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """This rank's part of a step's batch, and what its losses are made of."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None
    accumulate: int
    """Number of parts that it is cut into, one forward and backward each."""
    parts: float
    """Number that the losses are divided by: of such parts of the whole step, on all ranks."""
    phase: Callable[[str], None]
    """Told where a forward and a backward begin."""
    n_targets: Tensor
    """Mean number of targets of a part."""
    options: dict[str, Any]
    """Further options of Transformer.losses."""


class Passes:
    """The passes through a whole model in this process.

    Args:
        begin_part: called with the model, and True for the last part, before each forward.
    """

    def __init__(self, model: Transformer, compiled: bool, begin_part: Callable[[nn.Module, bool], None]) -> None:
        self.model, self.begin_part = model, begin_part
        self.losses = torch.compile(model.losses) if compiled else model.losses

    def train(self, batch: StepBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Add up the gradients of the mean loss over this rank's part of the batch.

        Return its shares of the means [main, mtp, balance, and each indexer's kl, recall, mass], and its loads
        [MoE layers, experts].
        """
        sums = torch.zeros((), device=device)
        counts: Tensor | None = None
        documents = [None] * batch.accumulate if batch.documents is None else batch.documents.chunk(batch.accumulate)
        chunks = (batch.tokens.chunk(batch.accumulate), batch.targets.chunk(batch.accumulate), documents)
        for number, (x, y, of) in enumerate(zip(*chunks, strict=True), 1):
            self.begin_part(self.model, number == batch.accumulate)
            batch.phase("forward")
            losses = self.losses(
                x.to(device),
                y.to(device),
                documents=None if of is None else of.to(device),
                n_targets=batch.n_targets,
                **batch.options,
            )
            batch.phase("backward")
            (losses.total / batch.parts).backward()
            fits = [figure for fit in losses.indexers for figure in fit]
            sums = sums + torch.stack([losses.main, losses.mtp, losses.balance, *fits]).detach() / batch.parts
            if losses.routing:
                load = torch.stack([routing.counts for routing in losses.routing])
                counts = load if counts is None else counts + load
        return sums, counts

    def own_counts(self, counts: Tensor) -> Tensor:
        """Return the rows of the loads of all MoE layers that belong to the gates on this rank, in their order."""
        return counts

    def score(self, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Return the sum of the cross-entropy of the first rows of tokens, which have targets."""
        hidden = self.model.hidden(tokens, documents=documents)
        return self.model.cross_entropy(hidden[: len(targets)].flatten(0, 1), targets.flatten())
