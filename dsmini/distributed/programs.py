"""Programs of pipeline schedules: the ordered actions of every rank, without any process.

The orders are those of torch.distributed.pipelining, so that a picture of them is a picture of what runs. DualPipe,
with two copies of the weights, is not in torch; its program is below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dsmini.config.parallel import CHUNKS as STAGES
from dsmini.distributed.timelines import KINDS, Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One action of a rank, on one stage and one micro-batch."""

    kind: Kind
    """F forward, B the whole backward, I the backward of the input, W the backward of the weights."""
    stage: int
    microbatch: int
    overlaps: bool = False
    """The action runs together with the next one: a forward and a backward that hide each other's communication."""


Programs = Sequence[Sequence[Action]]
"""For each rank its actions, in order."""

CHUNKS: Mapping[str, int] = {**STAGES, "dualpipe": 1}
"""Stages of the model for each rank. A rank of DualPipe holds two, each for half of the micro-batches."""
_CLASSES = {
    "interleaved1f1b": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


def programs(name: str, n_ranks: int, n_microbatches: int) -> Programs:
    """Return the program of every rank.

    Stages are numbered through the model, micro-batches from 0. In DualPipe, the first half of the micro-batches enters
    at rank 0, the second half at the last rank.

    Args:
        name: a key of CHUNKS.

    Raises: ValueError for an unknown name, and for sizes that the schedule does not take.
    """
    _check(name, n_ranks, n_microbatches)
    if name == "1f1b":
        # torch's own list has the forwards of the last rank one micro-batch too high; its runtime does what is here
        return [_one_forward_one_backward(rank, n_ranks, n_microbatches) for rank in range(n_ranks)]
    if name == "dualpipe":
        return [_dualpipe(rank, n_ranks, n_microbatches) for rank in range(n_ranks)]
    from torch.distributed.pipelining import schedules

    n_stages = n_ranks * CHUNKS[name]
    stage: Any = {"group_size": n_ranks, "group_rank": 0, "num_stages": n_stages, "submod": None}
    stages = [SimpleNamespace(stage_index=i, **stage) for i in range(CHUNKS[name])]
    made = getattr(schedules, _CLASSES[name])(stages, n_microbatches)
    return [_actions(made.pipeline_order[rank]) for rank in range(n_ranks)]


def _check(name: str, n_ranks: int, n_microbatches: int) -> None:
    """Raise ValueError for a schedule that does not exist for these sizes."""
    if name not in CHUNKS:
        raise ValueError(f"there is no schedule '{name}'; use one of {', '.join(CHUNKS)}")
    if n_ranks < 1 or n_microbatches < 1:
        raise ValueError(f"{n_ranks} ranks with {n_microbatches} micro-batches run nothing; use 1 or more of each")
    if name == "dualpipe" and (n_ranks % 2 or n_microbatches % 2):
        raise ValueError(
            f"dualpipe takes an even number of ranks and of micro-batches, got {n_ranks} and {n_microbatches}; "
            f"use {n_ranks + n_ranks % 2} and {max(n_microbatches + n_microbatches % 2, 2 * n_ranks)}"
        )
    least = {"1f1b": n_ranks, "dualpipe": 2 * n_ranks, "dualpipev": 2 * n_ranks}.get(name, 1)
    if n_microbatches < least:
        raise ValueError(f"{name} on {n_ranks} ranks takes {least} micro-batches or more, got {n_microbatches}")
    rounds = max(1, n_microbatches // n_ranks)
    if name in ("interleaved1f1b", "zero_bubble") and n_microbatches % rounds:
        raise ValueError(
            f"{name} runs {n_microbatches} micro-batches on {n_ranks} ranks in {rounds} rounds, which are unequal; "
            f"use {rounds * n_ranks} or {(rounds + 1) * n_ranks}"
        )


def _actions(order: Sequence[Any]) -> list[Action]:
    """Return the computations of torch's order of a rank."""
    found: list[Action] = []
    for action in order:
        pair = [] if action is None else action.sub_actions or (action,)
        for i, one in enumerate(pair):
            if (kind := one.computation_type.value) in KINDS:
                overlaps = i + 1 < len(pair)
                found.append(Action(kind=kind, stage=one[0], microbatch=one[2], overlaps=overlaps))
    return found


def _one_forward_one_backward(rank: int, n_ranks: int, n_microbatches: int) -> list[Action]:
    """Return 1F1B: forwards until the first backward can come, then one of each in turns, then the other backwards."""
    ahead = min(n_microbatches, n_ranks - rank)
    found = [Action(kind="F", stage=rank, microbatch=i) for i in range(ahead)]
    for i in range(n_microbatches):
        found.append(Action(kind="B", stage=rank, microbatch=i))
        if ahead + i < n_microbatches:
            found.append(Action(kind="F", stage=rank, microbatch=ahead + i))
    return found


class _Writer:
    """The program of a rank of DualPipe while it is written: it counts micro-batches and pending weight backwards."""

    def __init__(self, rank: int, n_ranks: int, n_microbatches: int) -> None:
        there, back = (rank, 0), (n_ranks - 1 - rank, n_microbatches // 2)
        # the stage and the first micro-batch of directions 0 and 1; the ranks of the second half swap them
        self.directions = (there, back) if rank < n_ranks // 2 else (back, there)
        self.counts = {(kind, d): 0 for kind in "FB" for d in (0, 1)}
        self.pending: list[tuple[int, int]] = []
        self.actions: list[Action] = []

    def add(self, kind: Kind, direction: int, overlaps: bool = False) -> None:
        """Append the next F, B or I of a direction. The W of an I is pending until `weights` is called."""
        stage, first = self.directions[direction]
        key = ("F" if kind == "F" else "B", direction)
        microbatch = first + self.counts[key]
        self.counts[key] += 1
        self.actions.append(Action(kind=kind, stage=stage, microbatch=microbatch, overlaps=overlaps))
        if kind == "I":
            self.pending.append((stage, microbatch))

    def weights(self) -> None:
        """Append the oldest pending W."""
        stage, microbatch = self.pending.pop(0)
        self.actions.append(Action(kind="W", stage=stage, microbatch=microbatch))

    def pair(self, forward: int, backward: int, overlaps: bool = True) -> None:
        """Append an overlapped forward and backward."""
        self.add("F", forward, overlaps)
        self.add("B", backward)


def _dualpipe(rank: int, n_ranks: int, n_microbatches: int) -> list[Action]:
    """Return DualPipe, where micro-batches enter at both ends. Source: github.com/deepseek-ai/DualPipe, 3da1bbe."""
    half, h = n_ranks // 2, min(rank, n_ranks - 1 - rank)
    far = half - h - 1  # distance from the middle
    write = _Writer(rank, n_ranks, n_microbatches)
    for _ in range(2 * far):
        write.add("F", 0)
    for _ in range(h + 1):
        write.add("F", 0)
        write.add("F", 1)
    for _ in range(far):
        write.add("I", 1)
        write.weights()
        write.add("F", 1)
    for i in range(n_microbatches // 2 - n_ranks + h + 1):
        # the middle ranks do not overlap their first pair: the backward would wait for its forward
        write.pair(0, 1, overlaps=i > 0 or far > 0)
        write.pair(1, 0)
    for _ in range(far):
        write.add("B", 1)
        write.pair(1, 0)
    for i in range(2 * (h + 1)):  # B1 and B0 in turns, the second half split
        write.add("B" if i < h + 1 else "I", 1 - i % 2)
    for _ in range(far):
        write.weights()
        write.add("I", 0)
    for _ in range(h + 1):
        write.weights()
    return write.actions
