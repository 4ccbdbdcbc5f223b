"""Each intervention makes one thing free, leaves the rest alone, and is taken back."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from dsmini.diagnosis.interventions import machine
from dsmini.diagnosis.interventions.algorithm import DENSE, UNIFORM, dense
from dsmini.diagnosis.interventions.data import REPLAY
from dsmini.diagnosis.interventions.intervention import Intervention
from dsmini.diagnosis.interventions.machine import DTYPE, THREADS
from dsmini.diagnosis.subject import Subject
from dsmini.nn import FeedForward, MoE

EVERY = (REPLAY, UNIFORM, DENSE, THREADS, DTYPE)


def losses_and_routing(subject: Subject) -> list[Tensor]:
    """Return what a forward on a fixed text gives."""
    text = torch.arange(4 * 9).view(4, 9) % 256
    found = subject.trainer.model.losses(text[:, :-1], text[:, 1:])
    return [found.total.detach(), *(r.indices for r in found.routing), *(r.weights.detach() for r in found.routing)]


@pytest.mark.parametrize("intervention", EVERY, ids=[each.name for each in EVERY])
def test_change_is_taken_back(subject: Subject, intervention: Intervention) -> None:
    """Check that modules, loader, threads and what a forward gives are as before, also after an error."""
    threads, loader, modules = torch.get_num_threads(), subject.trainer.loader, list(subject.trainer.model.modules())
    before = losses_and_routing(subject)
    for error in (False, True):
        with pytest.raises(KeyboardInterrupt) if error else nullcontext(), intervention.apply(subject):
            if error:
                raise KeyboardInterrupt
    assert torch.get_num_threads() == threads and subject.trainer.loader is loader
    assert list(subject.trainer.model.modules()) == modules
    for got, want in zip(losses_and_routing(subject), before, strict=True):
        assert torch.equal(got, want)


def test_steps_stay_at_their_place_of_the_schedules(subject: Subject) -> None:
    subject.trainer.steps_done = subject.at = 5
    rates = {subject.step().lr for _ in range(3)}
    assert subject.trainer.steps_done == 5 and len(rates) == 1
    assert subject.trainer.sequences == 3 * 4, "the data go on"


def test_replay_takes_one_batch_that_nobody_waits_for(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subject.trainer.loader.prepared
    asked: list[tuple[int, int]] = []

    def slow(request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        asked.append(request)
        time.sleep(0.05)
        return real(request)

    monkeypatch.setattr(subject.trainer.loader, "prepared", slow)
    with REPLAY.apply(subject) as step:
        for _ in range(4):
            step(0.0)
    assert len(asked) == 1, "it is prepared once"
    waits = [subject.step().data_wait * subject.step().seconds for _ in range(2)]
    assert min(waits) >= 0, "and the loader is back"
    assert len(asked) > 1


def test_uniform_routing_balances_every_gate(subject: Subject) -> None:
    """Check that loads differ by one at most, a token's experts differ, and the weights are the gate's own."""
    for gate in subject.trainer.model.gates():
        assert gate.bias is not None
        gate.bias[:2] = 10.0  # all tokens choose the same experts
    with UNIFORM.apply(subject):
        text = torch.arange(4 * 9).view(4, 9) % 256
        found = subject.trainer.model.losses(text[:, :-1], text[:, 1:])
    assert len(found.routing) == 2, "the block and that of multi-token prediction"
    for routing in found.routing:
        assert routing.counts.max() - routing.counts.min() <= 1
        assert routing.counts.sum() == routing.indices.numel()
        assert all(len(set(row)) == len(row) for row in routing.indices.tolist())
        torch.testing.assert_close(routing.weights.sum(1), torch.full((len(routing.weights),), 2.5))
        chosen = routing.scores.gather(1, routing.indices)
        torch.testing.assert_close(routing.weights, 2.5 * chosen / chosen.sum(1, keepdim=True))
    assert losses_and_routing(subject)[1].unique().tolist() == [0, 1], "the bias is as it was"


@pytest.mark.parametrize(("total", "width"), [(False, 3 * 16), (True, 9 * 16)])
def test_dense_twin_has_as_many_parameters(subject: Subject, total: bool, width: int) -> None:
    """Check the width of what stands in: two chosen experts and the shared one, or all of them."""
    seen: list[Sequence[int]] = []
    real = FeedForward.forward

    def watched(self: FeedForward, x: Tensor) -> Tensor:
        seen.append(self.w1.weight.shape)
        return real(self, x)

    with pytest.MonkeyPatch.context() as patch, dense(subject, total) as step:
        patch.setattr(FeedForward, "forward", watched)
        seconds = step(1.0)
    assert seconds < 2.0
    assert [tuple(shape) for shape in seen].count((width, 32)) == 2
    assert all(isinstance(block.ffn, MoE) for block in subject.blocks())
    assert all(p.grad is None for p in subject.trainer.model.parameters()), "nothing is left for the next step"


def test_dense_step_subtracts_what_routing_costs(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.5, 0.3])
    monkeypatch.setattr(subject, "forward_backward", lambda: next(taken))
    with DENSE.apply(subject) as step:
        assert step(1.0) == pytest.approx(0.8)


def test_reasons_not_to_try(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    used = torch.get_num_threads()
    monkeypatch.setattr(machine, "cores", lambda: used)
    assert THREADS.why_not(subject) == f"all {used} cores are used already"
    monkeypatch.setattr(machine, "cores", lambda: used + 1)
    assert THREADS.why_not(subject) is None
    monkeypatch.setattr(machine, "pick_dtype", lambda *_: torch.float32)
    assert DTYPE.why_not(subject) == "float32 is the fastest dtype here, and used"
    monkeypatch.setattr(machine, "pick_dtype", lambda *_: torch.bfloat16)
    assert DTYPE.why_not(subject) is None
    compiled = dataclasses.replace(subject.config, train=dataclasses.replace(subject.config.train, compile=True))
    subject.trainer.config = compiled
    assert "compiled" in (UNIFORM.why_not(subject) or "") and "compiled" in (DENSE.why_not(subject) or "")


def test_faster_dtype_changes_the_products_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pick_dtype", lambda *_: torch.bfloat16)
    with DTYPE.apply(subject) as step:
        assert subject.trainer.model.compute_dtype == torch.bfloat16
        step(0.0)
    assert all(p.dtype == torch.float32 for p in subject.trainer.model.parameters())


def test_all_threads_are_used_inside_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "cores", lambda: before + 1)
    with THREADS.apply(subject):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
