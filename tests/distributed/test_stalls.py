"""The rules that find the rank for which the others wait."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.distributed.stalls import ENDED, Heartbeat, Limits, SignOfLife, Stall, find_stall

LIMITS = Limits(timeout=10, phases={"starting": 100, "saving": 50})


def beat(rank: int, still: float = 0.0, waiting: bool = False, **more: Any) -> Heartbeat:
    plain = {"host": "h", "pid": 40 + rank, "count": 1, "step": 5, "phase": "forward", "where": "a.py:1 f"}
    return Heartbeat(rank=rank, still=still, waiting=waiting, **(plain | more))


def waits(*ranks: int, still: float = 11.0) -> list[Heartbeat]:
    return [beat(rank, still, waiting=True) for rank in ranks]


def found(beats: list[Heartbeat], silent: dict[int, float] | None = None) -> Stall | None:
    signs = {one.rank: SignOfLife(heartbeat=one, silent=(silent or {}).get(one.rank, 0.0)) for one in beats}
    return find_stall(signs, LIMITS, speaker=0)


def test_messages_survive_the_store() -> None:
    assert Heartbeat.from_json(beat(3).to_json()) == beat(3)
    stall = Stall(kind="silent", rank=3, seconds=1.5, speaker=1)
    assert Stall.from_json(stall.to_json().encode()) == stall


ODD = beat(3, 11, waiting=True, where="b.py:2 g")
SLEEPS = beat(2, 11.5, step=14, phase="backward", where="dsmini/functional/experts.py:83 experts")


@pytest.mark.parametrize(
    ("beats", "silent", "kind", "rank", "words"),
    [
        (
            *([SLEEPS, *waits(0, 1, 3)], {}, "still", 2),
            "rank 2 (pid 42 on h) has stood still for 12 s: step 14, backward, in dsmini/functional/experts.py:83 "
            "experts; the others wait for it",
        ),
        ([*waits(0, 1, still=99), beat(2, 9)], {}, None, None, "it moves"),
        ([beat(0, 40, phase="saving"), *waits(1, 2, still=40)], {}, None, None, "a phase has its own limit"),
        ([beat(0, 51, phase="saving"), *waits(1, 2, still=40)], {}, "still", 0, "stood still for 51 s"),
        (
            *([beat(0, 20), *waits(1, still=20), beat(2, phase="saving")], {1: 9.0, 2: 11.0}, "silent", 2),
            "no sign of life for 11 s; it was stopped or killed after step 5, saving",
        ),
        ([*waits(0, 1, 2, still=12), ODD], {}, "collective", 3, "waited inside a collective for 11 s; rank 3"),
        ([*waits(0, 1, still=12), ODD, beat(4, 11, True, step=4)], {}, "collective", 4, "all ranks have waited"),
        ([beat(0), beat(1, 99, phase=ENDED)], {1: 999}, None, None, "one that ended is not missed"),
        ([beat(0, phase=ENDED)], {}, None, None, "nobody is left"),
    ],
)
def test_rank_for_which_the_others_wait_is_named(
    beats: list[Heartbeat], silent: dict[int, float], kind: str | None, rank: int | None, words: str
) -> None:
    stall = found(beats, silent)
    if kind is None:
        assert stall is None, words
    else:
        assert stall is not None and (stall.kind, stall.rank) == (kind, rank) and words in stall.sentence


def test_rank_that_never_came_has_the_time_of_a_start() -> None:
    def signs(silent: float) -> dict[int, SignOfLife]:
        return {0: SignOfLife(heartbeat=beat(0, 200), silent=0), 1: SignOfLife(heartbeat=None, silent=silent)}

    assert find_stall(signs(99), LIMITS, 0) is None, "others have to wait for it"
    stall = find_stall(signs(101), LIMITS, 0)
    assert stall is not None and stall.rank == 1 and "did not start" in stall.sentence


@given(st.lists(st.tuples(st.floats(0, 60), st.booleans(), st.floats(0, 20)), min_size=1, max_size=5))
def test_alarm_only_if_one_is_silent_or_none_moves(ranks: list[tuple[float, bool, float]]) -> None:
    beats = [beat(rank, still, waiting) for rank, (still, waiting, _) in enumerate(ranks)]
    stall = found(beats, {i: silent for i, (_, _, silent) in enumerate(ranks)})
    assert (stall is not None) == (any(silent > 10 for *_, silent in ranks) or all(still > 10 for still, *_ in ranks))
    assert stall is None or stall.kind != "still" or not ranks[stall.rank][1], "who waits is not to blame"


def test_limit_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="the watchdog's limit of saving is 0, want seconds above 0; leave it out"):
        Limits(phases={"saving": 0})
