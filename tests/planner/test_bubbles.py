"""Bubbles by formula against pipelines that are simulated chunk by chunk, and against print."""

from collections import Counter
from collections.abc import Callable

import pytest

from dsmini.planner.quantities.quantity import COUNT, SECONDS
from dsmini.planner.training.bubbles import (
    ChunkTimes,
    bubble_seconds,
    dualpipe_counts,
    published_bubble,
    schedule_seconds,
)
from dsmini.planner.training.layout import Schedule

TIMES = [(1.0, 2.0, 1.0, 3.0), (1.0, 2.0, 0.5, 3.0), (1.0, 2.5, 0.75, 2.5), (0.0491, 0.1074, 0.032, 0.1438)]
"""Times F, B, W, F&B."""
SIZES = [(4, 8), (4, 20), (8, 20), (16, 120)]
"""Stages and micro-batches."""


def chunk_times(f: float, b: float, w: float, both: float) -> ChunkTimes:
    return ChunkTimes(forward=SECONDS(f), backward=SECONDS(b), weights=SECONDS(w), both=SECONDS(both))


def one_f_one_b(rank: int, stages: int, micro_batches: int) -> list[str]:
    """Return the chunks of a GPU under 1F1B, F or B and the direction, which is always 0."""
    ahead = min(stages - rank - 1, micro_batches)
    return ["F0"] * ahead + ["F0", "B0"] * (micro_batches - ahead) + ["B0"] * ahead


def dualpipe(rank: int, stages: int, micro_batches: int) -> list[str]:
    """Return DualPipe's program of a GPU: b is a backward without W; direction 0 is the one that it is nearer to."""
    half, h = stages // 2, min(rank, stages - 1 - rank)
    ends = ["B1", "B0"] * (h + 1)
    ends[h + 1 :] = [chunk.lower() for chunk in ends[h + 1 :]]
    return [
        *["F0"] * (2 * (half - h - 1)),
        *["F0", "F1"] * (h + 1),
        *["b1", "W", "F1"] * (half - h - 1),
        *["F0&B1", "F1&B0"] * (micro_batches // 2 - stages + h + 1),
        *["B1", "F1&B0"] * (half - h - 1),
        *ends,
        *["W", "b0"] * (half - h - 1),
        *["W"] * (h + 1),
    ]


def simulate(
    program: Callable[[int, int, int], list[str]], stages: int, micro_batches: int, times: tuple[float, ...]
) -> tuple[float, list[float]]:
    """Return the time of a step, and how long each GPU works. A chunk starts when its GPU and its input are ready."""
    f, b, w, both = times
    cost = {"F": f, "B": b, "b": b - w, "W": w}
    programs = [program(rank, stages, micro_batches) for rank in range(stages)]
    done: dict[tuple[str, int, int, int], float] = {}
    clock, busy, seen = [0.0] * stages, [0.0] * stages, [Counter[tuple[str, int]]() for _ in range(stages)]
    while any(programs):
        before = sum(map(len, programs))
        for rank, chunks in enumerate(programs):
            while chunks:
                parts = [(part[0], part[1:]) for part in chunks[0].split("&")]
                keys = [
                    (kind.upper(), int(phase) ^ (rank >= stages // 2 > 0 and program is dualpipe))
                    for kind, phase in parts
                    if phase
                ]
                needs = [need(kind, way, seen[rank][kind, way], rank, stages) for kind, way in keys]
                if not all(key is None or key in done for key in needs):
                    break
                length = both if len(parts) == 2 else cost[parts[0][0]]
                clock[rank] = max([clock[rank], *(done[key] for key in needs if key)]) + length
                busy[rank] += length
                for kind, way in keys:
                    done[kind, way, seen[rank][kind, way], rank] = clock[rank]
                    seen[rank][kind, way] += 1
                chunks.pop(0)
        assert sum(map(len, programs)) < before, "nothing can run"
    return max(clock), busy


def need(kind: str, way: int, i: int, rank: int, stages: int) -> tuple[str, int, int, int] | None:
    """Return the chunk that makes the input of micro-batch i: of the stage before, in backward of the stage after."""
    step = -1 if way else 1
    stage = stages - 1 - rank if way else rank
    if kind == "F":
        return ("F", way, i, rank - step) if stage else None
    return ("B", way, i, rank + step) if stage < stages - 1 else ("F", way, i, rank)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_bubble_is_that_of_a_simulated_pipeline(
    schedule: Schedule, stages: int, micro_batches: int, times: tuple[float, ...]
) -> None:
    """Compare the GPU in the middle, which waits longest in DualPipe, and the time of the whole step."""
    whole, busy = simulate(dualpipe if schedule == "dualpipe" else one_f_one_b, stages, micro_batches, times)
    t = chunk_times(*times)
    bubble = bubble_seconds(schedule, COUNT(stages), t).value
    work = schedule_seconds(schedule, COUNT(stages), COUNT(micro_batches), t).value
    assert whole - busy[stages // 2 - 1] == pytest.approx(bubble)
    assert whole == pytest.approx(bubble + work)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_counts_of_the_first_gpu_are_those_of_dualpipes_program(stages: int, micro_batches: int) -> None:
    found = dualpipe_counts(COUNT(stages), COUNT(micro_batches))
    chunks = Counter(chunk.rstrip("01") if "&" not in chunk else "both" for chunk in dualpipe(0, stages, micro_batches))
    assert found.alone.value == chunks["F"] == chunks["B"] + chunks["b"]
    assert found.weights.value == chunks["W"] == chunks["b"]
    assert found.both.value == chunks["both"]


def test_bubbles_as_printed() -> None:
    """V3, table 2, with PP = 8, F = 1, B = 2.5, W = 0.75, F&B = 3."""
    t = chunk_times(1, 2.5, 0.75, 3)
    found = {s: bubble_seconds(s, COUNT(8), t).value for s in ("1f1b", "zb1p", "dualpipe")}
    assert found == {"1f1b": 7 * 3.5, "zb1p": 7 * 2.0, "dualpipe": 3 * (3 + 2.5 - 2.25)}


def test_one_stage_has_no_bubble() -> None:
    for schedule in ("1f1b", "zb1p"):
        assert bubble_seconds(schedule, COUNT(1), chunk_times(1, 2, 1, 3)).value == 0


def test_times_of_the_table_are_its_step() -> None:
    """Six times rounded to 0.01 s make the printed step within 6 times 0.005 s, so none is mistyped."""
    found = published_bubble()
    forwards, optimizer, step = 1.13, 0.29, 19.926
    parts = (found.table_pairs, found.table_backward, found.table_weights, found.table_bubble)
    assert sum(part.value for part in parts) + forwards + optimizer == pytest.approx(step, abs=6 * 0.005)


def test_published_bubble_leaves_half_open() -> None:
    """1.09 s by the formula and the table's times, where the table prints 2.06 s: shown, not fitted."""
    found = published_bubble()
    assert found.bubble.value == pytest.approx(1.09, abs=0.005)
    assert found.residual.value == pytest.approx(2.06 - 1.09, abs=0.005)
    assert found.pair.value == pytest.approx(13.95 / 97)
    assert set(found.figures()) >= {"published_bubble", "bubble_residual", "table_bubble"}
