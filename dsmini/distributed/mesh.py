"""The mesh pp x dp x ep of the ranks, and the sums over its groups.

Rank = (pp * dp + dp_index) * ep + ep_index: ranks of one ep group are neighbours, since they exchange most.

    group     ranks that differ in    holds together
    ep        ep                      all experts of a layer, for one part of the batch each
    dp        dp                      the same experts
    parts     dp and ep               all that is not an expert
    pp        pp                      the layers
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dsmini.config.parallel import ParallelConfig
from dsmini.distributed import data_parallel
from dsmini.distributed.exchange import SentBytes
from dsmini.distributed.expert_parallel import ExpertExchange, TwoHopExchange, keep_own_experts, moe_layers
from dsmini.distributed.passes import Passes
from dsmini.distributed.pieces import HeldRows
from dsmini.distributed.ranks import Place, Ranks
from dsmini.distributed.sharded_muon import muon_update_divided
from dsmini.distributed.shared_muon import SharedMatrices
from dsmini.distributed.stages import StageLayout
from dsmini.functional.muon import muon_update
from dsmini.nn import Transformer

if TYPE_CHECKING:
    from dsmini.distributed.pipeline import Pipeline

BUCKET = 1 << 23
"""Numbers of gradients that are summed in one message."""


class Mesh(Ranks):
    """The ranks of a layout. All ranks make it together, and call its methods in the same order."""

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        self.config = config
        parts = config.parts(dist.get_world_size())
        dp = parts // config.ep
        shape, names = (config.pp, dp, config.ep), ("pp", "dp", "ep")
        self.device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.parts_mesh = self.device_mesh["dp", "ep"]._flatten("parts")
        pp, dp_index, ep = self.device_mesh.get_coordinate() or (0, 0, 0)
        self.place = Place(pp=pp, part=dp_index * config.ep + ep, parts=parts, ep=ep)
        self.ep, self.dp, self.pp = (self.device_mesh.get_group(name) for name in ("ep", "dp", "pp"))
        self.parts = self.parts_mesh.get_group()
        self.traffic, self.slow_traffic = SentBytes(), SentBytes()
        """Bytes of the expert exchange inside a node, or of all where there is one; between nodes."""
        self.zero = 0
        """parallel.zero, where there is something to divide."""
        self.own_experts: set[Tensor] = set()
        """Parameters that only the ranks of `dp` hold alike."""
        self.shared: list[SharedMatrices] = []
        """Matrices that Muon moves."""
        self.moved_by_one: set[nn.Parameter] = set()
        """Those of them that other ranks hold too."""
        self.at_owners: set[nn.Parameter] = set()
        """Those of them that have a gradient in this step, at their owners alone."""
        self.layout: StageLayout | None = None
        """The stages of a pipeline."""
        self.twins: list[nn.Parameter] = []
        """Parameters that the first and the last stage both have, on two ranks."""
        self.ends: dist.ProcessGroup | None = None
        """The ranks of the first and the last stage of this part of the batch, on these ranks."""

    def divide(self, model: Transformer) -> None:
        self.divide_layers(model)
        self.divide_experts(model)
        self.shard(model)
        self.note(model)

    def note(self, model: Transformer) -> None:
        if self.config.ep > 1:
            self.own_experts = {p for moe in moe_layers(model) for p in moe.experts.parameters()}
        if self.ends is not None:
            self.twins = [p for name, p in model.named_parameters() if name.startswith("embed")]

    def divide_layers(self, model: Transformer) -> None:
        """Keep the layers of this rank's stages of a pipeline."""
        if self.config.pp == 1:
            return
        before = set(model.state_dict())
        self.layout = layout = StageLayout.of(model, self.config)
        twice = bool(len(model.mtp)) and layout.ends_apart()
        layout.keep(model, self.place.pp)
        self.elsewhere = before - set(model.state_dict())
        for part in range(self.place.parts if twice else 0):  # every rank makes every group, in one order
            ends = [layout.ranks[0] * self.place.parts + part, layout.ranks[-1] * self.place.parts + part]
            group: Any = dist.new_group(ends)
            if dist.get_rank() in ends:
                self.ends = group

    def passes(self, model: Transformer, compiled: bool) -> "Passes | Pipeline":
        if self.layout is None:
            return super().passes(model, compiled)
        from dsmini.distributed.pipeline import Pipeline

        return Pipeline(model, self.layout, self.config.schedule, self.pp, model.compute_dtype or torch.float32)

    def sum_stages(self, tensor: Tensor) -> None:
        if self.config.pp > 1:
            dist.all_reduce(tensor, group=self.pp)

    def divide_experts(self, model: nn.Module) -> None:
        """Keep this rank's experts of each MoE layer, and let tokens travel to the others."""
        if self.config.ep == 1:
            return
        exchange = self._exchange()
        for moe in moe_layers(model):
            keep_own_experts(moe, self.place.ep, self.config.ep)
            moe.exchange = exchange

    def shard(self, model: Transformer) -> None:
        """Divide parameters and optimizer state as parallel.zero says."""
        if self.config.zero and self.place.parts > 1:
            self.zero = self.config.zero
            blocks: list[nn.Module] = [*model.layers, *model.mtp]
            dp = self.device_mesh["dp"] if self.config.ep > 1 else None
            data_parallel.shard(model, blocks, self.zero, self.parts_mesh, dp)

    def _exchange(self) -> ExpertExchange | TwoHopExchange:
        nodes, ep = self.config.nodes, self.config.ep
        if nodes == 1:
            return ExpertExchange(self.ep, self.traffic)
        by_node = torch.tensor(dist.get_process_group_ranks(self.ep)).view(nodes, ep // nodes)
        everyone: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, [*by_node.tolist(), *by_node.T.tolist()])
        # every rank makes every group, in one order
        groups = {
            tuple(ranks): dist.new_group(ranks) for ranks in sorted({tuple(r) for all_of in everyone for r in all_of})
        }
        node, number = divmod(self.place.ep, ep // nodes)
        inside: Any
        between: Any
        inside, between = groups[tuple(by_node[node].tolist())], groups[tuple(by_node[:, number].tolist())]
        return TwoHopExchange(between, inside, self.slow_traffic, self.traffic)

    def local(self, tensor: Tensor) -> Tensor:
        return data_parallel.local(tensor)

    def divided_like(self, parameter: Tensor, part: Tensor) -> Tensor:
        return data_parallel.divided_like(parameter, part)

    def owned(self, matrices: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        if self.zero:
            return list(matrices)
        self.shared = [
            SharedMatrices([p for p in matrices if (p in self.own_experts) == own], group)
            for group, own in ((self.parts, False), (self.dp, True))
        ]
        self.moved_by_one = {p for matrices in self.shared if matrices.n > 1 for p in matrices.params}
        mine = {p for matrices in self.shared for p in matrices.own}
        return [p for p in matrices if p in mine]

    def exchange_moved(self) -> None:
        for matrices in self.shared:
            matrices.exchange()

    def muon_update(self, *args: Any, **kwargs: Any) -> None:
        (muon_update_divided if self.zero else muon_update)(*args, **kwargs)

    def begin_part(self, model: nn.Module, last: bool) -> None:
        if self.zero:
            data_parallel.set_last_part(model, self.zero, last)

    def release(self, model: nn.Module) -> None:
        if self.zero:
            data_parallel.reshard(model)

    def sum_parts(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if self.place.parts > 1:
                dist.all_reduce(tensor, group=self.parts)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.zero:  # FSDP2 has summed them
            return
        self.at_owners = {p for p in self.moved_by_one if p.grad is not None}
        for matrices in self.shared:
            matrices.sum_gradients()
        for_all = [p for p in parameters if p.grad is not None and p not in self.moved_by_one]
        for group, own in ((self.parts, False), (self.dp, True)):
            if dist.get_world_size(group) > 1:
                sum_in_buckets([p.grad for p in for_all if (p in self.own_experts) == own], group)
        if self.ends is not None:
            sum_in_buckets([p.grad for p in self.twins], self.ends)

    def holders(self, tensor: Tensor) -> tuple[int, ...]:
        if self.local(tensor) is not tensor:
            return (dist.get_rank(),)
        if any(tensor is twin for twin in self.twins):
            parts, last = self.place.parts, self.config.pp - 1
            return tuple(stage * parts + part for stage in (0, last) for part in range(parts))
        group = self.dp if tensor in self.own_experts else self.parts
        return tuple(dist.get_process_group_ranks(group))

    def piece(self, parameter: Tensor) -> HeldRows:
        first, rows = data_parallel.first_row(parameter)
        shape, here = tuple(parameter.shape), self.local(parameter)
        if parameter in self.own_experts:
            first, shape = first + self.place.ep * rows, (rows * self.config.ep, *shape[1:])
        return HeldRows(shape=shape, first=first, rows=here.shape[0] if here.dim() else 1)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        if self.place.pp:  # the first rank counts them
            parameters = [p for p in parameters if not any(p is twin for twin in self.twins)]
        if not self.zero and self.config.ep == self.config.pp == 1:
            return self._norm_as_of_one_process(parameters)
        alike, of_experts, alone = [], [], []
        for p in parameters:
            if p.grad is not None:
                held = alone if self.zero or p in self.at_owners else of_experts if p in self.own_experts else alike
                held.append(self.local(p.grad))
        squares = [get_total_norm(of, foreach=True).square() for of in (alike, of_experts, alone)]
        squares = [square.to(self.device_mesh.device_type) for square in squares]  # that of no gradients is on the CPU
        dist.all_reduce(squares[1], group=self.ep)
        dist.all_reduce(squares[2], group=self.parts)
        squared = squares[0] + squares[1] + squares[2]
        if self.config.pp > 1:
            dist.all_reduce(squared, group=self.pp)
        return squared.sqrt()

    def _norm_as_of_one_process(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the norms of whole gradients, in their order, so that it has the bits of one process."""
        norms = torch.zeros(len(parameters), device=self.device_mesh.device_type)
        for norm, p in zip(norms, parameters, strict=True):
            if p.grad is not None:
                norm.copy_(torch.linalg.vector_norm(p.grad))
        if self.at_owners:
            by_one = torch.tensor([p in self.at_owners for p in parameters], device=norms.device)
            of_owners = norms * by_one
            dist.all_reduce(of_owners, group=self.parts)
            norms = torch.where(by_one, of_owners, norms)
        return torch.linalg.vector_norm(norms)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        parameters = list(parameters)
        norm = self.gradient_norm([p for p in parameters if p.grad is not None or p in self.at_owners])
        with_gradient = [p for p in parameters if p.grad is not None]
        if not self.zero:
            clip_grads_with_norm_(with_gradient, max_norm, norm, foreach=True)
            return norm
        share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for p in with_gradient:
            assert p.grad is not None
            self.local(p.grad).mul_(share)
        return norm


def sum_in_buckets(tensors: Sequence[Tensor | None], group: dist.ProcessGroup) -> None:
    """Replace tensors by their sums over a group, in messages of up to BUCKET numbers of one dtype."""
    bucket: list[Tensor] = []
    for tensor in [*tensors, None]:
        full = sum(t.numel() for t in bucket) + (0 if tensor is None else tensor.numel()) > BUCKET
        if bucket and (tensor is None or full or tensor.dtype != bucket[0].dtype):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat, group=group)
            for t, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(summed.view_as(t))
            bucket = []
        if tensor is not None:
            bucket.append(tensor)
