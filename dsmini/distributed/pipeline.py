"""Pipeline parallelism: the parts of a step's batch pass through the stages on several ranks, one after the other.

A stage has consecutive layers of a model, the embedding with the first, norm, head and MTP the last.

    1f1b                            rank r has stage r
    interleaved1f1b, zero_bubble    rank r has stages r and pp + r
    zbv, dualpipev                  rank r has stages r and 2 pp - 1 - r, so the first rank has both ends

Stages are cut where the largest cost is smallest. Simplified: the cost of a layer is the number of its matrices'
parameters that a token uses. Attention to other tokens is not in it, since most layers have the same.

A stage gives to the next its hidden states [b, s, m], or all streams [b, s, n, m], and a vector of FP32 numbers:

    the balance losses of all MoE layers so far, and the sum of the losses of all indexers so far
    where the next stage begins with a layer that has no indexer, the keys that its source chose, [b, s, k]
    where that source learns from all layers that take its choice, also its queries, keys and head weights

Positions of keys are exact in FP32 below 2^24. A layer adds its share of an indexer's loss where it is; its gradient
comes back with the vector's. The last stage makes the losses, as one process does. MTP reads the embedding too. Where
first and last stage are on two ranks, both have it. Their gradients are summed, so that both stay equal.

torch.distributed.pipelining has the schedules and runs them. Each part's loss is divided once, by what the whole step
has of targets, so gradients are summed and never scaled. Its default, scale_grads=True, would divide a parameter twice
that two stages of one rank share.
"""

import math
from collections import Counter, UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsmini.config import ModelConfig
from dsmini.config.run import CHUNKS, ParallelConfig, ScheduleName
from dsmini.nn import IndexerLoss, Routing, Transformer, dsa_layers
from dsmini.nn.attention import Context
from dsmini.nn.block import Aux, run_block
from dsmini.nn.dsa import Choice
from dsmini.nn.gate import sequence_balance_loss
from dsmini.nn.moe import MoE

if TYPE_CHECKING:
    from dsmini.nn.layers import Embedding, Linear, RMSNorm
    from dsmini.nn.mtp import MTPChain


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


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """The layers of each stage, and the pipeline's rank that has it."""

    layers: tuple[range, ...]
    ranks: tuple[int, ...]
    moe: tuple[bool, ...]
    """For each layer, MTP blocks last, True if it is a MoE layer."""
    indexers: Mapping[int, int]
    """Number of layers that an indexer learns from, by the number of its layer; MTP blocks last."""
    config: ModelConfig
    """Config of the model."""

    @classmethod
    def of(cls, model: Transformer, config: ParallelConfig) -> "StageLayout":
        """Divide a whole model."""
        c = model.config
        costs = [_cost(block, model) for block in model.layers]
        head = model.head.weight.numel()
        costs[-1] += head + sum(head + _cost(block, model) for block in model.mtp)
        blocks = [*model.layers, *model.mtp]
        served = Counter(c.index_source(layer) for layer in range(len(blocks)))
        indexers = [layer for layer, block in enumerate(blocks) if dsa_layers(block)]
        return cls(
            layers=divided(costs, config.pp * CHUNKS[config.schedule]),
            ranks=ranks_of_stages(config),
            moe=tuple(any(isinstance(m, MoE) for m in block.modules()) for block in blocks),
            indexers={layer: served[layer] if c.indexer_target == "served" else 1 for layer in indexers},
            config=c,
        )

    def stages(self, rank: int) -> list[int]:
        """Return the stages of a rank, in order."""
        return [stage for stage, of in enumerate(self.ranks) if of == rank]

    def rows(self, rank: int) -> list[int]:
        """Return the numbers, among all MoE layers, of those that a rank has."""
        moe = [layer for layer, is_moe in enumerate(self.moe) if is_moe]
        own = {layer for stage in self.stages(rank) for layer in self.layers[stage]}
        own |= set(range(self.layers[-1].stop, len(self.moe))) if self.ranks[-1] == rank else set()
        return [row for row, layer in enumerate(moe) if layer in own]

    def source(self, stage: int) -> int | None:
        """Return the layer before a stage whose choice of keys the stage begins with; None: its first layer chooses."""
        first = self.layers[stage].start
        source = self.config.index_source(first)
        return None if source == first else source

    def carried(self, stage: int, b: int, s: int) -> list[tuple[int, ...]]:
        """Return the shapes of what the vector that a stage takes in training has: losses, and a Choice."""
        c = self.config
        moe_before = sum(self.moe[: self.layers[stage].start])
        shapes: list[tuple[int, ...]] = [(moe_before + bool(self.indexers),)]
        if self.source(stage) is not None and c.index_n_heads and c.index_head_dim and c.index_topk:
            shapes.append((b, s, min(c.index_topk, s)))
            if c.indexer_target == "served":
                shapes += [(b, s, c.index_n_heads, c.index_head_dim), (b, s, c.index_head_dim), (b, s, c.index_n_heads)]
        return shapes

    def keep(self, model: Transformer, rank: int) -> None:
        """Leave of a whole model the modules of a rank's stages, with their names."""
        stages = self.stages(rank)
        first, last = self.ranks[0] == rank, self.ranks[-1] == rank
        own = {layer for stage in stages for layer in self.layers[stage]}
        for layer in set(range(len(model.layers))) - own:
            model.layers[layer] = nn.Identity()
        away = [] if first or (last and len(model.mtp)) else ["embed", "embed_norm"]
        away += [] if last else ["norm", "head"]
        for name in away:
            setattr(model, name, nn.Identity())
        if not last:
            del model.mtp[:]
            head: Any = model.hc_head  # the first stage expands without its tensors
            for name, _ in list(head.named_parameters()):
                setattr(head, name, None)
            head.reset_parameters = lambda: None


def ranks_of_stages(config: ParallelConfig) -> tuple[int, ...]:
    """Return the rank of each stage."""
    there = list(range(config.pp))
    if config.schedule in ("zbv", "dualpipev"):
        return (*there, *reversed(there))
    return tuple(there * CHUNKS[config.schedule])


def divided(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Return consecutive layers for each stage, one or more, such that the largest sum of costs is smallest."""
    assert stages <= len(costs), "the config allows no more stages than layers"

    @cache
    def best(end: int, stages: int) -> tuple[float, float, tuple[int, ...]]:
        """Return the largest cost, the sum of squares (less for stages that are more even) and the first layers."""
        if stages == 1:
            return sum(costs[:end]), sum(costs[:end]) ** 2, (0,)
        ways = []
        for begin in range(stages - 1, end):
            (largest, squares, begins), cost = best(begin, stages - 1), sum(costs[begin:end])
            ways.append((max(largest, cost), squares + cost**2, (*begins, begin)))
        return min(ways)

    begins = best(len(costs), stages)[2]
    return tuple(map(range, begins, (*begins[1:], len(costs))))


def _cost(module: nn.Module, model: Transformer) -> float:
    """Return the number of matrix parameters of a module that a token uses."""
    routed = [p for moe in module.modules() if isinstance(moe, MoE) for p in moe.experts.parameters()]
    every, of_experts = (sum(p.numel() for p in ps if p.dim() > 1) for ps in (module.parameters(), routed))
    share = model.config.n_activated_experts / model.config.n_routed_experts
    return every - of_experts * (1 - share)


class ModelStage(nn.Module):
    """One stage. Its modules are the model's own."""

    def __init__(self, model: Transformer, layout: StageLayout, index: int) -> None:
        super().__init__()
        self.index: int = index
        self.layout: StageLayout = layout
        self.first: bool = index == 0
        self.last: bool = index == len(layout.layers) - 1
        self.blocks: nn.ModuleList = nn.ModuleList(model.layers[layer] for layer in layout.layers[index])
        if self.first or (self.last and len(model.mtp)):
            self.embed: Embedding = model.embed
            self.embed_norm: RMSNorm | None = model.embed_norm
        if self.last:
            self.hc_head: nn.Module = model.hc_head
            self.norm: RMSNorm = model.norm
            self.head: Linear = model.head
            self.mtp: MTPChain = model.mtp
        self._model: Callable[[], Transformer] = lambda: model  # not a submodule: the parameters are those above
        self.batch: StepBatch
        self.sums: Tensor
        self.fits: Tensor
        self.counts: Tensor | None

    def begin(self, batch: StepBatch) -> None:
        """Begin a step."""
        device = batch.tokens.device
        self.batch, self.sums, self.counts = batch, torch.zeros(3, device=device), None
        self.fits = torch.zeros(len(self.layout.indexers), len(IndexerLoss._fields), device=device)

    def forward(
        self,
        x: Tensor,
        carried: Tensor | None = None,
        *,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
    ) -> Any:
        """Return what the next stage takes; from the last stage the part's loss, divided by the number of parts.

        Args:
            x: hidden states; the first stage takes token ids.
            carried: the vector that comes with them.
        """
        batch, model, first = self.batch, self._model(), self.layout.layers[self.index].start
        # 1. balance losses of the MoE layers before this stage, the sum of the indexers' losses, and what is chosen
        balances, kl, choices = self._taken(carried, x, tokens)
        # 2. the blocks
        x, found = self.hidden(x, tokens, documents, choices, batch.options["recompute"], train=True)
        kl = kl + self._learnt(found, first)
        if not self.last:
            routing = [aux.routing for aux in found if aux.routing is not None]
            self._count(routing)
            return self._given(x, [*balances, *self._balances(routing, tokens)], kl, choices)
        # 3. all losses, added in the order of one process
        states = model.states_of(x, found)._replace(indexers=[])
        options = {"documents": documents, "n_targets": batch.n_targets, "states": states}
        losses = model.losses(tokens, targets, **options, **batch.options)
        self._count(losses.routing)
        kl = kl + self._learnt([Aux(None, loss) for loss in losses.indexers], len(model.layers))
        balances = [*balances, *self._balances(losses.routing, tokens)]
        balance = torch.stack(balances).sum().to(losses.main.dtype) if balances else losses.balance
        weight = batch.options
        total = losses.main + weight["mtp_weight"] * losses.mtp + weight["balance_alpha"] * balance + kl
        self.sums += torch.stack([losses.main, losses.mtp, balance]).detach() / batch.parts
        return total / batch.parts

    def hidden(
        self,
        x: Tensor,
        tokens: Tensor,
        documents: Tensor | None,
        choices: UserDict[int, Choice],
        recompute: bool = False,
        train: bool = False,
    ) -> tuple[Tensor, list[Aux]]:
        """Return the output of the last block, and what all blocks found.

        Args:
            choices: as in Context; those of this stage are added.
            train: compute the losses of indexers that learn.
        """
        model = self._model()
        if self.first:
            x = model.hc_head.expand(model.embedded(x))
        positions, stage = torch.arange(x.shape[1], device=x.device)[None], model.stage_for(train)
        context = Context(positions=positions, tokens=tokens, documents=documents, stage=stage, choices=choices)
        found: list[Aux] = []
        for block in self.blocks:
            x, aux = run_block(block, x, context, recompute)
            found.append(aux)
        return x, found

    def _taken(
        self, carried: Tensor | None, x: Tensor, tokens: Tensor
    ) -> tuple[list[Tensor], Tensor, UserDict[int, Choice]]:
        """Return the balance losses, the sum of the indexers' losses and the choices in the vector that came with x."""
        losses, choices = list[Tensor](), UserDict[int, Choice]()
        if carried is not None:
            shapes = self.layout.carried(self.index, *tokens.shape)
            parts = carried.split([math.prod(shape) for shape in shapes])
            numbers, *choice = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
            losses = list(numbers.unbind())
            if (source := self.layout.source(self.index)) is not None:
                topk_indices, *index = choice
                for_learning = (index[0].to(x.dtype), index[1].to(x.dtype), index[2]) if index else None
                choices[source] = Choice(topk_indices.long(), for_learning)
        kl = losses.pop() if losses and self.layout.indexers else torch.zeros((), device=tokens.device)
        return losses, kl, choices

    def _given(self, x: Tensor, balances: list[Tensor], kl: Tensor, choices: UserDict[int, Choice]) -> Any:
        """Return x, and the vector that goes with it if there is anything in it."""
        parts: list[Any] = [*balances, kl] if self.layout.indexers else balances
        if (source := self.layout.source(self.index + 1)) is not None:
            choice = choices[source]
            parts = [*parts, choice.topk_indices, *(choice.index or ())]
        return (x, torch.cat([part.float().flatten() for part in parts])) if parts else x

    def _learnt(self, found: Sequence[Aux], first: int) -> Tensor:
        """Note the figures of the indexers that learn from blocks `first` and later; return the sum of their losses."""
        total, rows = torch.zeros((), device=self.fits.device), list(self.layout.indexers)
        for layer, aux in enumerate(found, first):
            if aux.indexer_loss is not None:
                source = self.layout.config.index_source(layer)
                share = torch.stack(aux.indexer_loss) / self.layout.indexers[source]
                self.fits[rows.index(source)] += share.detach() / self.batch.parts
                total = total + share[0]
        return total

    def _balances(self, routing: Sequence[Routing], tokens: Tensor) -> list[Tensor]:
        """Return the balance losses of MoE layers."""
        rows, counts = tokens.shape[0], self.batch.options["balance_counts"]
        return [sequence_balance_loss(r.scores, r.indices, rows, counts) for r in routing]

    def _count(self, routing: list[Routing]) -> None:
        if routing:
            load = torch.stack([r.counts for r in routing])
            self.counts = load if self.counts is None else self.counts + load


# --- the passes


SCHEDULES = {
    "1f1b": "Schedule1F1B",
    "interleaved1f1b": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
"""Names of torch's schedules."""


class Pipeline:
    """The passes through the stages of all ranks of a group, of which each makes one.

    Args:
        dtype: of hidden states.
    """

    def __init__(
        self, model: Transformer, layout: StageLayout, name: ScheduleName, group: dist.ProcessGroup, dtype: torch.dtype
    ) -> None:
        self.model: Transformer = model
        self.layout: StageLayout = layout
        self.name = name
        self.group: dist.ProcessGroup = group
        self.dtype: torch.dtype = dtype
        self.rank: int = dist.get_rank(group)
        self.stages: dict[int, ModelStage] = {
            index: ModelStage(model, layout, index) for index in layout.stages(self.rank)
        }
        self._schedules: dict[tuple[int, ...], Any] = {}

    def train(self, batch: StepBatch) -> tuple[Tensor, Tensor | None]:
        """Add up the gradients of the mean loss over the batch, for the parameters of this rank.

        Return this rank's part of the mean losses, with the figures of each indexer after them, and of the loads of all
        MoE layers; those of all ranks add up.
        """
        device, layout = batch.tokens.device, self.layout
        for stage in self.stages.values():
            stage.begin(batch)
        kwargs = {"tokens": batch.tokens, "targets": batch.targets}
        kwargs |= {} if batch.documents is None else {"documents": batch.documents}
        schedule = self.schedule(batch.tokens.shape[0] // batch.accumulate, batch.tokens.shape[1], batch.accumulate)
        batch.phase("forward")
        args = (batch.tokens,) if 0 in self.stages else ()
        schedule.step(*args, target=batch.targets, return_outputs=False, **kwargs)
        batch.phase("backward")  # forwards and backwards take turns in a schedule
        for p in self.model.parameters():
            # a weight's backward of its own leaves views, whose strides the fused AdamW takes for those of p
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        sums = torch.stack([torch.cat((stage.sums, stage.fits.flatten())) for stage in self.stages.values()]).sum(0)
        if not any(layout.moe):
            return sums, None
        counts = torch.zeros(sum(layout.moe), self.model.config.n_routed_experts, dtype=torch.int64, device=device)
        if own := [stage.counts for stage in self.stages.values() if stage.counts is not None]:
            counts[layout.rows(self.rank)] = torch.cat(own)
        return sums, counts

    def own_counts(self, counts: Tensor) -> Tensor:
        """Return the rows of the loads of all MoE layers that belong to the gates on this rank, in their order."""
        return counts[self.layout.rows(self.rank)]

    def score(self, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Return the sum of the cross-entropy of the first rows, which have targets; 0 without the last stage."""
        x, total, choices = tokens, torch.zeros((), device=tokens.device), UserDict[int, Choice]()
        topk = self.model.config.index_topk or 0
        for index, stage in self.stages.items():
            if not stage.first and index - 1 not in self.stages:
                x = self._received(index - 1, (*tokens.shape, *self._streams), self.dtype)
                if (source := self.layout.source(index)) is not None:
                    chosen = (*tokens.shape, topk)
                    some = tokens.shape[1] > topk
                    choices[source] = Choice(self._received(index - 1, chosen, torch.int64) if some else None)
            x, found = stage.hidden(x, tokens, documents, choices)
            if stage.last:
                hidden = self.model.states_of(x, found).normed
                total = self.model.cross_entropy(hidden[: len(targets)].flatten(0, 1), targets.flatten())
            elif index + 1 not in self.stages:
                source = self.layout.source(index + 1)
                for part in (x, None if source is None else choices[source].topk_indices):
                    if part is not None:
                        dist.send(part.contiguous(), self._global_rank(index + 1), group=self.group)
        return total

    def _received(self, stage: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that another stage sends."""
        tensor = torch.empty(shape, dtype=dtype, device=next(self.model.parameters()).device)
        dist.recv(tensor, self._global_rank(stage), group=self.group)
        return tensor

    @property
    def _streams(self) -> tuple[int, ...]:
        """Size of the hidden states of a token: [m], or [n, m] with several residual streams."""
        c = self.model.config
        return (c.hc_mult, c.dim) if c.hc_mult > 1 else (c.dim,)

    def _global_rank(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.layout.ranks[stage])

    def schedule(self, b: int, s: int, n: int) -> Any:
        """Return the schedule for n parts of b sequences of s tokens, the same one for the same numbers."""
        from torch.distributed.pipelining import schedules  # half a second, which no other run needs

        if (b, s, n) not in self._schedules:
            stages = [self._stage(index, b, s) for index in self.stages]
            kwargs: dict[str, Any] = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
            kind = getattr(schedules, SCHEDULES[self.name])
            self._schedules.clear()  # each has the buffers of its batch, and a batch that grows has many sizes
            self._schedules[b, s, n] = kind(stages[0] if self.name == "1f1b" else stages, n, **kwargs)
        return self._schedules[b, s, n]

    def _stage(self, index: int, b: int, s: int) -> Any:
        """Return torch's view of a stage. Shapes are given, so torch needs no forward to find them."""
        from torch.distributed.pipelining import PipelineStage

        device = next(self.model.parameters()).device

        def between(stage: int) -> tuple[Tensor, ...]:
            x = torch.empty(b, s, *self._streams, dtype=self.dtype, device="meta", requires_grad=True)
            n = sum(map(math.prod, self.layout.carried(stage, b, s)))
            carried = torch.empty(n, device="meta", requires_grad=True)
            return (x, carried) if n else (x,)

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
