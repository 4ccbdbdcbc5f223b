"""Spikes of the loss: healthy losses are none, injected ones are; a run goes back before one, and leaves it out."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmini.training.outputs import summarise
from dsmini.training.record import History
from tests.distributed.faults import Fault, inject
from tests.helpers.runs import die, differences, new_run, resumed


def healthy(seed: int, steps: int = 600) -> list[float]:
    """Return a loss curve: warm-up with a bump, a power law, noise whose size and tails vary, and odd batches."""
    draw = random.Random(seed)
    top, floor, power = draw.uniform(4, 12), draw.uniform(0.5, 2.5), draw.uniform(0.2, 0.8)
    warm, noise = draw.randint(1, 100), draw.choice([0.0, 0.01, 0.05, 0.1, 0.2])
    bump, tail = draw.uniform(0, 0.5), draw.choice([math.inf, 15, 8])
    losses = []
    for step in range(steps):
        learnt = max(1.0, step * min(1.0, step / warm))
        loss = floor + (top - floor) * learnt**-power + bump * math.exp(-(((step - warm) / 10) ** 2))
        scale = noise * (1 + 2 * math.exp(-step / 20))  # the first steps are noisier
        heavy = 1.0 if tail == math.inf else math.sqrt(tail / draw.gammavariate(tail / 2, 2))  # Student's t
        odd = draw.uniform(0.2, 0.6) if draw.random() < 0.01 else 0.0
        losses.append(loss + scale * draw.gauss(0, 1) * heavy + odd)
    return losses


def spikes(losses: list[float]) -> Iterator[int]:
    """Yield the steps whose losses are spikes."""
    history = History(len(losses))
    for step, loss in enumerate(losses):
        if loss > history.spike_limit():
            yield step
        history.add({"loss": loss, "skipped": False})


@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 200), marks=pytest.mark.slow)], ids=str)
def test_healthy_noise_is_no_spike(seeds: range) -> None:
    for seed in seeds:
        assert list(spikes(healthy(seed))) == [], seed


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_spike_of_a_few_nats_is_found_at_once(seed: int) -> None:
    losses = healthy(seed)
    for at in (300, 599):
        assert next(spikes([loss + (4.0 if step >= at else 0.0) for step, loss in enumerate(losses)])) == at


def test_losses_that_are_not_finite_are_no_spikes() -> None:
    assert list(spikes([2.0] * 40 + [math.nan])) == []
    history = History(40)
    history.records = [{"loss": None}] * 64 + [{"loss": 2.0}] * 31
    assert history.spike_limit() == math.inf
    history.records.append({"loss": 2.0})
    assert history.spike_limit() == 3.0


def test_run_killed_after_a_rewind_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """It meets the spike again, and returns again."""
    options: dict[str, Any] = {"steps": 40, "max_rewinds": 2, "eval_every": 40, "model": {"n_mtp_layers": 0}}
    spikes = [Fault("spike", 0, 36, "forward"), Fault("spike", 0, 37, "forward")]
    never = new_run(tmp_path / "never", **options)
    inject(never, spikes)
    assert never.train()
    training = new_run(tmp_path / "killed", **options)
    inject(training, spikes)
    assert die(training, training.trainer, "forward_backward", 34, number=1) and training.history.rewinds == 1
    next(training.folder.glob("faults-*")).unlink()  # the spike is in the batch, so it comes again
    again = resumed(training.folder, **options)
    assert (again.trainer.steps_done, again.history.rewinds) == (34, 0)
    inject(again, spikes)
    assert again.train() and again.history.rewinds == 2
    assert differences(again.folder, never.folder, 40) == []
    tokens = 64 * len(again.history.records)
    assert summarise(again)["tokens"] == tokens < 16 * again.trainer.sequences, "steps taken back do not count"


def test_infinite_loss_is_skipped_and_no_spike(tmp_path: Path) -> None:
    training = new_run(tmp_path, steps=36, max_rewinds=1, save_every=9, model={"n_mtp_layers": 0})
    inject(training, [Fault("infinite", 0, 34, "forward")])
    assert training.train() and training.history.rewinds == 0
    assert [row["step"] for row in training.history.records if row["skipped"]] == [34]
