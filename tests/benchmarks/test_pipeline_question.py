"""The question of a pipeline's bubbles: the formulas by hand, and two real processes."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.questions import pipeline
from benchmarks.questions.pipeline import PARTS, RANKS, Row, Size, bubble_share, formula
from dsmini.config.run import CHUNKS
from dsmini.report import pick
from tests.helpers.questions import invented_steps, setting

BY_HAND = {
    "1f1b": 9 / 33,
    "interleaved1f1b": 4.5 / 28.5,
    "zero_bubble": 1.5 / 25.5,
    "zbv": 1.5 / 25.5,
    "dualpipev": 3 / 27,
}
"""Shares of 4 ranks and 8 micro-batches, where F, I and W of a rank's layers take 1 each."""


@pytest.mark.parametrize("name", CHUNKS)
def test_formulas_are_those_of_the_report(name: pipeline.ScheduleName) -> None:
    each = 1 / CHUNKS[name]
    assert formula(name, 4, 8, each, each, each) == pytest.approx(BY_HAND[name], rel=1e-12)
    # at unequal times: (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W) of twice as many ranks
    bubble = {"1f1b": 9, "interleaved1f1b": 9, "zero_bubble": 4.2, "zbv": 4.2, "dualpipev": 7.8}[name]
    whole = bubble + 12 * CHUNKS[name] * 3
    assert formula(name, 4, 12, 1.0, 1.2, 0.8) == pytest.approx(bubble / whole, rel=1e-12)


def test_bubbles_have_a_prediction_and_a_time_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bubble_share([Row(0, "F", 0, 0, 5, 6), Row(1, "F", 1, 0, 6, 7), Row(0, "B", 0, 0, 7, 9)]) == 1 - 4 / 8
    monkeypatch.setattr(pipeline, "record", lambda size: {name: invented_steps() for name in CHUNKS})
    monkeypatch.setattr(pipeline, "cores", lambda: 2)
    found = list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), Size(1, 1, 1, 1)))
    bubbles = {str(f.case["schedule"]): f for f in pick(found, "bubble")}
    # two ranks: the second begins one unit later, in 25 units for 24 of work
    assert [f.measured for f in bubbles.values()] == pytest.approx([1 / 25] * len(CHUNKS))
    assert bubbles["1f1b"].predicted == pytest.approx(1 / 9), "(PP - 1)(F + B) of eight micro-batches of F + B"
    told = pipeline.answer(found)
    assert "1f1b 4% (formula 11%)" in told and "the fastest step is that of 1f1b, 30.3 s" in told
    events = json.loads((tmp_path / "pipeline" / "schedules.json").read_text())["traceEvents"]
    first = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    assert first[0] == {
        "ph": "X",
        "name": "forward 0",
        "ts": 0.0,
        "dur": 1e6,
        "pid": 0,
        "tid": 0,
        "args": first[0]["args"],
    }
    assert len(first) == len(invented_steps()[0].rows) and {event["tid"] for event in first} == {0, 1}


def test_pipeline_is_left_out_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "cores", lambda: 1)
    found = list(pipeline.measure(setting(), Size(1, 1, 1, 1)))
    assert [f.case["schedule"] for f in found] == list(CHUNKS)
    assert {f.note for f in found} == {"left out: 2 ranks need 2 processor cores, and there is 1"}
    assert pipeline.answer(found) == ""


@pytest.mark.slow
def test_two_processes_record_every_action_once() -> None:
    found = pipeline.record(Size(sequences=1, tokens=16, warm=1, steps=2))
    assert tuple(found) == tuple(CHUNKS)
    for name, steps in found.items():
        assert len(steps) == 2
        stages = range(RANKS * CHUNKS[name])
        for step in steps:
            done = Counter((k, r.stage, r.microbatch) for r in step.rows for k in ("IW" if r.kind == "B" else r.kind))
            assert done == Counter((kind, s, m) for kind in "FIW" for s in stages for m in range(PARTS))
            assert 0 < bubble_share(step.rows) < 1
            assert max(r.end for r in step.rows) - min(r.start for r in step.rows) < step.seconds


@pytest.mark.slow
def test_a_process_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)torch.distributed.run ended with status 1: .*"):
        pipeline.record(Size(sequences=0, tokens=16, warm=0, steps=1))
