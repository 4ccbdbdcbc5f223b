"""The goodput report: every microsecond has one kind, and the kinds are those of a simulated run."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.distributed.events import Event, EventLog, log_path
from dsmini.distributed.goodput import KINDS, Goodput, goodput, goodput_of
from dsmini.distributed.goodput_report import bars, goodput_notes, goodput_table, plot_goodput


def event(name: str, time: float, step: int, attempt: int = 1, **fields: Any) -> Event:
    return Event(event=name, time=time, attempt=attempt, step=step, fields=fields)


def seconds(result: Goodput) -> dict[str, float]:
    return {kind: value / 1e6 for kind, value in result.microseconds.items() if value}


class Simulation:
    """A run in whole milliseconds that knows where its time goes, and logs what a run would log."""

    def __init__(self, seed: int, attempts: int, steps: int) -> None:
        self.random = random.Random(seed)
        self.now = self.attempt = self.step = self.saved = 0
        self.truth = dict.fromkeys(KINDS, 0)
        self.durations: dict[int, int] = {}
        self.step_time = self.failures = self.lost = self.restart = 0
        self.events: list[Event] = []
        self.background: tuple[int, int, int, int] | None = None  # end, step, blocked, length
        clean = False
        for _ in range(attempts):
            self.start(clean)
            self.train()
            for _ in range(steps):
                self.spend("other", 50)
                self.random.choice([self.train, self.train, self.train, self.save, self.validate, self.rewind])()
            clean = self.die()
        self.start(clean)
        self.train()
        self.write("finished")
        self.truth["productive"] = sum(self.durations.values())
        self.truth["lost"] = self.step_time - self.truth["productive"]

    def write(self, name: str, **fields: Any) -> None:
        self.events.append(event(name, self.now / 1000, self.step, self.attempt, **fields))

    def spend(self, kind: str, most: int = 900) -> int:
        """Let some time pass; a save in the background is logged when it ends."""
        took = self.random.randint(0, most)
        end = self.now + took
        if self.background is not None and self.background[0] <= end:
            self.now, step, blocked, writing = self.background
            times = {"seconds": blocked / 1000, "background": writing / 1000}
            self.events.append(event("saved", self.now / 1000, step, self.attempt, **times))
            self.truth["saving"] += blocked
            self.truth["other"] -= blocked
            self.saved, self.background = step, None
        self.now = end
        self.truth[kind] += took
        return took

    def go_back(self) -> None:
        """Return to the checkpoint."""
        self.background = None
        self.lost += self.step - self.saved
        self.step = self.saved
        self.durations = {step: time for step, time in self.durations.items() if step <= self.step}

    def start(self, clean: bool) -> None:
        self.background = None
        took = self.spend("down") if self.attempt else 0
        self.go_back()
        self.attempt += 1
        self.write("started")
        restoring = self.spend("restoring")
        if self.attempt > 1 and not clean:
            self.failures += 1
            self.restart += took + restoring
        if self.random.random() < 0.5:
            self.write("restored", seconds=restoring / 1000)

    def train(self) -> None:
        took = self.spend("productive")
        self.step += 1
        self.durations[self.step] = took
        self.step_time += took
        self.write("step", seconds=took / 1000)

    def save(self) -> None:
        in_background = self.background is None and self.random.random() < 0.5
        took = self.spend("other" if in_background else "saving")  # until it is written
        if in_background:
            writing = self.random.randint(1, 3000)
            self.background = (self.now + writing, self.step, took, writing)
        else:
            self.write("saved", seconds=took / 1000)
            self.saved = self.step

    def validate(self) -> None:
        took = self.spend("validating")
        self.write(self.random.choice(["validated", "plotted"]), seconds=took / 1000)

    def rewind(self) -> None:
        took = self.spend("restoring")
        self.go_back()
        self.write("rewound", seconds=took / 1000)

    def die(self) -> bool:
        """End the attempt: killed, failed or stopped; return whether it was stopped."""
        if self.background is not None:
            self.train()  # so that the log knows of the time before it
        self.background = None
        how = self.random.choice(["killed", "killed", "failed", "stopped"])
        if how != "stopped":
            self.restart += self.spend("down")
        if how != "killed":
            self.write(how)
        return how == "stopped"


@given(seed=st.integers(0, 2**32), attempts=st.integers(0, 5), steps=st.integers(0, 30))
def test_report_knows_where_the_time_of_a_simulated_run_went(seed: int, attempts: int, steps: int) -> None:
    run = Simulation(seed, attempts, steps)
    got = goodput_of(run.events)
    assert {kind: value / 1000 for kind, value in got.microseconds.items()} == run.truth
    assert (got.attempts, got.failures) == (run.attempt, run.failures)
    assert (got.steps, got.lost_steps) == (len(run.durations), run.lost)
    assert got.restart_microseconds == 1000 * run.restart
    assert got.total == 1000 * run.now - round(1e6 * run.events[0].time)


EVENT = st.builds(
    lambda name, time, attempt, step, length, background: event(
        name, time, step, attempt, seconds=length, background=background
    ),
    st.sampled_from(["started", "step", "step", "saved", "validated", "rewound", "stalled", "failed", "finished"]),
    st.floats(-1e6, 1e6),
    st.integers(1, 3),
    st.integers(0, 5),
    st.floats(-1, 1e6) | st.none() | st.just("x"),
    st.floats(0, 1e6),
)


@given(st.lists(EVENT, min_size=1, max_size=30))
def test_shares_add_up_whatever_the_log_holds(events: list[Event]) -> None:
    got = goodput_of(events)
    assert min(got.microseconds.values()) >= 0
    assert got.total == sum(span.end - span.start for span in got.spans)
    places = [(span.start, span.end) for span in got.spans]
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(places)), "no gap, no overlap"
    assert places == [] or (places[0][0] == 0 and places[-1][1] == got.total)
    assert got.steps + got.lost_steps == sum(one.event == "step" for one in events)
    printed = [float(row[2].removesuffix(" %")) for row in goodput_table(got).rows]
    assert round(sum(printed[:-1]), 6) == printed[-1] == (100 if got.total else 0)
    assert goodput_notes(got)


def log(text: str) -> list[Event]:
    """Return the events of a text: NAME TIME STEP, seconds after a colon, @ and the attempt, separated by commas."""
    found: list[Event] = []
    for words in text.split(", "):
        words, _, attempt = words.partition(" @")
        words, _, took = words.partition(":")
        name, time, step = words.split()
        length, _, background = took.partition("+")
        fields = {"seconds": float(length)} if took else {}
        fields |= {"background": float(background)} if background else {}
        found.append(event(name, float(time), int(step), int(attempt or 1), **fields))
    return found


RESTARTED = "started 0 0, step 11 1:1, step 12 2:1, step 13 3:1, started 20 1 @2, step 25 2:1 @2, step 26 3:1 @2"
DIED_AT_THE_START = "started 0 0, restored 2 0:1, failed 5 0, started 6 0 @2, step 9 1:1 @2"
BACK = "started 1000 0, step 1002 1:1, step 5 2:3, started 1 2 @2, step 3 3:2 @2"
CASES: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    # the first start is not the cost of a failure
    "redone steps are lost and counted once": (
        f"{RESTARTED}, step 27 4:1 @2",
        {"productive": 4, "lost": 2, "restoring": 10 + 4, "down": 7},
        {"steps": 4, "lost_steps": 2, "failures": 1, "restart_seconds": 7 + 4},
    ),
    "rewound steps are lost before any is redone": (
        "started 0 0, step 1 1:1, step 2 2:1, step 3 3:1, rewound 5 1:2",
        {"productive": 1, "lost": 2, "restoring": 2},
        {"steps": 1, "lost_steps": 2, "failures": 0},
    ),
    "attempt without a step only restores": (
        DIED_AT_THE_START,
        {"restoring": 5 + 2, "down": 1, "productive": 1},
        {"restart_seconds": 1 + 2},
    ),
    "save in the background blocked before it began": (
        "started 0 0, step 1 1:1, step 4 2:2, saved 6 1:0.5+4, step 8 3:3",
        {"productive": 6, "saving": 0.5, "other": 1.5},
        {},
    ),
    "clock that steps back costs no time": (BACK, {"restoring": 1, "productive": 1 + 3 + 2}, {}),
    "killed attempt without a started line is an attempt": (
        "started 0 0, step 1 1:1, step 9 1:2 @2",
        {"lost": 1, "down": 6, "productive": 2},
        {"attempts": 2, "failures": 1},
    ),
    "stop on purpose is down and no failure": (
        "started 0 0, step 1 1:1, stopped 1 1, started 9 1 @2",
        {"productive": 1, "down": 8},
        {"failures": 0, "restart_seconds": None, "mean_seconds_between_failures": None},
    ),
    "standing still before a failure is down": (
        "started 0 0, step 1 1:1, stalled 61 1, failed 61 1",
        {"productive": 1, "down": 60},
        {"failures": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_account_by_hand(name: str) -> None:
    text, want, more = CASES[name]
    got = goodput_of(log(text))
    assert seconds(got) == want
    assert {key: getattr(got, key) for key in more} == more
    if "+" in text:  # it blocked until 6 - 4 s
        assert (1.5, 2, "saving") in [(span.start / 1e6, span.end / 1e6, span.kind) for span in got.spans]


def test_inputs_of_the_prediction_are_measured() -> None:
    """Check the planner's formula, (1 - (u + lost) / M) / (1 + w / D), and the small term that it leaves out."""
    run = Simulation(5, 8, 40)
    got = goodput_of(run.events)
    assert got.failures > 2 and got.saves > 10
    m, u, w, d = got.mean_seconds_between_failures, got.restart_seconds, got.saving_seconds, got.interval_seconds
    assert m is not None and u is not None and w is not None and d is not None
    lost = got.microseconds["lost"] / 1e6 / got.failures  # half an interval, were failures and saves regular
    assert got.training_share == pytest.approx((1 - (u + lost) / m) / (1 + w / d) - w / d * lost / m / (1 + w / d))


def test_picture_of_a_run_is_written(tmp_path: Path) -> None:
    run = Simulation(7, 6, 30)
    plot_goodput(goodput_of(run.events), tmp_path / "goodput.png")
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["goodput.png"]
    nothing = goodput_of([event("started", 0, 0)])
    plot_goodput(nothing, tmp_path / "goodput.png")


def test_bars_of_many_steps_join_what_no_eye_can_tell_apart() -> None:
    steps = (event("step", step, step, seconds=0.5) for step in range(1, 10_000))
    got = goodput_of([event("started", 0, 0), *steps])
    assert seconds(got) == {"restoring": 0.5, "productive": 0.5 * 9_999, "other": 0.5 * 9_998}
    drawn = bars(got)
    assert len(drawn) < 6000
    assert {bar.kind for bar in drawn} == {"productive", "other", "restoring"}


def test_report_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no events\.jsonl with events; name a run"):
        goodput(tmp_path)
    for name in ("started", "finished"):
        EventLog(log_path(tmp_path), attempt=1).write(name, 0)
    assert goodput(tmp_path).attempts == 1
    assert goodput_table(goodput(tmp_path)).rows[-1][0] == "total"
