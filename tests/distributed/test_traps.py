"""Mistakes that make several processes silently wrong: each is put in, and the comparison must see it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dsmini.distributed import data_parallel
from dsmini.distributed.drawing import ModelPart
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.pieces import HeldRows
from dsmini.distributed.world import Joined, World, joined
from dsmini.functional.cross_entropy import IGNORE
from tests.distributed.ranks import new_store, outcomes, run_ranks
from tests.distributed.runs import far_apart, held_pieces, new_run, new_trainer, run, statuses
from tests.helpers.tolerances import FP32_MODEL

pytestmark = pytest.mark.slow
Seen = dict[str, Any]


def one_step(world: World, parallel: dict[str, Any], train: dict[str, Any], ignore: bool) -> Seen:
    """Take a step whose gradients are clipped; return what it computed, and the pieces of this rank."""
    trainer = new_trainer(world, parallel, {}, {"grad_clip": 0.1} | train)
    real = trainer._batch

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        tokens, targets = real(rows)
        first = trainer.ranks.place.part * len(targets)
        targets = targets.clone()
        targets[[row for row in range(len(targets)) if first + row < 4]] = IGNORE  # half of the step's rows
        targets[:, 0] = 7
        return tokens, targets

    if ignore:
        trainer._batch = batch
    gradients: dict[str, tuple[HeldRows, Tensor]] = {}
    clip = trainer.ranks.clip

    def clipped(parameters: Any, most: float) -> Tensor:
        norm = clip(parameters, most)
        for name, p in trainer.model.named_parameters():
            if p.grad is not None:
                gradients[name] = trainer.ranks.piece(p), trainer.ranks.local(p.grad).clone()
        return norm

    trainer.ranks.clip = clipped
    result = trainer.step()
    return {
        "losses": torch.tensor([result.loss, result.mtp_loss, result.balance_loss]),
        "norm": torch.tensor(result.grad_norm),
        "counts": result.counts,
        "gradients": gradients,
        "bias": torch.stack([gate.bias for gate in trainer.model.gates()]),
        "shapes": {name: piece.shape for name, (piece, _) in held_pieces(trainer).items()},
    }


def wrong(ranks: list[Seen], want: Seen) -> list[str]:
    """Return what differs on a rank by more than the order of sums allows."""
    found = [n for n in ("counts", "bias") if not all(torch.equal(got[n], want[n]) for got in ranks)]
    found += ["shapes"] if any(got["shapes"] != want["shapes"] for got in ranks) else []
    found += [n for n in ("losses", "norm") if any((got[n] - want[n]).abs().max() > _allowed(want[n]) for got in ranks)]
    whole = {name: gradient for name, (_, gradient) in want["gradients"].items()}
    return found + far_apart([got["gradients"] for got in ranks], whole, _allowed)


def _allowed(want: Tensor) -> float:
    return FP32_MODEL * max(want.abs().max().item(), 1e-6)


# --- the mistakes


def experts_summed_over_ep() -> Any:
    real = Mesh.sum_gradients

    def sum_gradients(self: Mesh, parameters: Any) -> None:
        real(self, parameters)
        for p in self.own_experts:  # as a second sum over ep would, of equal tokens
            if p.grad is not None:
                p.grad.mul_(self.config.ep)

    return mock.patch.object(Mesh, "sum_gradients", sum_gradients)


def experts_divided_by_fsdp() -> Any:
    real = data_parallel.shard

    def shard(model: Any, *args: Any) -> None:
        real(model, *args)
        for module in data_parallel.sharded_modules(model):
            if type(module).__name__.endswith("Experts"):
                module.set_gradient_divide_factor(2.0)

    return mock.patch.object(data_parallel, "shard", shard)


def copies_in_the_norm() -> Any:
    def gradient_norm(self: Mesh, parameters: Any) -> Tensor:
        squared = sum(self.local(p.grad).square().sum() for p in parameters if p.grad is not None)
        assert isinstance(squared, Tensor)
        dist.all_reduce(squared, group=self.ep)  # what all ep ranks hold alike counts ep times
        return squared.sqrt()

    return mock.patch.object(Mesh, "gradient_norm", gradient_norm)


def not_summed(dims: int) -> Any:
    """Leave integers of so many dimensions out of the sums: 0 is the number of targets, 2 the loads of experts."""
    real = Mesh.sum_parts

    def sum_parts(self: Mesh, *tensors: Tensor) -> None:
        real(self, *(t for t in tensors if t.is_floating_point() or t.dim() != dims))
        if dims == 0:  # as if the loss were the mean of the ranks' means
            for t in tensors:
                if not t.is_floating_point() and t.dim() == 0:
                    t.mul_(self.place.parts)

    return mock.patch.object(Mesh, "sum_parts", sum_parts)


def bf16_gates() -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return mock.patch.object(data_parallel, "fully_shard", partial(fully_shard, mp_policy=policy))


@contextmanager
def experts_renumbered() -> Iterator[None]:
    """Let each rank number its experts from 0, once the model is made."""
    rightly, fill = Mesh.piece, ModelPart.fill

    def fill_rightly(self: ModelPart, device: torch.device) -> None:
        with mock.patch.object(Mesh, "piece", rightly):
            fill(self, device)

    def piece(self: Mesh, parameter: Tensor) -> HeldRows:
        here = self.local(parameter)
        first, _ = data_parallel.first_row(parameter)
        return HeldRows(shape=tuple(parameter.shape), first=first, rows=here.shape[0] if here.dim() else 1)

    with mock.patch.object(Mesh, "piece", piece), mock.patch.object(ModelPart, "fill", fill_rightly):
        yield


EP, EP_DP, EP_ZERO, ZERO = {"ep": 2, "dp": 1}, {"ep": 2}, {"ep": 2, "zero": 3}, {"zero": 3}
TRAPS: dict[str, tuple[int, dict[str, Any], dict[str, Any], bool, Callable[[], Any], str]] = {
    "experts scaled twice": (2, EP, {}, False, experts_summed_over_ep, "experts"),
    "experts scaled twice by FSDP2": (4, EP_ZERO, {}, False, experts_divided_by_fsdp, "experts"),
    "copies in the norm": (2, EP, {}, False, copies_in_the_norm, "norm"),
    "counts not summed": (4, EP_DP, {}, False, partial(not_summed, 2), "bias"),
    "local number of targets": (2, EP, {}, True, partial(not_summed, 0), "losses"),
    "gates in BF16": (2, ZERO, {}, False, bf16_gates, "gate"),
    "experts renumbered": (2, EP, {}, False, experts_renumbered, "shapes"),
}


def with_and_without(world: World, name: str) -> tuple[Seen, Seen]:
    _, parallel, train, ignore, bug, _ = TRAPS[name]
    good = one_step(world, parallel, train, ignore)
    with bug():
        return good, one_step(world, parallel, train, ignore)


@pytest.mark.parametrize("name", TRAPS)
def test_trap_is_avoided_and_its_bug_is_seen(name: str) -> None:
    n, _, train, ignore, _, sees = TRAPS[name]
    want = one_step(World(), {}, train, ignore)
    good, bad = zip(*run_ranks(n, with_and_without, name), strict=True)
    assert wrong(good, want) == []
    assert any(sees in one for one in wrong(bad, want)), wrong(bad, want)


# --- mistakes that end in a hang or an error


def saving_behind(world: World, folder: Path, bug: bool) -> bool:
    """Train with saves in the background, in which rank 1 is late."""
    if bug:
        Joined.fork = lambda self: self
    training = new_run(world, folder, {"ep": 2}, save_in_background=True)
    training.saver.at = lambda phase: time.sleep(0.2 * world.rank)
    return training.train()


def test_save_in_the_background_has_a_group_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(2, saving_behind, tmp_path / "good", False) == [True, True]
    ends = outcomes(2, saving_behind, tmp_path / "bad", True, timeout=3.0, seconds=8.0)
    assert [end.value for end in ends] != [True, True]


def stopping(world: World, folder: Path, bug: bool) -> bool:
    """Train; a signal comes to rank 1 in step 3."""
    if bug:
        Joined.any = lambda self, flag: flag
    return run(world, folder, {"ep": 2}, until=3, save_every=100)


def test_stop_flag_of_one_rank_stops_all(tmp_path: Path) -> None:
    assert run_ranks(2, stopping, tmp_path / "good", False) == [False, False]
    ends = outcomes(2, stopping, tmp_path / "bad", True, timeout=3.0, seconds=8.0)
    assert statuses(ends) != [0, 0]


def test_restart_on_the_same_store_needs_a_prefix(tmp_path: Path) -> None:
    store = new_store()
    for attempt in (0, 1):
        ends = outcomes(2, world_sum, store=store, attempt=attempt, timeout=5.0)
        assert [end.value for end in ends] == [2, 2]
    # As without a prefix of its own: rank 0 finds the dead rank's address, since the living one comes later. Of two
    # ranks the one with the lower port waits for the other, so the address matters in half of the attempts.
    ends = (outcomes(2, late_sum, store=store, attempt=1, timeout=None, seconds=4.0) for _ in range(16))
    assert any([end.value for end in one] != [2, 2] for one in ends)


def world_sum(world: World) -> int:
    one = torch.ones((), dtype=torch.int64)
    dist.all_reduce(one)
    return int(one)


def late_sum() -> int:
    """Join the others, rank 1 last, and add up."""
    time.sleep(0.5 * int(os.environ["RANK"]))
    with joined(2.0) as world:
        return world_sum(world)
