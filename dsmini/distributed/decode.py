"""Several processes of dsmini.generate share a model: its experts are divided among them, and all have the same tokens.

Every rank runs the same sequences through attention, gates and shared experts. It computes the token-expert pairs of
its own routed experts, and the weighted sums are added over the ranks:

    1. the pairs of own experts, a part of the n k            every rank knows them: the gates agree
    2. run the experts on their rows, weight them, sum by token                                    [n, m] FP32
    3. all-reduce of that sum, shared experts meanwhile                                            4 n m bytes

The exchange of training (`ExpertExchange`) would send each row to its expert and its result back: from n ranks with
equal tokens that is n times the products. It fits ranks with tokens of their own.

Rank r of n holds experts r e/n ... (r + 1) e/n - 1 of each layer.

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
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.checkpoint.run_folder import is_model_folder
from dsmini.checkpoint.training_state import model_checkpoint
from dsmini.config.fields import require
from dsmini.distributed.expert_parallel import moe_layers
from dsmini.distributed.meeting import asked_to_stop, launched, told
from dsmini.distributed.world import World, device_of_rank, joined, threads_of_rank
from dsmini.machine import pick_device
from dsmini.nn import Transformer
from dsmini.nn.gate import Routing
from dsmini.nn.moe import Experts
from dsmini.numerics import rows_of

TIMEOUT = 300.0
"""Seconds after which a process that does not answer ends the others."""
LONGEST_WAIT = 24 * 3600.0
"""The same in a conversation, where all wait for a person."""


class SharedTokens:
    """The exchange of a MoE layer on ranks that all have the same tokens. All ranks call it together.

    Args:
        rank: this one, of `size`.
        pairs: adds up the token-expert pairs that this rank computed, and that all ranks together had to, [2].
    """

    def __init__(self, rank: int, size: int, pairs: Int[Tensor, "2"]) -> None:
        self.rank, self.size, self.pairs = rank, size, pairs

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
        own = len(routing.counts) // self.size
        mine = routing.indices // own == self.rank
        token, choice = mine.nonzero(as_tuple=True)
        self.pairs += torch.tensor([len(token), mine.numel()])
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if not len(token):
            return y
        expert = routing.indices[token, choice] - self.rank * own
        weight = routing.weights[token, choice]
        counts = torch.bincount(expert, minlength=own)
        if len(y) == 1:  # decoding one row: its experts' weighted sum is one call
            return experts(x, expert[None], weight[None], counts).float()
        rows = experts(rows_of(x, token), expert[:, None], torch.ones_like(weight)[:, None], counts)
        return y.index_add_(0, token, rows.float() * weight[:, None])


class Sharing:
    """A process of dsmini.generate: alone, or one of several that share a model.

    Args:
        device: of this process.
    """

    def __init__(
        self,
        world: World,
        device: str = "cpu",
    ) -> None:
        self.world, self.device = world, device
        self.alone = world.size == 1
        self.pairs = torch.zeros(2, dtype=torch.int64)
        """Token-expert pairs of this step that this rank computed, and that all ranks together had to."""
        self.stop: Callable[[], bool] = lambda: False
        """Says whether this process was asked to stop."""

    def load(self, path: Path, average: bool, say: Callable[[str], None], load: Callable[..., Any]) -> Any:
        """Return load(path, share=..., verified=...), of whose result the first is a model. Its experts are divided.

        Args:
            say: told about each damaged checkpoint that is passed over.
        """
        if self.alone:
            return load(path)

        def whole_folder() -> Path:  # compared with its checksums once
            return path if is_model_folder(path) else model_checkpoint(path, average=average, say=say).folder

        whole = self.world.first(whole_folder)
        loaded = self.world.together(lambda: load(whole, share=(self.world.rank, self.world.size), verified=True))
        self.connect(loaded[0])
        return loaded

    def connect(self, model: Transformer) -> None:
        """Let the layers of a model of which this process has its share sum over the ranks."""
        for moe in moe_layers(model):
            moe.exchange = SharedTokens(self.world.rank, self.world.size, self.pairs)

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
    *,
    waits: bool = False,
) -> Iterator[Sharing]:
    """Join the processes that a launcher started, and yield what they share; without a launcher, a process alone.

    Args:
        command: must be equal on all.
        device: as dsmini.generate takes it.
        waits: a person is asked meanwhile.

    Raises: ValueError if the processes cannot be reached, or were started with unequal commands.
    """
    if launched()[1] == 1:
        yield Sharing(World(), device)
        return
    device = device_of_rank(device)
    if threads := threads_of_rank(None):
        torch.set_num_threads(threads)
    with joined(TIMEOUT, pick_device(device), longest_wait=LONGEST_WAIT if waits else None) as world:
        try:
            commands = world.gather(repr(command))
            unequal = [rank for rank, other in enumerate(commands) if other != commands[0]]
            require(
                not unequal,
                f"rank {unequal[0] if unequal else 0} was started with other flags than rank 0; start all processes "
                "with the same command",
            )
            yield Sharing(world, device)
        except ValueError as error:  # of the model, the prompts and the flags, which are the same on all
            raise told(error) from None
