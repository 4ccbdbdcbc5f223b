"""Fewer ranks than before, and more again; and experts without a token."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dsmini.distributed.mesh import local
from dsmini.distributed.world import World
from dsmini.training.optim import optimizer_state
from dsmini.training.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import RECIPE, STEPS, assert_near, new_trainer, run
from tests.helpers.runs import untimed
from tests.helpers.tolerances import FP32_MODEL

pytestmark = pytest.mark.slow
ROWS = RECIPE["batch_size"]


def recorded(world: World, folder: Path, until: int) -> list[tuple[int, list[int]]]:
    """Train until a step; return the sequences that this rank took in each step."""
    taken: list[tuple[int, list[int]]] = []
    real = Trainer._requests

    def requests(trainer: Trainer, n: int) -> Any:
        found = real(trainer, n)
        first, count = found[0]
        taken.append((trainer.steps_done, list(range(first, first + count))))
        return found

    with mock.patch.object(Trainer, "_requests", requests):
        run(world, folder, until=until)
    return taken


def test_four_three_and_four_ranks_take_each_sequence_once(tmp_path: Path) -> None:
    assert run(World(), tmp_path / "whole")
    steps: dict[int, list[int]] = {}
    for n, until, done in ((4, 3, 3), (3, 6, 3), (4, 0, 2)):
        everyone = run_ranks(n, recorded, tmp_path / "run", until)
        assert all(len(of_rank) == done for of_rank in everyone)
        for of_rank in everyone:
            for step, sequences in of_rank:
                assert len(sequences) == ROWS // n
                steps.setdefault(step, []).extend(sequences)
    for step in range(STEPS):
        assert sorted(steps[step]) == list(range(step * ROWS, (step + 1) * ROWS))
    for got, want in zip(untimed(tmp_path / "run"), untimed(tmp_path / "whole"), strict=True):
        assert abs(got["loss"] - want["loss"]) <= FP32_MODEL * STEPS * abs(want["loss"])
    assert_near(tmp_path / "run", tmp_path / "whole")


def lonely(world: World, parallel: dict[str, Any], avoided: list[int]) -> dict[str, Any]:
    """Take two steps in which no token goes to some experts; return this rank's gradients of experts, and moments."""
    trainer = new_trainer(world, parallel, {"n_limited_groups": 4}, {"optimizer": "adamw"})
    gates = list(trainer.model.gates())
    grads: dict[str, Any] = {}

    def phase(name: str) -> None:
        if name == "optimizer":
            for p_name, p in trainer.model.named_parameters():
                if ".experts." in p_name:
                    grads[p_name] = None if p.grad is None else local(p.grad).clone()

    trainer.phase = phase
    for _ in range(2):
        for gate in gates:
            gate.bias[avoided] = -1e4
        result = trainer.step()
        assert result.counts is not None and not result.counts[:, avoided].any() and result.counts.sum() > 0
    state = optimizer_state(trainer.optimizers, trainer.model.named_parameters())
    steps = {name: t.item() for name, t in state.items() if name.endswith("/step")}
    moments = {name: local(t).clone() for name, t in state.items() if "exp_avg" in name}
    return {"grads": grads, "steps": steps, "moments": moments, "bias": [gate.bias.clone() for gate in gates]}


@pytest.mark.parametrize("zero", [0, 3])
def test_experts_without_a_token_have_zero_gradients_and_go_on_in_step(zero: int) -> None:
    avoided = [1, 4, 5, 6, 7]  # one of rank 0, and all of rank 1
    whole = lonely(World(), {}, avoided)
    for rank, got in enumerate(run_ranks(2, lonely, {"ep": 2, "zero": zero}, avoided)):
        assert got["grads"].keys() == whole["grads"].keys()
        for name, grad in got["grads"].items():
            assert grad is not None, name
            empty = [number for number in range(4) if rank * 4 + number in avoided]
            assert not grad[empty].any() and (rank == 1 or grad[0].any())
        assert got["steps"] == whole["steps"] and set(got["steps"].values()) == {2.0}
        for name, moment in got["moments"].items():
            if ".experts." in name:
                torch.testing.assert_close(moment, whole["moments"][name][4 * rank : 4 * rank + 4])
        assert all(torch.equal(a, b) for a, b in zip(got["bias"], whole["bias"], strict=True))
