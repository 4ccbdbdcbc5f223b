"""Pipeline parallelism: the parts of a step's batch pass through the stages on several ranks, one after the other.

torch.distributed.pipelining has the schedules and runs them. Each part's loss is divided once, by what the whole step
has of targets, so gradients are summed and never scaled. Its default, scale_grads=True, would divide a parameter twice
that two stages of one rank share.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules

from dsmini.config.parallel import ScheduleName
from dsmini.distributed.stages import ModelStage, StageLayout, StepBatch
from dsmini.nn import Transformer

SCHEDULES: dict[str, Any] = {
    "1f1b": schedules.Schedule1F1B,
    "interleaved1f1b": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


class Pipeline:
    """The passes through the stages of all ranks of a group, of which each makes one.

    Args:
        dtype: of hidden states.
    """

    def __init__(
        self, model: Transformer, layout: StageLayout, name: ScheduleName, group: dist.ProcessGroup, dtype: torch.dtype
    ) -> None:
        self.model, self.layout, self.name, self.group, self.dtype = model, layout, name, group, dtype
        self.rank = dist.get_rank(group)
        self.stages = {index: ModelStage(model, layout, index) for index in layout.stages(self.rank)}
        self._schedules: dict[tuple[int, ...], Any] = {}

    def train(self, batch: StepBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Add up the gradients of the mean loss over the batch, for the parameters of this rank.

        Return this rank's shares of the mean losses, and of the loads of all MoE layers.
        """
        for stage in self.stages.values():
            stage.begin(batch, device)
        named = {"tokens": batch.tokens, "targets": batch.targets, "documents": batch.documents}
        kwargs = {name: t.to(device) for name, t in named.items() if t is not None}
        schedule = self.schedule(batch.tokens.shape[0] // batch.accumulate, batch.tokens.shape[1], batch.accumulate)
        batch.phase("forward")
        args = (kwargs["tokens"],) if 0 in self.stages else ()
        schedule.step(*args, target=kwargs["targets"], return_outputs=False, **kwargs)
        batch.phase("backward")  # forwards and backwards take turns in a schedule
        for p in self.model.parameters():
            # a weight's backward of its own leaves views, whose strides the fused AdamW takes for those of p
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        return self._figures(device)

    def _figures(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return this rank's part of the losses and of the loads; those of all ranks add up to the whole."""
        last = self.stages.get(len(self.layout.layers) - 1)
        sums = torch.zeros(3, device=device) if last is None or last.sums is None else last.sums
        if not any(self.layout.moe):
            return sums, None
        counts = torch.zeros(sum(self.layout.moe), self.model.config.n_routed_experts, dtype=torch.int64, device=device)
        if own := [stage.counts for stage in self.stages.values() if stage.counts is not None]:
            counts[self.layout.rows(self.rank)] = torch.cat(own)
        return sums, counts

    def own_counts(self, counts: Tensor) -> Tensor:
        """Return the rows of the loads of all MoE layers that belong to the gates on this rank, in their order."""
        return counts[self.layout.rows(self.rank)]

    def score(self, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Return the sum of the cross-entropy of the first rows, which have targets; 0 without the last stage."""
        x, total = tokens, torch.zeros((), device=tokens.device)
        for index, stage in self.stages.items():
            if not stage.first and index - 1 not in self.stages:
                x = torch.empty(*tokens.shape, self.model.config.dim, dtype=self.dtype, device=tokens.device)
                dist.recv(x, self._global_rank(index - 1), group=self.group)
            x, _ = stage.hidden(x, documents)
            if stage.last:
                hidden = self.model.norm(x)
                total = self.model.cross_entropy(hidden[: len(targets)].flatten(0, 1), targets.flatten())
            elif index + 1 not in self.stages:
                dist.send(x.contiguous(), self._global_rank(index + 1), group=self.group)
        return total

    def _global_rank(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.layout.ranks[stage])

    def schedule(self, b: int, s: int, n: int) -> Any:
        """Return the schedule for n parts of b sequences of s tokens, the same one for the same numbers."""
        if (b, s, n) not in self._schedules:
            stages = [self._stage(index, b, s) for index in self.stages]
            kwargs: dict[str, Any] = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
            self._schedules[b, s, n] = SCHEDULES[self.name](stages[0] if self.name == "1f1b" else stages, n, **kwargs)
        return self._schedules[b, s, n]

    def _stage(self, index: int, b: int, s: int) -> PipelineStage:
        """Return torch's view of a stage. Shapes are given, so torch needs no forward to find them."""
        device = next(self.model.parameters()).device

        def between(stage: int) -> tuple[Tensor, ...]:
            x = torch.empty(b, s, self.model.config.dim, dtype=self.dtype, device="meta", requires_grad=True)
            n = self.layout.moe_before(stage)
            balances = torch.empty(n, device="meta", requires_grad=True)
            return (x, balances) if n else (x,)

        stage = self.stages[index]
        takes = (torch.empty(b, s, dtype=torch.int64, device="meta"),) if stage.first else between(index)
        gives = (torch.empty((), device="meta", requires_grad=True),) if stage.last else between(index + 1)
        made = PipelineStage(
            stage, index, len(self.layout.layers), device, input_args=takes, output_args=gives, group=self.group
        )
        if stage.last and len(self.model.mtp) > 1:
            # all depths read one embedding. torch's backward of its weight would pass through the blocks between them a
            # second time, so I is the whole backward here, and W is nothing
            made.dw_builder = lambda: lambda: None
        return made
