"""The question of a pipeline's bubbles: the replay of a record, the parts of the gap, and two real processes."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import pipeline_steps, replay
from benchmarks.case import pick
from benchmarks.pipeline_steps import PARTS, RANKS, Size, Step
from benchmarks.questions import pipeline
from benchmarks.schedules import Action, Timeline, programs, simulate
from dsmini.config.parallel import CHUNKS
from tests.helpers.questions import TINY, invented_steps, setting

TIMES = {"F": 1.0, "I": 1.25, "W": 0.75, "B": 2.0}
EXACT = 1e-9
"""The same few sums in another order."""


def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: dict[str, list[Step]]) -> list[pipeline.Figure]:
    monkeypatch.setattr(pipeline_steps, "record", lambda size: steps)
    monkeypatch.setattr(pipeline, "why_not", lambda: "")
    monkeypatch.setattr(pipeline, "draw", lambda lines, path: path.touch())
    return list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), Size()))


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize(("ranks", "parts"), [(2, 8), (4, 12)])
def test_replay_without_lags_is_the_simulation(name: str, ranks: int, parts: int) -> None:
    program = programs(name, ranks, parts)
    want = simulate(program, TIMES["F"], TIMES["I"], TIMES["W"])
    got = Timeline.measured(replay.replay(program, lambda a: TIMES[a.kind], lambda a: 0.0))
    assert got.bubbles == pytest.approx(want.bubbles, abs=EXACT)
    for mine, other in zip(got.ranks, want.ranks, strict=True):
        assert [(s.kind, s.stage, s.microbatch) for s in mine] == [(s.kind, s.stage, s.microbatch) for s in other]
        assert [s.end for s in mine] == pytest.approx([s.end for s in other], abs=EXACT)


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_replay_with_all_lags_is_the_record(name: str, ranks: int) -> None:
    program, (step, *_) = programs(name, ranks, PARTS), invented_steps(name, ranks=ranks)
    late = replay.lags(program, step.rows)
    took = {row[1:4]: row[5] - row[4] for row in step.rows}
    got = replay.replay(program, lambda a: took[replay.key(a)], lambda a: late[replay.key(a)][0])
    assert all(seconds >= -EXACT for seconds, _ in late.values())
    first = min(row[4] for row in step.rows)
    for mine, other in zip(sorted(got), sorted(step.rows), strict=True):
        assert mine[:4] == other[:4]
        assert mine[4:] == pytest.approx([time - first for time in other[4:]], abs=EXACT)


@pytest.mark.parametrize("name", CHUNKS)
def test_causes_add_up_to_the_gap(name: str) -> None:
    program, steps = programs(name, RANKS, PARTS), invented_steps(name)
    every = [row for step in steps for row in step.rows]
    simulated = simulate(program, *replay.times_for_simulation(replay.medians(every)))
    for step in steps:
        found = replay.causes(program, step.rows, every, simulated)
        gap = replay.mean_bubble(Timeline.measured(step.rows)) - replay.mean_bubble(simulated)
        assert tuple(found) == replay.CAUSES
        assert sum(found.values()) == pytest.approx(gap, abs=EXACT)


@pytest.mark.parametrize("cause", replay.CAUSES[1:])
def test_each_cause_is_told_from_the_others(cause: str) -> None:
    """Put one cause into a record that is otherwise the simulation: no other one is found."""
    program = programs("1f1b", RANKS, PARTS)

    def seconds(action: Action) -> float:
        slow = cause == "unequal stages" and action.stage == 1
        paused = cause == "noise" and (action.kind, action.stage, action.microbatch) == ("B", 0, 2)
        return TIMES[action.kind] * (1.5 if slow else 1.0) + (3.0 if paused else 0.0)

    def lag(action: Action) -> float:
        after_message = action.kind == ("F" if action.stage else "B")
        return 0.1 if cause == ("messages" if after_message else "between actions") else 0.0

    # a message comes last before the first forward of rank 1; later actions of it wait for the rank itself
    rows = replay.replay(program, seconds, lag)
    simulated = simulate(program, *replay.times_for_simulation(replay.medians(rows)))
    found = replay.causes(program, rows, rows, simulated)
    assert found[cause] > 0.05
    if cause in ("unequal stages", "noise"):
        assert [other for other in found if other != cause and abs(found[other]) > EXACT] == []
    else:
        assert [other for other in replay.CAUSES[:3] if abs(found[other]) > EXACT] == []


def test_first_figures_are_bubbles_with_both_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(tmp_path, monkeypatch, {name: invented_steps(name) for name in CHUNKS})
    for name in CHUNKS:
        by = {str(f.case["predicted by"]): f for f in pick(found, "bubble", schedule=name)}
        assert tuple(by) == pipeline.PREDICTIONS
        assert by["simulation"].measured == by["formula"].measured
        assert f"{name}.png" in by["formula"].note
    first = {str(f.case["predicted by"]): f.predicted for f in pick(found, "bubble", schedule="1f1b")}
    # (PP - 1)(F + B) of eight micro-batches of F + B: a ninth, and the simulation agrees
    assert first == pytest.approx({"simulation": 1 / 9, "formula": 1 / 9})
    assert "1f1b" in pipeline.finding(found) and "simulation 11%" in pipeline.finding(found)
    # medians of the invented record: (1 + 0.195) + (0.5 + 0.195) over 1.4 + 0.195
    assert "a backward in two halves takes 1.18 times one in one piece" in pipeline.finding(found)
    assert {path.name for path in (tmp_path / "pipeline").iterdir()} == {f"{name}.png" for name in CHUNKS}


def test_pipeline_is_left_out_on_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "cores", lambda: 1)
    found = list(pipeline.measure(dataclasses.replace(setting(), out=tmp_path), Size()))
    assert [f.case["schedule"] for f in found] == list(CHUNKS)
    assert {f.note for f in found} == {"left out: 2 ranks need 2 processor cores, and there is 1"}
    assert pipeline.finding(found) == "" and pipeline.plots(found) == []


@pytest.mark.slow
def test_two_processes_record_every_action_of_the_programs() -> None:
    tiny = dataclasses.replace(TINY, dim=32, n_layers=4, n_dense_layers=0)
    found = pipeline_steps.record(Size(model=tiny, sequences=1, tokens=16, warm=1, steps=2))
    assert tuple(found) == tuple(CHUNKS)
    for name, steps in found.items():
        program = programs(name, RANKS, PARTS)
        assert len(steps) == 2
        for step in steps:
            for rank, actions in enumerate(program):
                mine = [row for row in step.rows if row[0] == rank]
                assert [row[1:4] for row in mine] == [replay.key(a) for a in actions]
            assert Timeline.measured(step.rows).total < step.seconds
            late = [seconds for seconds, _ in replay.lags(program, step.rows).values()]
            assert min(late) >= 0  # the first action of all has none


@pytest.mark.slow
def test_a_process_that_fails_is_an_error_with_its_words() -> None:
    too_deep = dataclasses.replace(TINY, n_layers=2, n_dense_layers=0)
    with pytest.raises(RuntimeError, match=r"(?s)rank \d of the pipeline ended with an error: .*more than model.n_lay"):
        pipeline_steps.record(Size(model=too_deep, sequences=1, tokens=16, warm=0, steps=1))
