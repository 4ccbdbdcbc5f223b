"""Spikes: healthy losses are none, injected ones are; and each sequence that is left is used once."""

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.training.spikes import SkippedBatches, Spikes
from tests.distributed.faults import Fault, inject
from tests.helpers.runs import kill, new_run, resumed, stopped


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


@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 200), marks=pytest.mark.slow)], ids=str)
def test_healthy_noise_is_no_spike(seeds: range) -> None:
    for seed in seeds:
        spikes = Spikes()
        assert [step for step, loss in enumerate(healthy(seed)) if spikes.see(step, loss)] == [], seed


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_spike_of_a_few_nats_is_found_at_once(seed: int) -> None:
    losses = healthy(seed)
    for at in (300, 599):
        spikes = Spikes()
        spiked = [loss + (4.0 if step >= at else 0.0) for step, loss in enumerate(losses)]
        assert next(step for step, loss in enumerate(spiked) if spikes.see(step, loss)) == at


def test_losses_that_are_not_finite_are_not_added() -> None:
    spikes = Spikes(window=8)
    for step in range(8):
        assert not spikes.see(step, 1.0)
    for step in range(8, 30):
        assert not spikes.see(step, math.nan) and not spikes.see(step, math.inf)
    assert spikes.limit() == 2.0, "of eight ones, with the least spike of one nat"
    assert spikes.see(30, 2.1)


def test_rewind_forgets_the_losses_after_it() -> None:
    spikes = Spikes(window=16)
    for step in range(20):
        spikes.see(step, 2.0 if step < 10 else 7.0)
    before = Spikes(window=16)
    for step in range(4, 10):
        before.see(step, 2.0)
    assert spikes.limit() != before.limit()
    spikes.rewind(9)
    assert spikes.limit() == before.limit() == 3.0
    assert spikes.see(10, 7.0)


def test_spike_that_stays_becomes_the_level() -> None:
    spikes = Spikes(window=32)
    alarms = [spikes.see(step, 2.0 if step < 100 else 6.0) for step in range(200)]
    assert any(alarms[100:117]) and not any(alarms[117:]), "half a window later it is the median"


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=5)


@given(skips=RANGES, first=st.integers(0, 20), rows=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_each_sequence_that_is_left_is_taken_once(skips: list[tuple[int, int]], first: int, rows: list[int]) -> None:
    skipped = SkippedBatches()
    for start, length in skips:
        skipped = skipped.skip(start, start + length, most_rewinds=9)
    gone = {number for start, length in skips for number in range(start, start + length)}
    assert {number for pair in skipped.ranges for number in range(*pair)} == gone
    assert skipped.rewinds == len(skips)
    assert SkippedBatches.from_json(json.loads(json.dumps(skipped.to_json()))) == skipped
    place, taken = first, []
    for n in rows:
        ranges = skipped.next(place, n)
        numbers = [number for pair in ranges for number in range(*pair)]
        assert len(numbers) == n and all(end > start for start, end in ranges)
        taken += numbers
        place = ranges[-1][1]
    assert taken == [number for number in range(first, place) if number not in gone]


def test_no_rewinds_are_left_after_the_last() -> None:
    once = SkippedBatches().skip(0, 8, most_rewinds=1)
    with pytest.raises(ArithmeticError, match="the loss spiked again after 1 rewinds, and 1 are allowed"):
        once.skip(8, 16, most_rewinds=1)


@pytest.mark.parametrize(
    ("ranges", "rewinds"),
    [([], None), ([[1]], 1), ([["a", 2]], 1), ([[1, 3], [3, 5]], 1), ([[2, 1]], 1), ([], -1), (None, 1)],
)
def test_damaged_bookkeeping_is_refused(ranges: object, rewinds: object) -> None:
    value = {"ranges": ranges, "rewinds": rewinds} if ranges is not None else {}
    with pytest.raises(ValueError, match="skipped batches are"):
        SkippedBatches.from_json(value)


def test_rewind_is_remembered_by_a_run_that_is_killed_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"steps": 40, "max_rewinds": 2, "eval_every": 40}
    training = new_run(tmp_path, **options)
    inject(training, [Fault("spike", 0, 36, "forward")])
    with monkeypatch.context() as patch:
        kill(patch, training.trainer, "forward_backward", lambda: training.trainer.left_out.rewinds == 1, False)
        stopped(training)
    again = resumed(tmp_path, **options)
    assert again.trainer.steps_done == 34
    assert again.trainer.left_out == SkippedBatches(ranges=((34 * 4, 36 * 4),), rewinds=1)
