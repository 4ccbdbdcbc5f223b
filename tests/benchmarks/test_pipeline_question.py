"""The question of a pipeline's bubbles: the formulas by hand, and two real processes."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from benchmarks.questions import pipeline
from benchmarks.questions.pipeline import RANKS, Passes, Size, bubble_share, formula
from dsmini.config.run import CHUNKS
from dsmini.report import pick
from tests.helpers.questions import setting

BY_HAND = {
    "1f1b": 9 / 33,
    "interleaved1f1b": 4.5 / 28.5,
    "zero_bubble": 1.5 / 25.5,
    "zbv": 1.5 / 25.5,
    "dualpipev": 3 / 27,
}
"""Shares of 4 ranks and 8 micro-batches, where F, I and W take 1 each."""


@pytest.mark.parametrize("name", CHUNKS)
def test_formulas_are_those_of_the_report(name: pipeline.ScheduleName) -> None:
    assert formula(name, 4, 8) == pytest.approx(BY_HAND[name], rel=1e-12)


def test_bubble_is_the_time_without_the_processor() -> None:
    """The slower of two ranks takes 4 seconds, and both together compute for 6 of 8."""
    assert bubble_share([Passes(whole=3.0, busy=3.0), Passes(whole=4.0, busy=3.0)]) == pytest.approx(1 / 4)


def test_pipeline_is_left_out_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "cores", lambda: 1)
    found = list(pipeline.measure(setting(), Size(1, 1, 1, 1)))
    assert [f.case["schedule"] for f in found] == list(CHUNKS)
    assert {f.note for f in found} == {"left out: 2 ranks need 2 processor cores, and there is 1"}
    assert pipeline.answer(found) == ""


@pytest.mark.slow
def test_two_processes_measure_every_schedule(tmp_path: Path) -> None:
    size = Size(sequences=1, tokens=64, warm=1, steps=3)
    found = list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), size))
    bubbles = {str(f.case["schedule"]): f for f in pick(found, "bubble")}
    assert list(bubbles) == list(CHUNKS)
    assert all(0 < (f.measured or 0.0) < 0.9 for f in bubbles.values())
    told = pipeline.answer(found)
    assert "(formula 11%)" in told and "the fastest step is that of" in told
    for name, rank in itertools.product(CHUNKS, range(RANKS)):
        events = json.loads((tmp_path / "pipeline" / f"{name}-rank{rank}.json").read_text())["traceEvents"]
        assert any("mm" in str(event.get("name")) for event in events)


@pytest.mark.slow
def test_a_process_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)torch.distributed.run ended with status 1: .*"):
        pipeline.train_in_turns(tmp_path, Size(sequences=0, tokens=16, warm=0, steps=1))
