"""Does a diagnosis name the fault that was put into a run, and nothing in a healthy one?

Small training runs get a fault each: a loader that sleeps or unpacks, shuffled labels, a repeated text, a routing bias
that chooses the same experts, tiny experts, one thread, the slower dtype, another program. Others are healthy, or have
something that only looks guilty. Each is diagnosed with some seeds, and predictions are made before the experiments.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial

from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, pick
from benchmarks.faults import Fault, faults
from dsmini.diagnosis.diagnosis import MOST_ROUNDS, Diagnosis, Plan, diagnose
from dsmini.measure import step_rates
from dsmini.report.charts import over_labels

NAME = "diagnose"
SEEDS, QUICK_SEEDS = 5, 1
SECONDS, ROUNDS = 12.0, MOST_ROUNDS
"""Time of the rounds of a diagnosis, and the most rounds."""
WITHIN = 0.10
"""Largest error of a predicted gain that counts as right."""
MUCH = 0.10
"""Gain above which a predicted gain is counted apart: most are near zero, and easily right."""
LEAST_RIGHT = 4
"""Seeds of five in which a fault must be named rightly."""
OPTIONS = ("Data", "Algorithm", "Machine", "nothing")

figure = Figures(NAME, higher={"right": ""}, neither={"gain": ""})


def cases(setting: Setting) -> list[Case]:
    seeds = QUICK_SEEDS if setting.quick else SEEDS
    by_name = {fault.name: fault for fault in faults()}
    points = [(name, seed) for seed in range(seeds) for name in by_name]
    return cases_over("run={} seed={}", points, 20.0, partial(measure, setting, by_name))


def measure(setting: Setting, by_name: dict[str, Fault], name: str, seed: int) -> Iterator[Figure]:
    fault = by_name[name]
    rates = step_rates.rates_beyond(setting.roofs, setting.device)
    with fault.subject(seed) as subject:
        found = diagnose(subject, Plan(seconds=SECONDS, rounds=ROUNDS), rates)
    yield from figures_of(fault, seed, found)


def figures_of(fault: Fault, seed: int, found: Diagnosis) -> Iterator[Figure]:
    """Yield whether the fault was named, and each gain with its prediction."""
    want, got = fault.axis or "nothing", found.named or "nothing"
    case = {"run": fault.name, "seed": seed, "want": want}
    note = f"{fault.name}, seed {seed}: {got} named, {found.verdict.outcome}"
    yield figure("right", {**case, "got": got}, float(want == got), note=note)
    for arm in found.compared.measured:
        predicted, gain = found.compared.predicted_gain(arm), found.gains[arm.name]
        if predicted is not None and gain.is_clear:
            gained = {"run": fault.name, "seed": seed, "free": arm.name, "axis": arm.axis}
            yield figure("gain", gained, gain.value, predicted=predicted, low=gain.low, high=gain.high)


def confusion(figures: list[Figure]) -> dict[tuple[str, str], int]:
    """Return the number of runs by the axis that was wanted and the one that was named."""
    return dict(Counter((str(f.case["want"]), str(f.case["got"])) for f in pick(figures, "right")))


def finding(figures: list[Figure]) -> str:
    judged = pick(figures, "right")
    if not judged:
        return ""
    sick = [f for f in judged if f.case["want"] != "nothing"]
    healthy = [f for f in judged if f.case["want"] == "nothing"]
    right = Counter(str(f.case["run"]) for f in sick if f.measured)
    runs = Counter(str(f.case["run"]) for f in sick)
    named = sum(right[run] * SEEDS >= LEAST_RIGHT * n for run, n in runs.items())
    seeds = max(runs.values(), default=0)
    alarms = sum(f.measured == 0 for f in healthy)
    gains = [f for f in pick(figures, "gain") if f.measured is not None and f.predicted is not None]
    large = [f for f in gains if (f.measured or 0.0) > MUCH]
    near, near_of_large = (
        sum(abs((f.measured or 0.0) - (f.predicted or 0.0)) <= WITHIN for f in some) for some in (gains, large)
    )
    often = f" in at least {LEAST_RIGHT} of {SEEDS} seeds" if seeds == SEEDS else ""
    text = f"{named} of {len(runs)} faults are named{often}, {sum(right.values())} of {len(sick)} runs; "
    text += f"{alarms} false alarms in {len(healthy)} healthy runs and traps"
    if not gains:
        return f"{text}."
    text += f"; {near} of {len(gains)} predicted gains within {WITHIN:.0%} of a step"
    return f"{text}, {near_of_large} of the {len(large)} above {MUCH:.0%}."


def plots(figures: list[Figure]) -> list[Plot]:
    gains = pick(figures, "gain")
    groups = {
        axis: {f"{f.case['run']}: {f.case['free']}": f for f in gains if f.case["axis"] == axis and f.case["seed"] == 0}
        for axis in OPTIONS[:-1]
    }
    title = "Gains, measured and predicted, first seed"
    return over_labels(title, "share of a step", {a: g for a, g in groups.items() if g}, predicted=True)
