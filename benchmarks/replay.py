"""Why a recorded pipeline has other bubbles than the simulated one: it runs again, with one cause more each time.

    simulation          F, I and W take their medians, and B is I + W
    one backward        B takes its own median: a backward in one piece is cheaper than its two halves
    unequal stages      each kind takes its median on each stage
    noise               each action takes the time it took
    between actions     each action starts as late after the one before on its rank as it did
    messages            each action starts as late after a result of the other rank as it did: the record itself

The difference of two lines is what the second one explains. All together are the difference of record and simulation.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.schedules import Action, Programs, Row, Timeline

CAUSES = ("one backward", "unequal stages", "noise", "between actions", "messages")
Key = tuple[str, int, int]
"""Kind, stage and micro-batch of an action."""
Lag = tuple[float, bool]
"""Seconds from the moment that an action could start until it did, and True if a message came last."""


def medians(rows: Sequence[Row]) -> dict[str, float]:
    """Return the median seconds of each kind of action."""
    return _medians(rows, lambda row: row[1])


def medians_by_stage(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """Return the median seconds of each kind of action on each stage."""
    return _medians(rows, lambda row: row[1:3])


def _medians(rows: Sequence[Row], key: Callable[[Row], object]) -> dict:
    groups: dict[object, list[float]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row[5] - row[4])
    return {name: statistics.median(times) for name, times in groups.items()}


def replay(programs: Programs, seconds: Callable[[Action], float], lag: Callable[[Action], float]) -> list[Row]:
    """Return the actions of programs that take these seconds, each with a lag before it.

    The rules are those of `benchmarks.schedules.simulate`: without lags, equal times give equal time lines.
    """
    rows: list[Row] = []
    ends: dict[Key, float] = {}
    at, free = [0] * len(programs), [0.0] * len(programs)
    last = max(action.stage for program in programs for action in program)
    while any(i < len(program) for i, program in zip(at, programs, strict=True)):
        before = list(at)
        for rank, program in enumerate(programs):
            together = program[at[rank] : at[rank] + 1 + program[at[rank]].overlaps] if at[rank] < len(program) else ()
            needs = [need for action in together for need in needed(action, last)]
            if not together or any(need not in ends for need in needs):
                continue
            free[rank] = max([free[rank], *(ends[need] for need in needs)])
            for action in together:
                start = free[rank] + lag(action)
                free[rank] = start + seconds(action)
                rows.append((rank, action.kind, action.stage, action.microbatch, start, free[rank]))
            ends |= {result(action): free[rank] for action in together}
            at[rank] += len(together)
        assert at != before, "the programs wait for each other"
    return rows


def needed(action: Action, last: int) -> list[Key]:
    """Return the results that an action needs."""
    stage, part = action.stage, action.microbatch
    if action.kind == "W":
        return [("I", stage, part)]
    if action.kind == "F":
        return [("F", stage - 1, part)] if stage else []
    return [("F", stage, part)] + ([("I", stage + 1, part)] if stage < last else [])


def result(action: Action) -> Key:
    """Return the result of an action. That of a whole backward is the one of its first half, which others wait for."""
    return ("I" if action.kind == "B" else action.kind, action.stage, action.microbatch)


def lags(programs: Programs, rows: Sequence[Row]) -> dict[Key, Lag]:
    """Return the lag of each action of a record. The first actions wait for the first of all."""
    times = {row[1:4]: row[4:] for row in rows}
    first = min(row[4] for row in rows)
    last = max(action.stage for program in programs for action in program)
    ends: dict[Key, tuple[float, int]] = {}
    for rank, program in enumerate(programs):
        for i, action in enumerate(program):
            until = program[i + 1] if action.overlaps else action
            ends[result(action)] = (times[key(until)][1], rank)
    found: dict[Key, Lag] = {}
    for rank, program in enumerate(programs):
        free, paired = first, False
        for i, action in enumerate(program):
            together = program[i : i + 1 + action.overlaps]
            needs = [] if paired else [ends[need] for each in together for need in needed(each, last)]
            arrived = max((end for end, place in needs if place != rank), default=first)
            found[key(action)] = (times[key(action)][0] - max(free, arrived), arrived > free)
            free, paired = times[key(action)][1], action.overlaps
    return found


def key(action: Action) -> Key:
    """Return the name of an action in a record."""
    return (action.kind, action.stage, action.microbatch)


def causes(programs: Programs, rows: Sequence[Row], every: Sequence[Row], simulated: Timeline) -> dict[str, float]:
    """Return the seconds of a rank's bubble, on average over the ranks, that each cause adds to the simulated ones.

    Args:
        rows: one recorded step.
        every: all recorded steps, of which the medians are.
    """
    by_kind, by_stage = medians(every), medians_by_stage(every)
    took = {row[1:4]: row[5] - row[4] for row in rows}
    late = lags(programs, rows)
    own = {name: 0.0 if message else seconds for name, (seconds, message) in late.items()}
    runs = [
        replay(programs, lambda a: by_kind[a.kind], lambda a: 0.0),
        replay(programs, lambda a: by_stage[a.kind, a.stage], lambda a: 0.0),
        replay(programs, lambda a: took[key(a)], lambda a: 0.0),
        replay(programs, lambda a: took[key(a)], lambda a: own[key(a)]),
        rows,
    ]
    bubbles = [mean_bubble(line) for line in (simulated, *map(Timeline.measured, runs))]
    return {name: after - before for name, before, after in zip(CAUSES, bubbles, bubbles[1:], strict=False)}


def mean_bubble(line: Timeline) -> float:
    """Return the time that a rank computes nothing, on average over the ranks."""
    return sum(line.bubbles) / len(line.ranks)


def times_for_simulation(by_kind: Mapping[str, float]) -> tuple[float, float, float]:
    """Return the medians of F, I and W. A schedule with whole backwards alone has no halves; all is I then."""
    return by_kind["F"], by_kind.get("I", by_kind.get("B", 0.0)), by_kind.get("W", 0.0)
