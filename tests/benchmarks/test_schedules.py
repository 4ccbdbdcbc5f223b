"""Check the programs of pipeline schedules against torch, their bubbles against the published formulas."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from benchmarks.schedules import CHUNKS, Action, Timeline, bubble_formula, draw, main, programs, simulate

SIZES = [(2, 4), (4, 8), (4, 12), (8, 16), (8, 24)]
EVERY = [(name, *size) for name in CHUNKS for size in SIZES]


def of_stage(name: str, *times: float) -> list[float]:
    """Return the times of a stage, where the times of a rank's layers are these."""
    return [time / CHUNKS[name] for time in times]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), EVERY)
def test_every_stage_sees_every_microbatch_once(name: str, ranks: int, microbatches: int) -> None:
    done = Counter(
        (kind, action.stage, action.microbatch)
        for program in programs(name, ranks, microbatches)
        for action in program
        for kind in ("IW" if action.kind == "B" else action.kind)
    )
    stages = range(ranks * CHUNKS[name])
    assert done == Counter((kind, s, m) for kind in "FIW" for s in stages for m in range(microbatches))


@pytest.mark.parametrize("send", [0.0, 0.25])
@pytest.mark.parametrize("overlap", [None, 2.0])
@pytest.mark.parametrize(("name", "ranks", "microbatches"), EVERY)
def test_every_action_comes_after_what_it_needs(
    name: str, ranks: int, microbatches: int, overlap: float | None, send: float
) -> None:
    line = simulate(programs(name, ranks, microbatches), 1.0, 1.25, 0.5, overlap=overlap, send=send)
    last = ranks * CHUNKS[name] - 1
    found = {(s.kind, s.stage, s.microbatch): (s.start, s.end, r) for r, ss in enumerate(line.ranks) for s in ss}
    inputs = {(s, m): value for (kind, s, m), value in found.items() if kind in "BI"}
    for (kind, stage, microbatch), (start, _, rank) in found.items():
        needs = []
        if kind == "F" and stage:
            needs.append(found["F", stage - 1, microbatch])
        if kind in "BI":
            needs.append(found["F", stage, microbatch])
            needs += [inputs[stage + 1, microbatch]] if stage < last else []
        if kind == "W":
            needs.append(inputs[stage, microbatch])
        for _, end, place in needs:
            assert start >= end + (send if place != rank else 0.0) - 1e-12
    for spans in line.ranks:  # a rank does one thing at a time, but for overlapped pairs
        for one, following in itertools.pairwise(spans):
            assert following.start >= one.end or (overlap is not None and following.start == one.start)


BUBBLES: dict[str, tuple[Callable[[int], float], float, float]] = {
    "1f1b": (lambda ranks: (ranks - 1) * 3.0, 9.0, 9.0),
    "interleaved1f1b": (lambda ranks: (ranks - 1) * 3.0 / 2, 4.5, 4.5),
    "zero_bubble": (lambda ranks: (ranks - 1) * 1.0 / 2, 2.1, 2.1),
    "zbv": (lambda ranks: (ranks - 1) * 1.0 / 2, 1.8, 2.1),
    "dualpipev": (lambda ranks: (ranks - 1) * 2.0 / 2, 3.6, 3.9),
    "dualpipe": (lambda ranks: (ranks / 2 - 1) * 2.0, 2.4, 2.6),
}
"""By hand: at equal times; of 4 ranks and 12 micro-batches at unequal ones, simulated and by the formula."""


@pytest.mark.parametrize("name", CHUNKS)
def test_bubbles_equal_the_formula_or_less_at_unequal_times(name: str) -> None:
    by_hand, unequal, formula = BUBBLES[name]
    times = of_stage(name, 1.0, 1.0, 1.0)
    for ranks, microbatches in ((4, 8), (4, 12), (8, 20), (8, 32)):
        line = simulate(programs(name, ranks, microbatches), *times)
        # multiples of a half: exact
        assert max(line.bubbles) == bubble_formula(name, ranks, *times) == by_hand(ranks)
    times = of_stage(name, 1.0, 1.2, 0.8)
    assert max(simulate(programs(name, 4, 12), *times).bubbles) == pytest.approx(unequal, rel=1e-12)
    assert bubble_formula(name, 4, *times) == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 8), (8, 20)])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_bubbles_of_overlapped_pairs_equal_the_formula(name: str, ranks: int, microbatches: int) -> None:
    times, (overlap,) = of_stage(name, 1.0, 1.0, 1.0), of_stage(name, 2.5)
    line = simulate(programs(name, ranks, microbatches), *times, overlap=overlap)
    assert max(line.bubbles) == pytest.approx(bubble_formula(name, ranks, *times, overlap), rel=1e-12)
    assert max(line.bubbles) < bubble_formula(name, ranks, *times)


@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 8), (8, 20)])
def test_activations_in_flight_are_as_published(ranks: int, microbatches: int) -> None:
    def most(name: str) -> float:
        line = simulate(programs(name, ranks, microbatches), 1.0, 1.0, 1.0, overlap=2.5)
        return max(line.most_in_flight) / CHUNKS[name]

    assert most("1f1b") == ranks and most("zbv") == ranks
    assert most("dualpipe") == ranks + 1
    assert most("dualpipev") == (2 * ranks + 1) / 2, "PP + 1 of 2 * ranks stages, each half a rank"


def test_dualpipe_of_the_first_and_a_middle_rank() -> None:
    def words(rank: int) -> str:
        return " ".join(f"{a.kind}{a.stage}.{a.microbatch}{'&' * a.overlaps}" for a in programs("dualpipe", 4, 8)[rank])

    # written by hand from the eight phases, P = 4, M = 8: direction 0 enters at rank 0, direction 1 at rank 3
    assert words(0) == (
        "F0.0 F0.1 F0.2 F3.4 I3.4 W3.4 F3.5 F0.3& B3.5 F3.6& B0.0 B3.6 F3.7& B0.1 B3.7 I0.2 W0.2 I0.3 W0.3"
    )
    assert words(1) == ("F1.0 F2.4 F1.1 F2.5 F1.2 B2.4 F2.6& B1.0 F1.3& B2.5 F2.7& B1.1 B2.6 B1.2 I2.7 I1.3 W2.7 W1.3")


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_one_forward_one_backward_is_torch_order(ranks: int, microbatches: int) -> None:
    stage: Any = SimpleNamespace(num_stages=ranks, stage_index=0)
    order: Any = torch_schedules.Schedule1F1B(stage, microbatches).pipeline_order
    for rank, program in enumerate(programs("1f1b", ranks, microbatches)):
        theirs = [str(a) for a in order[rank] if a is not None and a.computation_type.value in "FB"]
        ours = [f"{a.stage}{a.kind}{a.microbatch}" for a in program]
        if rank == ranks - 1:  # torch's list starts the last rank at micro-batch 1, its runtime at 0
            theirs = [re.sub(r"F(\d+)", lambda m: f"F{int(m[1]) - 1}", text) for text in theirs]
        assert ours == theirs


def _moved(program: Sequence[Action], at: int, to: int) -> list[Action]:
    order = list(program)
    order.insert(to, order.pop(at))
    return order


def test_wrong_orders_never_end_and_are_named() -> None:
    order = list(programs("1f1b", 2, 2))
    backward_first = [_moved(order[0], 2, 0), order[1]]
    with pytest.raises(ValueError, match="rank 0 at B of stage 0, micro-batch 0, rank 1 at F of stage 1"):
        simulate(backward_first, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="never come, rank 1 at F of stage 1, micro-batch 1"):
        simulate([[a for a in order[0] if a.microbatch == 0], order[1]], 1.0, 1.0, 1.0)
    weight_first = [[order[1][0]._replace(stage=0, kind=kind) for kind in ("F", "W", "I")]]
    with pytest.raises(ValueError, match="rank 0 at W of stage 0"):
        simulate(weight_first, 1.0, 1.0, 1.0)


def test_one_forward_one_backward_by_hand() -> None:
    line = simulate(programs("1f1b", 2, 2), 1.0, 1.0, 1.0, send=0.5)
    # rank 0: F0 0-1, F1 1-2, B0 at 5 (1 + .5 forward to 2.5, backward to 4.5, + .5), B1 after 8 + .5
    assert [(s.kind, s.microbatch, s.start, s.end) for s in line.ranks[0]] == [
        ("F", 0, 0.0, 1.0),
        ("F", 1, 1.0, 2.0),
        ("B", 0, 5.0, 7.0),
        ("B", 1, 8.0, 10.0),
    ]
    assert [(s.kind, s.microbatch, s.start) for s in line.ranks[1]] == [
        ("F", 0, 1.5),
        ("B", 0, 2.5),
        ("F", 1, 4.5),
        ("B", 1, 5.5),
    ]
    assert line.total == 10.0 and line.bubbles == [4.0, 4.0] and line.bubble_share == 0.4
    assert line.most_in_flight == [2, 1]


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "said"),
    [
        ("gpipe", 4, 8, "there is no schedule 'gpipe'"),
        ("1f1b", 4, 3, "takes 4 micro-batches or more, got 3"),
        ("dualpipev", 4, 7, "takes 8 micro-batches or more, got 7"),
        ("dualpipe", 3, 8, "even numbers"),
        ("dualpipe", 4, 9, "even numbers"),
        ("interleaved1f1b", 4, 9, "multiple of the number of rounds"),
        ("zbv", 0, 8, "on 0 ranks"),
    ],
)
def test_wrong_sizes_are_refused(name: str, ranks: int, microbatches: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        programs(name, ranks, microbatches)


def test_measured_rows_become_a_timeline_and_a_picture(tmp_path: Path) -> None:
    rows = [(1, "F", 1, 0, 101.5, 102.0), (0, "F", 0, 0, 100.0, 101.0), (0, "B", 0, 0, 102.5, 104.0)]
    line = Timeline.measured([*rows, (1, "B", 1, 0, 101.75, 102.5)])
    assert line.ranks[0][0].start == 0.0 and line.total == 4.0
    assert line.bubbles == [1.5, 3.0], "rank 1: two actions that share a quarter second count once"
    assert line.bubble_share == 4.5 / 8
    draw({"simulated": simulate(programs("1f1b", 2, 2), 1.0, 1.0, 1.0), "measured": line}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_and_draws_every_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "new" / "a.png")]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CHUNKS) and "27.3%" in out
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["--ranks", "3", "--microbatches", "6"]) == 0
    assert "even numbers" in capsys.readouterr().out
    with pytest.raises(ValueError, match="on 0 ranks"):
        main(["--ranks", "0"])
