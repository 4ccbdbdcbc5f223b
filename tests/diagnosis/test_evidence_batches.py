"""Later batches and larger ones: predictions, the slack, the knee, and the batches that are tried."""

import pytest
import torch

from dsmini.diagnosis import predictions
from dsmini.diagnosis.evidence import batch_sweep, loader_delay
from dsmini.diagnosis.predictions import BatchTime
from dsmini.diagnosis.subject import Subject

# --- loader delay


@pytest.mark.parametrize(
    ("workers", "cpu", "want"),
    [
        (1, 0.0, [0.2, 0.2, 0.22, 0.42]),  # flat up to the slack of 0.18, then slope 1
        (2, 0.0, [0.2, 0.2, 0.2, 0.21]),  # two at a time: slope 1/2 after 0.38
        (0, 0.0, [0.22, 0.32, 0.42, 0.62]),  # nobody prepares ahead
        (1, 0.02, [0.22, 0.22, 0.22, 0.42]),  # preparing takes a core from the step
    ],
)
def test_predicted_delay(workers: int, cpu: float, want: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "cores", lambda: torch.get_num_threads())
    batch = BatchTime(seconds=0.02, cpu=cpu)
    found = loader_delay.predicted_steps([0.0, 0.1, 0.2, 0.4], 0.2, batch, workers)
    assert found == pytest.approx(want)


def test_slack_is_where_the_slope_meets_the_level() -> None:
    delays = [0.0, 0.1, 0.2, 0.4]
    assert loader_delay.slack_of(delays, [0.2, 0.2, 0.22, 0.42], 1) == pytest.approx(0.18)
    assert loader_delay.slack_of(delays, [0.2, 0.2, 0.2, 0.21], 2) == pytest.approx(0.38)
    assert loader_delay.slack_of(delays, [0.2, 0.3, 0.4, 0.6], 0) == 0.0


def test_held_batches_are_let_go(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a batch held for a minute is there at once when the experiment is over."""
    with loader_delay.delayed(subject) as delay:
        subject.step()  # what it starts is not held
        delay(60.0)
        subject.step()  # what it starts is
    assert subject.step().seconds < 30.0


# --- batch sweep


def test_knee_is_where_both_parts_are_equal() -> None:
    batches = [1, 2, 4, 8, 16]
    assert batch_sweep.knee_of(batches, [0.06 + 0.01 * n for n in batches]) == pytest.approx(6.0)
    assert batch_sweep.knee_of(batches, [0.01 * n for n in batches]) == pytest.approx(0.0, abs=1e-9)
    assert batch_sweep.knee_of([4], [0.1]) == 0.0


@pytest.mark.parametrize(
    ("rows", "parts", "most", "room", "want"),
    [
        (8, 1, 99, 99.0, [1, 2, 4, 8, 16, 32, 64]),
        (8, 4, 99, 99.0, [4, 8, 16, 32, 64]),  # a step of four parts
        (8, 1, 20, 99.0, [1, 2, 4, 8, 16]),  # memory for twenty
        (8, 1, 99, 3 * 0.47, [1, 2, 4, 8, 16]),  # three turns of 0.31 s fit, of 0.63 s do not
        (3, 1, 99, 0.0, [3]),  # no time: what the run has
    ],
)
def test_batches_fit_into_memory_and_time(rows: int, parts: int, most: int, room: float, want: list[int]) -> None:
    found = batch_sweep.batches_of(rows, parts, lambda n: n <= most, lambda n: 0.01 * n, room)
    assert found == want


def test_batch_of_takes_as_many_sequences(subject: Subject) -> None:
    before = subject.trainer.sequences
    with batch_sweep.batch_of(subject) as step:
        step(8)
        assert subject.trainer.sequences == before + 8
        step(2)
    assert subject.trainer.sequences == before + 10 and subject.step().tokens == 4 * 8
