"""Diagnoses of runs that have a fault, and of healthy ones.

Small training runs get a fault each: a loader that sleeps or unpacks, shuffled labels, a repeated text, a routing bias
that chooses the same experts, tiny experts, one thread, the slower dtype, another program. Others are healthy, or have
something that only looks guilty. Each is diagnosed with some seeds, and predictions are made before the experiments.
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

from benchmarks.faults import Fault, faults
from benchmarks.question import Case, Figure, Question, Setting, cases_over, drawing, figure, pick
from dsmini.diagnosis.diagnosis import Diagnosis, Plan, diagnose
from dsmini.measure import step_rates

SEEDS, QUICK_SEEDS = 5, 1
ROUNDS = 10
"""Rounds of a diagnosis, however long they take: a run on one thread is five times as slow as others."""
WITHIN = 0.10
"""Largest error of a predicted gain that counts as right."""
LARGE = 0.10
"""Gains above this are also counted by themselves: predicting that little changes is easy."""
LEAST_RIGHT = 4
"""Seeds of five in which a fault must be named rightly."""


def cases(setting: Setting) -> list[Case]:
    by_name = {fault.name: fault for fault in faults()}
    points = [(name, seed) for seed in range(QUICK_SEEDS if setting.quick else SEEDS) for name in by_name]
    return cases_over("run={} seed={}", points, 30.0, partial(measure, setting, by_name))


def measure(setting: Setting, by_name: dict[str, Fault], name: str, seed: int) -> Iterator[Figure]:
    fault = by_name[name]
    rates = step_rates.rates_beyond(setting.roofs, setting.device)
    with fault.subject(seed) as subject:
        found = diagnose(subject, Plan(seconds=math.inf, rounds=ROUNDS), rates)
    yield from figures_of(fault, seed, found)


def figures_of(fault: Fault, seed: int, found: Diagnosis) -> Iterator[Figure]:
    """Yield whether the fault was named, and each gain with its prediction."""
    want, got = fault.axis or "nothing", found.named or "nothing"
    case = {"run": fault.name, "seed": seed, "want": want, "got": got}
    yield figure("right", case, float(want == got), note=found.verdict.outcome)
    for arm in found.compared.measured:
        predicted, gain = found.compared.predicted_gain(arm), found.gains[arm.name]
        if predicted is not None and gain.is_clear:
            gained = {"run": fault.name, "seed": seed, "free": arm.name, "axis": arm.axis}
            yield figure("gain", gained, gain, predicted=predicted)


def answer(figures: list[Figure]) -> str:
    judged = pick(figures, "right")
    if not judged:
        return ""
    sick, healthy = [], []
    for f in judged:
        (healthy if f.case["want"] == "nothing" else sick).append(f)
    right, runs = Counter(str(f.case["run"]) for f in sick if f.measured), Counter(str(f.case["run"]) for f in sick)
    named = sum(right[run] * SEEDS >= LEAST_RIGHT * n for run, n in runs.items())
    often = f" in at least {LEAST_RIGHT} of {SEEDS} seeds" if max(runs.values(), default=0) == SEEDS else ""
    text = f"{named} of {len(runs)} faults are named{often}, {sum(right.values())} of {len(sick)} runs; "
    text += f"{sum(f.measured == 0 for f in healthy)} false alarms in {len(healthy)} healthy runs and traps"
    gains = [
        (f.measured, f.predicted) for f in pick(figures, "gain") if f.measured is not None and f.predicted is not None
    ]
    for words, some in (("predicted gains", gains), ("of those above 10 points", [g for g in gains if g[0] > LARGE])):
        near = sum(abs(measured - predicted) <= WITHIN for measured, predicted in some)
        text += f"; {near} of {len(some)} {words} within {WITHIN:.0%} of a step" if some else ""
    return f"{text}."


QUESTION = Question(
    name="diagnose",
    title="Does a diagnosis name the fault that was put into a run, and nothing in a healthy one?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing(
            "gain",
            "Gains, measured and predicted, first seed",
            by="axis",
            label="{run}: {free}",
            y="share of a step",
            only=lambda f: f.case["seed"] == 0,
            predicted=True,
        ),
    ),
    on_request=True,
)
