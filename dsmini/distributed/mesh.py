"""The mesh pp x dp x ep of the processes: who holds what alike, and the sums over those that do.

Rank = (pp_index * dp + dp_index) * ep + ep_index: ranks of one ep group are neighbours, since they exchange most.

    group     ranks that differ in    holds together
    ep        ep_index                all experts of a layer, for one part of the batch each
    dp        dp_index                the same experts
    parts     dp_index and ep_index   all that is not an expert
    pp        pp_index                the layers

A part of the batch is a (dp_index, ep_index). The gradient of an expert is summed over dp: over ep it is a sum already,
since the tokens of all ep ranks came to the expert. That of all else is summed over parts. No mean is taken anywhere:
the loss is divided once, by what the whole step has of targets. One process is a mesh of 1, which sends nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsmini.config.parallel import ParallelConfig
from dsmini.console.command import interruptible
from dsmini.distributed import data_parallel
from dsmini.distributed.expert_parallel import ExpertExchange, TwoHopExchange, keep_own_experts, moe_layers
from dsmini.distributed.muon import MatrixOwners, muon_update_divided
from dsmini.distributed.pieces import HeldRows
from dsmini.distributed.stages import StageLayout
from dsmini.nn import Transformer
from dsmini.numerics.orthogonalize import muon_update

T = TypeVar("T")
BUCKET = 1 << 23
"""Numbers of gradients that are summed in one message."""


class Mesh:
    """A process in the mesh. All make it together, and call its methods in the same order."""

    def __init__(self, config: ParallelConfig | None = None, device: torch.device | None = None) -> None:
        self.config = config = config or ParallelConfig()
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.parts = config.parts(self.size)
        """Number of parts of the batch, dp x ep."""
        self.pp_index, self.part = divmod(self.rank, self.parts)
        self.ep_index = self.part % config.ep
        self.traffic, self.slow_traffic = Counter[str](), Counter[str]()
        """Bytes of the expert exchange inside a node, or of all where there is one; between nodes."""
        self.zero = config.zero if self.parts > 1 else 0
        self.layout: StageLayout | None = None
        """The stages of a pipeline."""
        self.names: list[str] = []
        """Names of all parameters of the whole model."""
        self.elsewhere: set[str] = set()
        """Names of the tensors of the whole model that other ranks have, and this one has nothing of."""
        self.own_experts: set[Tensor] = set()
        """Parameters that only the ranks of `dp` hold alike."""
        self.ends: Any = None
        """The ranks of the first and the last stage of this part of the batch, on these ranks."""
        self.shared_by_ends: set[Tensor] = set()
        """Parameters that the first and the last stage both have, on two ranks."""
        self.owners: list[MatrixOwners] = []
        """Matrices that Muon moves on one of the ranks that hold them."""
        self.groups: dict[str, Any] = {}
        if self.size > 1:
            names, dp = ("pp", "dp", "node", "inside"), self.parts // config.ep
            shape = (config.pp, dp, config.nodes, config.ep // config.nodes)
            kind = "cpu" if device is None else device.type

            def make() -> dict[str, DeviceMesh]:
                whole = init_device_mesh(kind, shape, mesh_dim_names=names)
                joint = {"ep": whole[names[2:]]._flatten("ep"), "parts": whole[names[1:]]._flatten("parts")}
                return {name: whole[name] for name in names} | joint

            self.meshes = self._in_time(make)
            self.groups = {name: mesh.get_group() for name, mesh in self.meshes.items()}

    def _in_time(self, make: Callable[[], T]) -> T:
        """Make groups of ranks. torch waits half an hour for one that died meanwhile, before any heartbeat tells.

        Raises: RuntimeError after parallel.timeout.
        """
        try:
            return interruptible(make, self.config.timeout)
        except TimeoutError:
            raise RuntimeError(f"Timed out after {self.config.timeout:g} s of making groups of ranks") from None

    # --- the division of a model

    def divide(self, model: Transformer) -> None:
        """Leave of a whole model what this rank holds. It may be on the meta device."""
        self.names = [name for name, _ in model.named_parameters()]
        if self.config.pp > 1:
            self._keep_stages(model)
        if self.config.ep > 1:
            exchange = self._exchange()
            for moe in moe_layers(model):
                keep_own_experts(moe, self.ep_index, self.config.ep)
                moe.exchange = exchange
        if self.zero:
            dp = self.meshes["dp"] if self.config.ep > 1 else None
            data_parallel.shard(model, [*model.layers, *model.mtp], self.zero, self.meshes["parts"], dp)
        self.note(model)

    def note(self, model: Transformer) -> None:
        """Note which parameters of a divided model other ranks do not hold alike: again if others took their place."""
        if self.config.ep > 1:
            self.own_experts = {p for moe in moe_layers(model) for p in moe.experts.parameters()}
        if self.ends is not None:
            self.shared_by_ends = {p for name, p in model.named_parameters() if name.startswith("embed")}

    def _keep_stages(self, model: Transformer) -> None:
        before = set(model.state_dict())
        self.layout = layout = StageLayout.of(model, self.config)
        first, last = layout.ranks[0], layout.ranks[-1]
        embeds_twice = bool(len(model.mtp)) and first != last
        layout.keep(model, self.pp_index)
        self.elsewhere = before - set(model.state_dict())
        for part in range(self.parts if embeds_twice else 0):  # every rank makes every group, in one order
            ends = [stage * self.parts + part for stage in (first, last)]
            group = self._in_time(partial(dist.new_group, ends))
            if self.rank in ends:
                self.ends = group

    def _exchange(self) -> ExpertExchange | TwoHopExchange:
        if self.config.nodes == 1:
            return ExpertExchange(self.groups["ep"], self.traffic)
        return TwoHopExchange(self.groups["node"], self.groups["inside"], self.slow_traffic, self.traffic)

    def pipeline(self, model: Transformer) -> Any:
        """Return what runs forwards and backwards through the stages of all ranks; None without a pipeline."""
        if self.layout is None:
            return None
        from dsmini.distributed.pipeline import Pipeline

        dtype = model.compute_dtype or torch.float32
        return Pipeline(model, self.layout, self.config.schedule, self.groups["pp"], dtype)

    def begin_part(self, model: nn.Module, last: bool) -> None:
        """Prepare the forward and backward of a part of the step's batch."""
        if self.zero:
            data_parallel.set_last_part(model, self.zero, last)

    def release(self, model: nn.Module) -> None:
        """Free gathered parameters, which no backward frees, or which were changed outside of a step."""
        if self.zero:
            data_parallel.reshard(model)

    # --- who holds what

    def holders(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the ranks that hold the same values as this one in a parameter or a buffer."""
        if self.size == 1 or data_parallel.local(tensor) is not tensor:
            return (self.rank,)
        if tensor in self.shared_by_ends:
            last = self.config.pp - 1
            return tuple(stage * self.parts + part for stage in (0, last) for part in range(self.parts))
        return tuple(dist.get_process_group_ranks(self.groups["dp" if tensor in self.own_experts else "parts"]))

    def piece(self, parameter: Tensor) -> HeldRows:
        """Return which piece of the whole model's parameter this rank holds."""
        first, rows = data_parallel.first_row(parameter)
        shape, here = tuple(parameter.shape), data_parallel.local(parameter)
        if parameter in self.own_experts:
            first, shape = first + self.ep_index * rows, (rows * self.config.ep, *shape[1:])
        return HeldRows(shape=shape, first=first, rows=here.shape[0] if here.dim() else 1)

    # --- sums

    def sum_parts(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the CPU summed over the parts of the batch."""
        if self.parts > 1:
            dist.all_reduce(tensor, group=self.groups["parts"])
        return tensor

    def sum_all(self, *tensors: Tensor) -> list[Tensor]:
        """Return tensors summed over all ranks, in one message of FP64: counts below 2^53 stay exact."""
        if self.size == 1:
            return list(tensors)
        packed = torch.cat([t.detach().to("cpu", torch.float64).flatten() for t in tensors])
        dist.all_reduce(packed)
        split = packed.split([t.numel() for t in tensors])
        return [of.view(t.shape).to(t.device, t.dtype) for of, t in zip(split, tensors, strict=True)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over the ranks that hold the same parameter; Muon's at owners alone."""
        if self.size == 1 or self.zero:  # FSDP2 has summed them
            return
        for owners in self.owners:
            owners.sum_gradients()
        moved_by_one = self._moved_by_one()
        for_all = [p for p in parameters if p.grad is not None and p not in moved_by_one]
        for name, own in (("parts", False), ("dp", True)):
            sum_in_buckets([p.grad for p in for_all if (p in self.own_experts) == own], self.groups[name])
        if self.ends is not None:
            sum_in_buckets([p.grad for p in for_all if p in self.shared_by_ends], self.ends)

    @torch.no_grad()
    def squared_norms(self, model: nn.Module) -> Tensor:
        """Return the squared norms of this rank's gradients, FP64, by their place in `names`.

        Over all ranks each element of the whole model's gradient counts once: in the sum of what they return.
        """
        squares = torch.zeros(len(self.names), dtype=torch.float64)
        places, moved_by_one = {name: place for place, name in enumerate(self.names)}, self._moved_by_one()
        counted = [
            (places[name], data_parallel.local(p.grad))
            for name, p in model.named_parameters()
            if p.grad is not None and (p in moved_by_one or self.holders(p)[0] == self.rank)
        ]
        if counted:
            norms = torch._foreach_norm([grad for _, grad in counted])  # pyright: ignore[reportPrivateImportUsage]
            squares[[place for place, _ in counted]] = torch.stack(list(norms)).to("cpu", torch.float64).square()
        return squares

    # --- Muon

    def owned(self, matrices: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the matrices that Muon moves on this rank; `exchange_moved` gives it those that others have moved."""
        if self.size == 1 or self.zero:
            return list(matrices)
        self.owners = [
            MatrixOwners([p for p in matrices if (p in self.own_experts) == own], self.groups[name])
            for name, own in (("parts", False), ("dp", True))
        ]
        mine = {p for owners in self.owners for p in owners.own}
        return [p for p in matrices if p in mine]

    def exchange_moved(self) -> None:
        """Get the matrices that Muon has moved on other ranks."""
        for owners in self.owners:
            owners.share()

    def _moved_by_one(self) -> set[Tensor]:
        """Return the matrices whose gradients only their owner among several ranks has."""
        return {p for owners in self.owners if owners.n > 1 for p in owners.params}

    @property
    def muon_update(self) -> Any:
        """The update of Muon's matrices: that of whole ones, or of ones that FSDP2 divides."""
        return muon_update_divided if self.zero else muon_update


def sum_in_buckets(gradients: Sequence[Tensor | None], group: Any) -> None:
    """Replace tensors by their sums over a group, in messages of up to BUCKET numbers of one dtype."""
    if dist.get_world_size(group) == 1:
        return
    buckets: list[list[Tensor]] = []
    for grad in (grad for grad in gradients if grad is not None):
        last = buckets[-1] if buckets else []
        fits = last and last[0].dtype == grad.dtype and sum(t.numel() for t in last) + grad.numel() <= BUCKET
        last.append(grad) if fits else buckets.append([grad])
    for bucket in buckets:
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat, group=group)
        for t, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(summed.view_as(t))
