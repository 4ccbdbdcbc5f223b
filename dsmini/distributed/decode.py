"""Several processes of dsmini.generate share a model: its experts are divided among them, and all have the same tokens.

Every rank runs the same sequences through attention, gates and shared experts. It computes the token-expert pairs of
its own routed experts, and the weighted sums are added over the ranks:

    1. the pairs of own experts, a part of the n k            every rank knows them: the gates agree
    2. run the experts on their rows, weight them, sum by token                                    [n, m] FP32
    3. all-reduce of that sum, shared experts meanwhile                                            4 n m bytes

The exchange of training (`ExpertExchange`) would send each row to its expert and its result back: from n ranks with
equal tokens that is n times the products. It fits ranks with tokens of their own.

Rank r of n holds experts r e/n ... (r + 1) e/n - 1 of each layer, or what a placement says: of its P places of a layer,
rank r has r P/n ... (r + 1) P/n - 1. The copies of an expert take turns: pair number j of token t goes to copy (t + j)
mod copies. All ranks compute that alike, and send no word about it (DeepSeek-V3 report, section 3.4).

The sums over the ranks have another order of additions than one process, and are the same bits on all ranks. So with
equal machines, threads and seeds all ranks draw the same tokens, which `Sharing.agree` compares after each step. Rank 0
reads the prompts and shows the texts.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsmini.checkpoint.run_folder import is_model_folder
from dsmini.checkpoint.training_state import model_checkpoint
from dsmini.config.fields import require
from dsmini.distributed.expert_parallel import moe_layers
from dsmini.distributed.meeting import asked_to_stop, launched, told
from dsmini.distributed.world import World, joined, own_share
from dsmini.nn import Transformer
from dsmini.nn.gate import Routing
from dsmini.nn.moe import Experts
from dsmini.numerics import rows_of
from dsmini.reading import brief, read_json

TIMEOUT = 300.0
"""Seconds after which a process that does not answer ends the others."""
LONGEST_WAIT = 24 * 3600.0
"""The same in a conversation, where all wait for a person."""
Places = Sequence[Sequence[int]]
"""Expert at each place, [layers, places], redundant copies included."""


def held_by_ranks(model: Transformer, n_ranks: int, placement: Places | None) -> list[Bool[Tensor, "ranks e"]]:
    """Return which rank holds which experts, for each layer with experts in the order of modules (MTP blocks last).

    Args:
        model: may be on the meta device.
        placement: None: experts in order, each once.

    Raises: ValueError for a model without experts, and for ranks or a placement that do not fit it.
    """
    layers, e = len(moe_layers(model)), model.config.n_routed_experts
    require(
        layers > 0,
        f"the model has no experts to divide among {n_ranks} processes; start one process, without torchrun",
    )
    if placement is None:
        fit = max(n for n in range(1, n_ranks + 1) if e % n == 0)
        require(fit == n_ranks, f"{e} experts are not divisible by {n_ranks} processes; start {fit}, say")
        placement = [range(e)] * layers
    require(
        len(placement) == layers,
        f"the placement has {len(placement)} layers, and the model has {layers} with experts, MTP blocks included; "
        "make it from loads of this model",
    )
    every = []
    for layer, places in enumerate(placement):
        where = f"layer {layer} of the placement"
        require(
            len(places) > 0 and len(places) % n_ranks == 0,
            f"{where} has {len(places)} places, not divisible by {n_ranks} processes; use a multiple of {n_ranks}",
        )
        strange, missing = set(places) - set(range(e)), set(range(e)) - set(places)
        require(not strange, f"{where} names expert {min(strange, default=0)}; the model has experts 0 to {e - 1}")
        require(not missing, f"{where} has no place for expert {min(missing, default=0)}; give each expert one or more")
        of_rank = torch.tensor(places).view(n_ranks, -1)
        every.append(torch.zeros(n_ranks, e, dtype=torch.bool).scatter(1, of_rank, True))
    return every


class SharedTokens:
    """The exchange of a MoE layer on ranks that all have the same tokens. All ranks call it together.

    Args:
        held: which rank holds which experts.
        pairs: adds up the token-expert pairs that this rank computed, and that all ranks together had to, [2].
    """

    def __init__(self, held: Bool[Tensor, "ranks e"], rank: int, pairs: Int[Tensor, "2"]) -> None:
        self.rank, self.pairs = rank, pairs
        self.row = held[rank].cumsum(0) - 1
        """Row of each own expert in this rank's stacked tensors."""
        self.copies, self.holders = held.sum(0), held.T.int().argsort(dim=1, descending=True, stable=True)
        """Number of ranks that hold each expert; those ranks first, ascending."""

    def rank_of_pairs(self, indices: Int[Tensor, "n k"]) -> Int[Tensor, "n k"]:
        """Return the rank that computes each token-expert pair."""
        rows, choices = (torch.arange(size, device=indices.device) for size in indices.shape)
        turn = (rows[:, None] + choices) % self.copies.to(indices.device)[indices]
        return self.holders.to(indices.device)[indices, turn]

    def __call__(self, experts: nn.Module, shared: nn.Module | None, x: Any, routing: Routing) -> Float[Tensor, "n m"]:
        """Return the sum of each token's experts, routed and shared, as MoE does.

        Raises: ValueError while gradients are recorded: backward would not sum them over the ranks.
        """
        require(
            not torch.is_grad_enabled(),
            "the experts of this model are divided for inference, where no gradient passes; use torch.no_grad()",
        )
        assert isinstance(experts, Experts)
        y = self._own(experts, x, routing)
        work: Any = dist.all_reduce(y, async_op=True)
        y_shared = None if shared is None else shared(x)
        work.wait()
        y = y.to(x.dtype)
        return y if y_shared is None else y + y_shared

    def _own(self, experts: Experts, x: Any, routing: Routing) -> Float[Tensor, "n m"]:
        """Return the FP32 sums of this rank's token-expert pairs."""
        mine = self.rank_of_pairs(routing.indices) == self.rank
        token, choice = mine.nonzero(as_tuple=True)
        self.pairs += torch.tensor([len(token), mine.numel()])
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if not len(token):
            return y
        expert = self.row.to(token.device)[routing.indices[token, choice]]
        weight = routing.weights[token, choice]
        if len(y) == 1:  # decoding one row: its experts' weighted sum is one call
            return experts(x, expert[None], weight[None]).float()
        rows = experts(rows_of(x, token), expert[:, None], torch.ones_like(weight)[:, None])
        return y.index_add_(0, token, rows.float() * weight[:, None])


class Sharing:
    """A process of dsmini.generate: alone, or one of several that share a model.

    Args:
        device: of this process.
        placement: of the experts of the model; None: in order, each once.
    """

    def __init__(self, world: World, device: str = "cpu", placement: Places | None = None) -> None:
        self.world, self.device, self.placement = world, device, placement
        self.alone = world.size == 1
        self.pairs = torch.zeros(2, dtype=torch.int64)
        """Token-expert pairs of this step that this rank computed, and that all ranks together had to."""
        self.stop: Callable[[], bool] = lambda: False
        """Says whether this process was asked to stop."""

    def holding(self, model: Transformer) -> list[list[int]]:
        """Return the experts that this rank holds of each layer. Raises: as `held_by_ranks`."""
        every = held_by_ranks(model, self.world.size, self.placement)
        return [held[self.world.rank].nonzero().flatten().tolist() for held in every]

    def load(self, path: Path, average: bool, say: Callable[[str], None], load: Callable[..., Any]) -> Any:
        """Return load(path, holding=..., verified=...), of whose result the first is a model. Its experts are divided.

        Args:
            say: told about each damaged checkpoint that is passed over.
        """
        if self.alone:
            return load(path)

        def whole_folder() -> Path:  # compared with its checksums once
            return path if is_model_folder(path) else model_checkpoint(path, average=average, say=say).folder

        whole = self.world.first(whole_folder)
        loaded = self.world.together(lambda: load(whole, holding=self.holding, verified=True))
        self.connect(loaded[0])
        return loaded

    def connect(self, model: Transformer) -> None:
        """Let the layers of a model that was loaded with this holding sum over the ranks."""
        for moe, held in zip(moe_layers(model), held_by_ranks(model, self.world.size, self.placement), strict=True):
            moe.exchange = SharedTokens(held, self.world.rank, self.pairs)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Let a signal to any process end a generation on all of them, after the same step."""
        if self.alone:
            yield
            return
        with asked_to_stop() as asked:
            self.stop = lambda: bool(asked.numbers)
            yield

    def agree(self, picked: Sequence[Sequence[int]]) -> None:
        """Compare the ranks after a step of a generation: they must have drawn the same tokens and lost no pair.

        Raises: KeyboardInterrupt on all ranks if one was asked to stop. ValueError on all if they do not agree.
        """
        mine = torch.tensor([self.stop(), hash(tuple(map(tuple, picked))), *self.pairs.tolist()])
        self.pairs.zero_()
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        stops, drawn, computed, wanted = torch.stack(everyone).unbind(1)
        if stops.any():
            raise KeyboardInterrupt
        if (drawn != drawn[0]).any() or (wanted != computed.sum()).any():
            raise told(
                ValueError(
                    "the processes computed different numbers from the same tokens, so they cannot share a model; "
                    "start all on machines of one kind, with the same number of threads"
                )
            )


@contextlib.contextmanager
def sharing(
    command: object,
    device: str,
    placement: Path | None = None,
    *,
    waits: bool = False,
) -> Iterator[Sharing]:
    """Join the processes that a launcher started, and yield what they share; without a launcher, a process alone.

    Args:
        command: must be equal on all.
        device: as dsmini.generate takes it.
        placement: file for `read_placement`.
        waits: a person is asked meanwhile.

    Raises: ValueError if the processes cannot be reached, or were started with unequal commands.
    """
    if launched()[1] == 1:
        require(
            placement is None,
            f"--placement {placement} divides experts among processes, and there is one; start torchrun "
            "--nproc-per-node 2 -m dsmini.generate, or leave it out",
        )
        yield Sharing(World(), device)
        return
    own = own_share(device, None)
    with joined(TIMEOUT, own, longest_wait=LONGEST_WAIT if waits else None) as world:
        try:
            world.refuse_unequal(vars(command))
            places = None if placement is None else world.first(lambda: read_placement(placement))
            yield Sharing(world, str(own), places)
        except ValueError as error:  # of the model, the prompts and the flags, which are the same on all
            raise told(error) from None


def read_placement(path: Path) -> list[list[int]]:
    """Read the expert at each place, [layers, places], from a JSON file: this table, or an object with it as "experts".

    Raises: ValueError for anything else.
    """
    content = read_json(path)
    table: Any = content.get("experts") if isinstance(content, dict) else content
    good = isinstance(table, list) and all(
        isinstance(row, list) and all(type(expert) is int for expert in row) for row in table
    )
    require(good, f"{path} holds {brief(table)}, want a list of layers, each a list of experts' numbers")
    return table
