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

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now, self.attempt, self.step, self.saved = 0, 0, 0, 0
        self.truth = dict.fromkeys(KINDS, 0)
        self.durations: dict[int, int] = {}
        self.step_time = 0
        self.failures = self.lost = 0
        self.restart = 0
        self.events: list[Event] = []
        self.background: tuple[int, int, int, int] | None = None  # end, step, blocked, length

    def draw(self, most: int = 900) -> int:
        return self.random.randint(0, most)

    def log(self, name: str, **fields: Any) -> None:
        self.events.append(event(name, self.now / 1000, self.step, self.attempt, **fields))

    def pass_time(self, length: int) -> None:
        """Let time pass; a save in the background is logged when it ends."""
        end = self.now + length
        if self.background is not None and self.background[0] <= end:
            self.now, step, blocked, writing = self.background
            self.events.append(
                event("saved", self.now / 1000, step, self.attempt, seconds=blocked / 1000, background=writing / 1000)
            )
            self.truth["saving"] += blocked
            self.truth["other"] -= blocked
            self.saved, self.background = step, None
        self.now = end

    def idle(self) -> None:
        pause = self.draw(50)
        self.pass_time(pause)
        self.truth["other"] += pause

    def start(self, clean: bool) -> None:
        down = self.draw() if self.attempt else 0
        self.now += down
        self.truth["down"] += down
        self.background = None
        self.lost += max(0, self.step - self.saved)
        self.step = self.saved
        self.durations = {step: time for step, time in self.durations.items() if step <= self.step}
        self.attempt += 1
        self.log("started")
        took = self.draw()
        self.now += took
        self.truth["restoring"] += took
        if self.attempt > 1 and not clean:
            self.failures += 1
            self.restart += down + took
        if self.random.random() < 0.5:
            self.log("restored", seconds=took / 1000)

    def train(self) -> None:
        took = 1 + self.draw()
        self.pass_time(took)
        self.step += 1
        self.durations[self.step] = took
        self.step_time += took
        self.log("step", seconds=took / 1000)

    def save(self) -> None:
        took = self.draw()
        self.pass_time(took)
        if self.background is None and self.random.random() < 0.5:
            self.truth["other"] += took  # until it is written
            writing = 1 + self.draw(3000)
            self.background = (self.now + writing, self.step, took, writing)
            return
        self.truth["saving"] += took
        self.log("saved", seconds=took / 1000)
        self.saved = self.step

    def validate(self) -> None:
        took = self.draw()
        self.pass_time(took)
        self.truth["validating"] += took
        self.log(self.random.choice(["validated", "plotted"]), seconds=took / 1000)

    def rewind(self) -> None:
        took = self.draw()
        self.pass_time(took)
        self.truth["restoring"] += took
        self.lost += self.step - self.saved
        self.step, self.background = self.saved, None
        self.durations = {step: time for step, time in self.durations.items() if step <= self.step}
        self.log("rewound", seconds=took / 1000)

    def die(self) -> bool:
        """End the attempt: killed, failed or stopped; return whether it was stopped."""
        if self.background is not None:
            self.train()  # so that the log knows of the time before it
        how = self.random.choice(["killed", "killed", "failed", "stopped"])
        if how == "killed":
            unseen = self.draw()
            self.now += unseen
            self.truth["down"] += unseen
            self.restart += unseen
        elif how == "failed":
            still = self.draw()
            self.now += still
            self.truth["down"] += still
            self.restart += still
            self.log("failed")
        else:
            self.log(how)
        return how == "stopped"

    def run(self, attempts: int, steps: int) -> None:
        clean = False
        for _ in range(attempts):
            self.start(clean)
            self.train()
            for _ in range(steps):
                self.idle()
                self.random.choice([self.train, self.train, self.train, self.save, self.validate, self.rewind])()
            clean = self.die()
        self.start(clean)
        self.train()
        self.log("finished")
        self.truth["productive"] = sum(self.durations.values())
        self.truth["lost"] = self.step_time - self.truth["productive"]


@given(seed=st.integers(0, 2**32), attempts=st.integers(0, 5), steps=st.integers(0, 30))
def test_report_knows_where_the_time_of_a_simulated_run_went(seed: int, attempts: int, steps: int) -> None:
    run = Simulation(seed)
    run.run(attempts, steps)
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


def test_redone_steps_are_lost_and_counted_once() -> None:
    got = goodput_of(
        [
            event("started", 0, 0),
            *(event("step", 10 + step, step, seconds=1) for step in (1, 2, 3)),
            event("started", 20, 1, attempt=2),
            *(event("step", 23 + step, step, attempt=2, seconds=1) for step in (2, 3, 4)),
        ]
    )
    assert seconds(got) == {"productive": 4, "lost": 2, "restoring": 10 + 4, "down": 7}
    assert (got.steps, got.lost_steps, got.failures) == (4, 2, 1)
    assert got.restart_seconds == 7 + 4, "the first start is not the cost of a failure"


def test_rewound_steps_are_lost_before_any_is_redone() -> None:
    log = [event("started", 0, 0), *(event("step", step, step, seconds=1) for step in (1, 2, 3))]
    got = goodput_of([*log, event("rewound", 5, 1, seconds=2)])
    assert seconds(got) == {"productive": 1, "lost": 2, "restoring": 2}
    assert (got.steps, got.lost_steps, got.failures) == (1, 2, 0)


def test_attempt_without_a_step_only_restores() -> None:
    log = [event("started", 0, 0), event("restored", 2, 0, seconds=1), event("failed", 5, 0)]
    got = goodput_of([*log, event("started", 6, 0, 2), event("step", 9, 1, 2, seconds=1)])
    assert seconds(got) == {"restoring": 5 + 2, "down": 1, "productive": 1}
    assert got.restart_seconds == 1 + 2


def test_save_in_the_background_blocked_before_it_began() -> None:
    log = [event("started", 0, 0), event("step", 1, 1, seconds=1), event("step", 4, 2, seconds=2)]
    got = goodput_of([*log, event("saved", 6, 1, seconds=0.5, background=4), event("step", 8, 3, seconds=3)])
    places = [(span.start / 1e6, span.end / 1e6, span.kind) for span in got.spans]
    assert (1.5, 2, "saving") in places, "it blocked until 6 - 4 s"
    assert seconds(got) == {"productive": 6, "saving": 0.5, "other": 1.5}


def test_clock_that_steps_back_costs_no_time() -> None:
    got = goodput_of(
        [
            event("started", 1000, 0),
            event("step", 1002, 1, seconds=1),
            event("step", 5, 2, seconds=3),
            event("started", 1, 2, attempt=2),
            event("step", 3, 3, attempt=2, seconds=2),
        ]
    )
    assert seconds(got) == {"restoring": 1, "productive": 1 + 3 + 2}


def test_killed_attempt_without_started_line_is_an_attempt() -> None:
    got = goodput_of([event("started", 0, 0), event("step", 1, 1, seconds=1), event("step", 9, 1, 2, seconds=2)])
    assert seconds(got) == {"lost": 1, "down": 6, "productive": 2}
    assert (got.attempts, got.failures) == (2, 1)


def test_stop_on_purpose_is_down_and_no_failure() -> None:
    log = [event("started", 0, 0), event("step", 1, 1, seconds=1), event("stopped", 1, 1), event("started", 9, 1, 2)]
    got = goodput_of(log)
    assert seconds(got) == {"productive": 1, "down": 8}
    assert (got.failures, got.restart_seconds, got.mean_seconds_between_failures) == (0, None, None)


def test_standing_still_before_a_failure_is_down() -> None:
    log = [event("started", 0, 0), event("step", 1, 1, seconds=1), event("stalled", 61, 1), event("failed", 61, 1)]
    got = goodput_of(log)
    assert seconds(got) == {"productive": 1, "down": 60}
    assert got.failures == 1


def test_inputs_of_the_prediction_are_measured() -> None:
    """Check the planner's formula, (1 - (u + lost) / M) / (1 + w / D), and the small term that it leaves out."""
    run = Simulation(5)
    run.run(8, 40)
    got = goodput_of(run.events)
    assert got.failures > 2 and got.saves > 10
    m, u, w, d = (
        got.mean_seconds_between_failures,
        got.restart_seconds,
        got.saving_seconds,
        got.interval_seconds,
    )
    assert None not in (m, u, w, d) and got.training_share is not None
    lost = got.microseconds["lost"] / 1e6 / got.failures  # half an interval, were failures and saves regular
    assert got.training_share == pytest.approx((1 - (u + lost) / m) / (1 + w / d) - w / d * lost / m / (1 + w / d))


def test_many_steps_take_linear_time() -> None:
    log = [event("started", 0, 0), *(event("step", step, step, seconds=0.5) for step in range(1, 20_000))]
    got = goodput_of(log)
    assert seconds(got) == {"restoring": 0.5, "productive": 0.5 * 19_999, "other": 0.5 * 19_998}


def test_picture_of_a_run_is_written(tmp_path: Path) -> None:
    run = Simulation(7)
    run.run(12, 60)
    plot_goodput(goodput_of(run.events), tmp_path / "goodput.png")
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["goodput.png"]
    nothing = goodput_of([event("started", 0, 0)])
    plot_goodput(nothing, tmp_path / "goodput.png")


def test_bars_join_what_no_eye_can_tell_apart() -> None:
    log = [event("started", 0, 0), *(event("step", step, step, seconds=0.5) for step in range(1, 20_000))]
    drawn = bars(goodput_of(log))
    assert len(drawn) < 6000
    assert {bar.kind for bar in drawn} == {"productive", "other", "restoring"}


def test_report_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no events\.jsonl with events; name a run"):
        goodput(tmp_path)
    log = EventLog(log_path(tmp_path))
    log.write("started", 0)
    log.write("finished", 0)
    assert goodput(tmp_path).attempts == 1
    assert goodput_table(goodput(tmp_path)).rows[-1][0] == "total"
