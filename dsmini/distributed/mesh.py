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

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dsmini.checkpoint.load import meta_model
from dsmini.checkpoint.tensor_files import bytes_of
from dsmini.config import ModelConfig
from dsmini.config.run import ParallelConfig
from dsmini.console.command import interruptible
from dsmini.distributed.expert_parallel import ExpertExchange, moe_layers
from dsmini.distributed.pipeline import Pipeline, StageLayout
from dsmini.distributed.world import World
from dsmini.nn import Transformer
from dsmini.nn.moe import Experts


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldRows:
    """The piece of a tensor that a rank holds: rows `first` ... `first + rows - 1` of one of `shape`.

    Experts are divided by their first dimension, and FSDP2 divides by the first dimension too. So a piece is a
    contiguous part of the whole tensor's bytes, and a file of the whole has the same bytes whatever the layout of the
    ranks.
    """

    shape: tuple[int, ...]
    first: int
    rows: int

    @property
    def whole(self) -> bool:
        """True if the piece is the whole tensor."""
        return self.first == 0 and self.rows == (self.shape[0] if self.shape else 1)

    @property
    def elements(self) -> tuple[int, int]:
        """First element of the piece in the whole, and the one after its last."""
        row = math.prod(self.shape[1:])
        return self.first * row, (self.first + self.rows) * row

    def of(self, whole: Tensor) -> Tensor:
        """Return the piece of a whole tensor."""
        return whole if self.whole else whole[self.first : self.first + self.rows]


Pieces = Mapping[str, Mapping[str, tuple[HeldRows, Tensor]]]
"""The tensors that a rank holds of each part of a run, by name, with their place in the whole."""


BUCKET = 1 << 23
"""Most numbers in a message of several gradients or matrices."""


# --- divided state


def shard(model: nn.Module, blocks: list[nn.Module], zero: int, parts: DeviceMesh, dp: DeviceMesh | None) -> None:
    """Divide a model's parameters by FSDP2: each block is gathered as one, and the rest as another.

        zero    divided                 sent in a step, in sizes of the model
        0       nothing                 gradients once, all-reduce: 2
        1       + optimizer state       gradients once, parameters once: 1 + 1
        2       + gradients             gradients once a part of the batch, parameters once: n + 1
        3       + parameters            gradients once a part, parameters twice a part (forward, backward): n + 2 n

    Parameters stay FP32 masters, and are gathered in FP32. The layers cast them to the compute dtype themselves.
    FSDP2's own mixed precision would round the FP32 gates and norms too, and send tokens to other experts.

    Gradients are summed, never averaged: the loss is divided once by the targets of the whole step. So every module
    gets the divisor 1 and the plain sum (gloo knows no other). Another divisor for experts alone would be applied twice
    where one rank holds an expert.

    Source: Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054; Zhao et al. 2023 (FSDP), arXiv 2304.11277.

    Args:
        parts: mesh of the ranks that hold the same parameters, experts apart.
        dp: mesh of the ranks that hold the same experts; None: the experts are as all else.
    """
    reshard = zero == 3
    apart: set[nn.Parameter] = set()
    for experts in (module for module in model.modules() if isinstance(module, Experts) and dp is not None):
        if dp is not None and dp.size() > 1:
            fully_shard(experts, mesh=dp, reshard_after_forward=reshard)
        else:  # no other rank has them
            apart |= set(experts.parameters())
    for block in blocks:
        fully_shard(block, mesh=parts, reshard_after_forward=reshard, ignored_params=apart)
    fully_shard(model, mesh=parts, reshard_after_forward=False, ignored_params=apart)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in ("losses", "states"):
        register_fsdp_forward_method(model, name)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules that FSDP2 divides."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a divided tensor that are here, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(rows: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor, divided as another is, of which this rank has some rows."""
    of: Any = like
    how: dict[str, Any] = {"run_check": False, "shape": of.shape, "stride": of.stride()}
    return cast(Any, DTensor.from_local(rows, of.device_mesh, of.placements, **how)).full_tensor()


def first_row(parameter: Tensor) -> int:
    """Return the first row of a divided parameter that is here."""
    if not isinstance(parameter, DTensor):
        return 0
    size, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    return min(parameter.shape[0], rank * -(-parameter.shape[0] // size))


# --- Muon on several ranks: each matrix is moved by one of those that hold it alike, its owner
#
#     zero 0     reduce each matrix's gradients to its owner; broadcast the matrix as it is after its step
#     zero 1-3   each rank has momentum and Nesterov's mean of its own rows; gather them; broadcast the owner's step
#                (training/muon.py)
#
# A divided stack of experts is divided by experts, whole matrices, which move where they are. All ranks end with the
# same bits. Source: Liu et al. 2025, arXiv 2502.16982, section 2.3 (distributed Muon, there with ZeRO-1).


def owners_of(params: Sequence[Tensor], n: int) -> list[list[Any]]:
    """Return the parameters of each of n owners, so that the work is as equal as whole parameters allow.

    The work of a matrix [o, i] is o i min(o, i).
    """
    work = {p: p.numel() * min(p.shape[-2:]) for p in params}
    owned: list[list[Tensor]] = [[] for _ in range(n)]
    for p in sorted(params, key=lambda p: -work[p]):
        min(owned, key=lambda own: sum(work[q] for q in own)).append(p)
    return owned


@torch.no_grad()
def in_messages(tensors: Sequence[Sequence[Tensor]], send: Callable[[Tensor, int], Any]) -> None:
    """Send lists of tensors in messages of up to BUCKET numbers of one dtype; the tensors get the values that come.

    Args:
        send: sends a message, which it changes; it is told the number of the list. It waits inside of torch, where a
            heartbeat sees that this rank waits for others.
    """
    for i, bucket in ((i, bucket) for i, of in enumerate(tensors) for bucket in buckets(of)):
        message = torch.cat([t.flatten() for t in bucket])
        send(message, i)
        for t, values in zip(bucket, message.split([t.numel() for t in bucket]), strict=True):
            t.copy_(values.view_as(t))


def buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return tensors in lists of up to BUCKET numbers of one dtype; a larger tensor is alone."""
    found, room = list[list[Tensor]](), 0
    for tensor in tensors:
        if not found or found[-1][0].dtype != tensor.dtype or tensor.numel() > room:
            found.append([])
            room = BUCKET
        found[-1].append(tensor)
        room -= tensor.numel()
    return found


def broadcast(tensors: Sequence[Sequence[Tensor]], group: Any) -> None:
    """Give all ranks of a group the tensors of list i as its rank i has them."""
    in_messages(tensors, lambda flat, of: dist.broadcast(flat, group=group, group_src=of))


@torch.no_grad()
def sum_to_owners(by_owner: Sequence[Sequence[Tensor]], group: Any) -> None:
    """Sum the gradients of list i over a group. Only its rank i has them afterwards."""
    grads = [[p.grad for p in of if p.grad is not None] for of in by_owner]
    in_messages(grads, lambda flat, to: dist.reduce(flat, group=group, group_dst=to))
    for p in (p for i, of in enumerate(by_owner) if i != dist.get_rank(group) for p in of):
        p.grad = None


# --- the mesh


T = TypeVar("T")


class Mesh:
    """A process in the mesh. All make it together, and call its methods in the same order."""

    def __init__(self, config: ParallelConfig | None = None, device: torch.device | None = None) -> None:
        self.config: ParallelConfig
        self.config = config = config or ParallelConfig()
        self.size: int = dist.get_world_size() if dist.is_initialized() else 1
        self.rank: int = dist.get_rank() if self.size > 1 else 0
        self.parts: int = config.parts(self.size)
        """Number of parts of the batch, dp x ep."""
        self.pp_index: int
        self.part: int
        self.pp_index, self.part = divmod(self.rank, self.parts)
        self.ep_index: int = self.part % config.ep
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
        self.owner: dict[Tensor, int] = {}
        """The rank that alone moves a matrix by Muon, and alone has its summed gradient and its momentum, of those that
        hold it alike; without the matrices that no other rank holds."""
        self.groups: dict[str, Any] = {}
        if self.size > 1:
            names, shape = ("pp", "dp", "ep"), (config.pp, self.parts // config.ep, config.ep)
            kind = "cpu" if device is None else device.type

            def make() -> dict[str, DeviceMesh]:
                whole = init_device_mesh(kind, shape, mesh_dim_names=names)
                return {name: whole[name] for name in names} | {"parts": whole["dp", "ep"]._flatten("parts")}

            self.meshes: dict[str, DeviceMesh] = self._in_time(make)
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
            n = model.config.n_routed_experts // self.config.ep
            first, exchange = self.ep_index * n, ExpertExchange(self.groups["ep"])
            for moe in moe_layers(model):
                moe.exchange = exchange
                moe.experts.first = first
                for name, stacked in list(moe.experts.named_parameters()):
                    setattr(moe.experts, name, nn.Parameter(stacked.detach()[first : first + n].clone()))
        if self.zero:
            dp = self.meshes["dp"] if self.config.ep > 1 else None
            shard(model, [*model.layers, *model.mtp], self.zero, self.meshes["parts"], dp)
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

    def pipeline(self, model: Transformer) -> Pipeline | None:
        """Return what runs forwards and backwards through the stages of all ranks; None without a pipeline."""
        if self.layout is None:
            return None
        dtype = model.compute_dtype or torch.float32
        return Pipeline(model, self.layout, self.config.schedule, self.groups["pp"], dtype)

    def begin_part(self, model: nn.Module, last: bool) -> None:
        """Choose what is sent after the next backward: gradients and memory of a step's last part, or less before."""
        for module in sharded_modules(model):
            module.set_requires_gradient_sync(last or self.zero >= 2, recurse=False)
            module.set_reshard_after_backward(last or self.zero == 3, recurse=False)

    def release(self, model: nn.Module) -> None:
        """Free gathered parameters, which no backward frees, or which were changed outside of a step."""
        for module in sharded_modules(model):
            module.reshard()

    # --- who holds what

    def holders(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the ranks that hold the same values as this one in a parameter or a buffer."""
        if self.size == 1 or local(tensor) is not tensor:
            return (self.rank,)
        if tensor in self.shared_by_ends:
            last = self.config.pp - 1
            return tuple(stage * self.parts + part for stage in (0, last) for part in range(self.parts))
        return tuple(dist.get_process_group_ranks(self.groups["dp" if tensor in self.own_experts else "parts"]))

    def _by_holders(self, parameters: Iterable[Tensor]) -> list[tuple[list[Tensor], Any]]:
        """Return those that all parts of the batch hold alike, and the experts, each with the group that does."""
        common, own = [], []
        for p in parameters:
            (own if p in self.own_experts else common).append(p)
        return [(common, self.groups["parts"]), (own, self.groups["dp"])]

    def piece(self, parameter: Tensor) -> HeldRows:
        """Return which piece of the whole model's parameter this rank holds."""
        first, shape, here = first_row(parameter), tuple(parameter.shape), local(parameter)
        if parameter in self.own_experts:
            first, shape = first + self.ep_index * shape[0], (shape[0] * self.config.ep, *shape[1:])
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
        packed = torch.cat([t.detach().cpu().double().flatten() for t in tensors])
        dist.all_reduce(packed)
        split = packed.split([t.numel() for t in tensors])
        return [of.view(t.shape).to(t.device, t.dtype) for of, t in zip(split, tensors, strict=True)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over the ranks that hold the same parameter; Muon's at owners alone."""
        if self.size == 1 or self.zero:  # FSDP2 has summed them
            return
        for by_owner, group in self._by_owner():
            sum_to_owners(by_owner, group)
        for_all = [p for p in parameters if p.grad is not None and p not in self.owner]
        for held_alike, group in self._by_holders(for_all):
            sum_all_gradients([p.grad for p in held_alike], group)
        if self.ends is not None:
            sum_all_gradients([p.grad for p in for_all if p in self.shared_by_ends], self.ends)

    @torch.no_grad()
    def squared_norms(self, model: nn.Module) -> Tensor:
        """Return the squared norms of this rank's gradients, FP64, by their place in `names`.

        Over all ranks each element of the whole model's gradient counts once: in the sum of what they return.
        """
        squares = torch.zeros(len(self.names), dtype=torch.float64)
        places = {name: place for place, name in enumerate(self.names)}
        counted = [
            (places[name], local(p.grad))
            for name, p in model.named_parameters()
            if p.grad is not None and self.owner.get(p, self.holders(p)[0]) == self.rank
        ]
        if counted:
            norms = torch._foreach_norm([grad for _, grad in counted])  # pyright: ignore[reportPrivateImportUsage]
            squares[[place for place, _ in counted]] = torch.stack(list(norms)).cpu().double().square()
        return squares

    # --- Muon

    def owned(self, matrices: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the matrices that Muon moves on this rank; `exchange_moved` gives it those that others have moved."""
        for held_alike, group in self._by_holders(matrices) if self.size > 1 and not self.zero else ():
            ranks = dist.get_process_group_ranks(group)
            if len(ranks) > 1:
                for rank, of in zip(ranks, owners_of(held_alike, len(ranks)), strict=True):
                    self.owner.update(dict.fromkeys(of, rank))
        return [p for p in matrices if not self.moved_elsewhere(p)]

    def moved_elsewhere(self, parameter: Tensor) -> bool:
        """Return whether another rank moves a parameter by Muon."""
        return self.owner.get(parameter, self.rank) != self.rank

    def _by_owner(self) -> Iterator[tuple[list[list[Tensor]], Any]]:
        """Yield the matrices that each rank of a group owns, and the group."""
        for owned, group in self._by_holders(self.owner) if self.owner else ():
            yield [[p for p in owned if self.owner[p] == rank] for rank in dist.get_process_group_ranks(group)], group

    def exchange_moved(self) -> None:
        """Get the matrices that Muon has moved on other ranks."""
        for by_owner, group in self._by_owner():
            broadcast(by_owner, group)


def sum_all_gradients(gradients: Sequence[Tensor | None], group: Any) -> None:
    """Replace tensors by their sums over a group."""
    if dist.get_world_size(group) > 1:
        in_messages([[g for g in gradients if g is not None]], lambda flat, _: dist.all_reduce(flat, group=group))


# --- the own part of a new model


Rows = Callable[[str, slice], Tensor]
"""Returns rows of a tensor of a whole model, by its name in the state dict."""


def divided_model(config: ModelConfig, mesh: Mesh) -> Transformer:
    """Return a rank's part of a new model, without memory, for `fill`. All ranks call it together."""
    model = meta_model(config)
    mesh.divide(model)
    return model


@torch.no_grad()
def fill(model: Transformer, mesh: Mesh, device: torch.device, rows: Rows | None = None) -> None:
    """Allocate the memory of a rank's part of a model and give it values, without ever holding more.

    Without rows to read, a rank draws its own. The bits are those of a single process, and so is the state of torch's
    generator afterwards.

    Args:
        rows: reads them, and only the own. None: they are drawn, by one number of torch's own generator.
    """
    allocate(model, mesh, device)
    if rows is None:
        model.reset_parameters()
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        piece = mesh.piece(tensor)
        if piece.rows:
            local(tensor).copy_(rows(name, slice(piece.first, piece.first + piece.rows)))


def allocate(model: Transformer, mesh: Mesh, device: torch.device) -> None:
    """Give a rank's part of a model its memory, without values."""
    model.to_empty(device=device)
    mesh.note(model)


# --- silent corruption


def unequal_replicas(world: World, held: Mapping[tuple[int, ...], Mapping[str, Tensor]]) -> tuple[list[int], str]:
    """Return the ranks that hold a tensor unequally, and the finding in words; none and "" if nothing is unequal.

    A bit that flips in the memory of one rank raises no error. Its parameters then differ from those of the others, and
    every step spreads that into their gradients. A hash of each rank's bits shows it.

    With three ranks or more the one that is alone is named; of two, both are.

    A tensor that one rank alone computes has no replica to compare: divided parameters (parallel.zero), and matrices
    that Muon moves at their owner and then sends to all. A bit that flips there is adopted by all.

    Source: Llama 3 report, section 3.3.4 (silent data corruption was the cause of 6 of 419 interruptions).

    Args:
        held: tensors that several ranks hold alike, by those ranks and by name.
    """
    mine = {(holders, name): hashed(t) for holders, named in held.items() for name, t in named.items()}
    everyone = world.gather(mine)
    for holders, name in sorted({key for of_rank in everyone for key in of_rank}):
        # the momentum of a matrix is at one of the ranks alone
        hashes = {rank: value for rank in holders if (value := everyone[rank].get((holders, name))) is not None}
        (most, count), *others = Counter(hashes.values()).most_common()
        if others and 2 * count > len(hashes):
            ranks = [rank for rank, value in hashes.items() if value != most]
            words = f"ranks {', '.join(map(str, ranks))} differ" if ranks[1:] else f"rank {ranks[0]} differs"
            return ranks, f"{words} in {name}"
        if others:
            return list(hashes), f"ranks {', '.join(map(str, hashes))} hold unequal copies of {name}"
    return [], ""


def hashed(tensor: Tensor) -> str:
    """Return a hash of a tensor's bits: on a GPU the XOR of its numbers, which one bit that flips changes."""
    if tensor.is_cuda and tensor.numel() and hasattr(torch, "hash_tensor"):  # torch 2.9 may lack it
        bits = tensor.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
        return str(torch.hash_tensor(bits).item())
    return hashlib.sha256(bytes_of(tensor)).hexdigest()
