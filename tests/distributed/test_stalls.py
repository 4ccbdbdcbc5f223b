"""The rules that find the rank for which the others wait."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.distributed.stalls import ENDED, Heartbeat, Limits, SignOfLife, Stall, find_stall

LIMITS = Limits(timeout=10, phases={"starting": 100, "saving": 50})


def beat(rank: int, **more: Any) -> Heartbeat:
    plain = {"host": "h", "pid": 40 + rank, "count": 1, "step": 5, "phase": "forward", "still": 0.0, "waiting": False}
    return Heartbeat(**({"rank": rank, "where": "a.py:1 f"} | plain | more))


def found(*beats: Heartbeat, silent: dict[int, float] | None = None) -> Stall | None:
    signs = {one.rank: SignOfLife(heartbeat=one, silent=(silent or {}).get(one.rank, 0.0)) for one in beats}
    return find_stall(signs, LIMITS, speaker=0)


def test_messages_survive_the_store() -> None:
    assert Heartbeat.from_json(beat(3).to_json()) == beat(3)
    stall = Stall(kind="silent", rank=3, seconds=1.5, speaker=1)
    assert Stall.from_json(stall.to_json().encode()) == stall


def test_rank_outside_a_collective_is_named() -> None:
    waits = [beat(rank, still=11, waiting=True) for rank in (0, 1, 3)]
    stalled = beat(2, still=11.5, step=14, phase="backward", where="dsmini/functional/experts.py:83 experts")
    stall = found(*waits, stalled)
    assert stall is not None and (stall.kind, stall.rank) == ("still", 2)
    assert stall.sentence == (
        "rank 2 (pid 42 on h) has stood still for 12 s: step 14, backward, in "
        "dsmini/functional/experts.py:83 experts; the others wait for it"
    )


def test_slow_rank_that_moves_gives_no_alarm() -> None:
    assert found(*[beat(rank, still=99, waiting=True) for rank in (0, 1)], beat(2, still=9)) is None


def test_known_phase_has_its_own_limit() -> None:
    waits = [beat(rank, still=40, waiting=True) for rank in (1, 2)]
    assert found(beat(0, still=40, phase="saving"), *waits) is None
    stall = found(beat(0, still=51, phase="saving"), *waits)
    assert stall is not None and stall.rank == 0


def test_silent_rank_is_named_first() -> None:
    beats = [beat(0, still=20), beat(1, still=20, waiting=True), beat(2, phase="saving")]
    stall = found(*beats, silent={1: 9.0, 2: 11.0})
    assert stall is not None and (stall.kind, stall.rank) == ("silent", 2), "its phase does not matter"
    assert "no sign of life for 11 s; it was stopped or killed after step 5, saving" in stall.sentence


def test_rank_that_never_came_has_the_time_of_a_start() -> None:
    def signs(silent: float) -> dict[int, SignOfLife]:
        return {0: SignOfLife(heartbeat=beat(0, still=200), silent=0), 1: SignOfLife(heartbeat=None, silent=silent)}

    assert find_stall(signs(99), LIMITS, 0) is None, "others have to wait for it"
    stall = find_stall(signs(101), LIMITS, 0)
    assert stall is not None and stall.rank == 1 and "did not start" in stall.sentence


def test_odd_one_in_another_collective_is_named() -> None:
    beats = [beat(rank, still=12 + rank, waiting=True) for rank in range(3)]
    odd = beat(3, still=11, waiting=True, where="b.py:2 g")
    stall = found(*beats, odd)
    assert stall is not None and (stall.kind, stall.rank, stall.seconds) == ("collective", 3, 11)
    behind = beat(4, still=11, waiting=True, step=4)
    stall = found(*beats, odd, behind)
    assert stall is not None and stall.rank == 4
    assert stall.sentence.startswith("all ranks have waited inside a collective for 11 s; rank 4")


def test_rank_that_ended_is_not_missed() -> None:
    assert found(beat(0), beat(1, phase=ENDED, still=99), silent={1: 999}) is None
    assert found(beat(0, phase=ENDED)) is None


@given(st.lists(st.tuples(st.floats(0, 60), st.booleans(), st.floats(0, 20)), min_size=1, max_size=5))
def test_alarm_only_if_one_is_silent_or_none_moves(ranks: list[tuple[float, bool, float]]) -> None:
    beats = [beat(i, still=still, waiting=waiting) for i, (still, waiting, _) in enumerate(ranks)]
    stall = found(*beats, silent={i: silent for i, (_, _, silent) in enumerate(ranks)})
    expected = any(silent > 10 for *_, silent in ranks) or all(still > 10 for still, *_ in ranks)
    assert (stall is not None) == expected
    if stall is not None and stall.kind == "still":
        assert not ranks[stall.rank][1], "who waits is not to blame"


def test_limit_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="the watchdog's limit of saving is 0, want seconds above 0; leave it out"):
        Limits(phases={"saving": 0})
