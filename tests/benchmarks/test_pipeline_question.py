"""The question of a pipeline's bubbles: its predictions, and two real processes."""

import dataclasses
import os
from pathlib import Path

import pytest

from benchmarks.questions import pipeline
from benchmarks.questions.pipeline import PARTS, RANKS, Size
from benchmarks.schedules import Timeline, programs
from dsmini.config.parallel import CHUNKS
from dsmini.report import pick
from tests.helpers.questions import TINY, invented_steps, setting


def test_bubbles_have_both_predictions_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "record", lambda size: {name: invented_steps(name) for name in CHUNKS})
    monkeypatch.setattr(pipeline, "why_not", lambda: "")
    monkeypatch.setattr(pipeline, "draw", lambda lines, path: path.touch())
    found = list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), Size()))
    for name in CHUNKS:
        by = {str(f.case["predicted by"]): f for f in pick(found, "bubble", schedule=name)}
        assert tuple(by) == pipeline.PREDICTIONS
        assert by["simulation"].measured == by["formula"].measured
        assert (by["simulation"].measured or 0) > (by["simulation"].predicted or 1), "the record sends, it does not"
        assert f"{name}.png" in by["formula"].note
    first = {str(f.case["predicted by"]): f.predicted for f in pick(found, "bubble", schedule="1f1b")}
    # (PP - 1)(F + B) of eight micro-batches of F + B: a ninth, and the simulation agrees
    assert first == pytest.approx({"simulation": 1 / 9, "formula": 1 / 9})
    assert "simulation 11%" in pipeline.answer(found) and "the fastest step is that of" in pipeline.answer(found)
    assert {path.name for path in (tmp_path / "pipeline").iterdir()} == {f"{name}.png" for name in CHUNKS}


def test_pipeline_is_left_out_on_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    found = list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), Size()))
    assert [f.case["schedule"] for f in found] == list(CHUNKS)
    assert {f.note for f in found} == {"left out: 2 ranks need 2 processor cores, and there is 1"}
    assert pipeline.answer(found) == ""


@pytest.mark.slow
def test_two_processes_record_every_action_of_the_programs() -> None:
    tiny = dataclasses.replace(TINY, dim=32, n_layers=4, n_dense_layers=0)
    found = pipeline.record(Size(model=tiny, sequences=1, tokens=16, warm=1, steps=2))
    assert tuple(found) == tuple(CHUNKS)
    for name, steps in found.items():
        program = programs(name, RANKS, PARTS)
        assert len(steps) == 2
        for step in steps:
            for rank, actions in enumerate(program):
                mine = [row for row in step.rows if row[0] == rank]
                assert [row[1:4] for row in mine] == [tuple(a[:3]) for a in actions]
            assert Timeline.measured(step.rows).total < step.seconds


@pytest.mark.slow
def test_a_process_that_fails_is_an_error_with_its_words() -> None:
    too_deep = dataclasses.replace(TINY, n_layers=2, n_dense_layers=0)
    with pytest.raises(RuntimeError, match=r"(?s)torch.distributed.run ended with status 1: .*"):
        pipeline.record(Size(model=too_deep, sequences=1, tokens=16, warm=0, steps=1))
