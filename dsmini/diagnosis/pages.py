"""A diagnosis in words: the verdict first, then gains and what to try, then the evidence. A terminal shows less.

Every comparison of arms, that of the verdict and those of the evidence, has the same table, plot and record.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dsmini.diagnosis.arms import Arm, Comparison
from dsmini.diagnosis.findings import Finding
from dsmini.diagnosis.verdict import Verdict, best_arms, percent
from dsmini.measure.forecast import Forecast
from dsmini.measure.turns import Estimate
from dsmini.report import Plot, Report, Section, Series, Table
from dsmini.report.figures import plain
from dsmini.report.units import plural

LEAST_GAIN = 0.02
"""Gain below which nothing is worth a line."""
NOTHING_GAINS = "Nothing that was tried gains: less work, or a faster machine, is what is left."


@dataclass(kw_only=True)
class Gathered:
    """Evidence of all experiments that were made besides the verdict's."""

    sections: list[Section] = field(default_factory=list)
    compared: dict[str, Comparison] = field(default_factory=dict)
    """Comparisons by the name of their section."""
    not_tried: dict[str, str] = field(default_factory=dict)
    """Reasons by experiment."""
    stopped: bool = False
    """It was interrupted; the sections are those before."""


# --- any comparison


def table_of(compared: Comparison) -> Table:
    """Return the table of all arms: seconds and gains, predicted and measured."""
    gains, rows = compared.gains, []
    for arm in [arm for arm in compared.arms if arm.name in compared.turns.seconds]:
        gain, said = gains.get(arm.name), compared.predicted_gain(arm) if arm.name in gains else None
        apart = "" if gain is None or said is None else f"{100 * (gain.value - said):+.0f}"
        seconds = [compared.predicted.get(arm.name), compared.turns.median(arm.name)]
        times = ["" if s is None else f"{1e3 * s:.4g}" for s in seconds]
        axis = arm.axis if arm.name in gains else ""
        rows.append([arm.name, axis, arm.words, *times, percent(said), percent(gain), apart])
    columns = ("made free", "axis", "meaning", "predicted ms", "ms", "predicted", "gain", "points apart")
    return Table(columns=columns, rows=rows, numeric=columns[3:])


def plot_of(compared: Comparison, title: str, x: str) -> Plot:
    """Return the plot: seconds on lines where the arms have places, else bars of gains."""
    seconds, gains = compared.turns.seconds, compared.gains
    placed = [arm for arm in compared.arms if arm.at is not None and arm.name in seconds]
    if not placed:
        arms = compared.measured
        found = [gains[arm.name] for arm in arms]
        ends: dict[str, Any] = {"low": [g.low for g in found], "high": [g.high for g in found]}
        if not all(gain.is_clear for gain in found):
            ends = {}
        series = [Series(label="measured", x=(), y=[g.value for g in found], kind="bars", **ends)]
        if compared.predicted:
            said = [compared.predicted_gain(arm) or 0.0 for arm in arms]
            series.append(Series(label="predicted", x=(), y=said, kind="bars", dashed=True, of="measured"))
        return Plot(title=title, x=x, y="gain", series=series, labels=[arm.name for arm in arms])
    lines = []
    for label in dict.fromkeys(arm.line for arm in placed):
        line = sorted((arm for arm in placed if arm.line == label), key=lambda arm: arm.at or 0.0)
        at = [arm.at or 0.0 for arm in line]
        lines.append(Series(label=label, x=at, y=[1e3 * compared.turns.median(arm.name) for arm in line]))
        if compared.predicted:
            y = [1e3 * compared.predicted[arm.name] for arm in line]
            lines.append(Series(label=f"{label}, predicted", x=at, y=y, dashed=True, of=label))
    return Plot(title=title, x=x, y="ms", series=lines, log_x=True, log_y=True)


def sentence_of(compared: Comparison) -> str:
    """Return which arm is fastest, and by how much."""
    gains = compared.gains
    best = max(gains, key=lambda name: gains[name].value, default="")
    if not best or gains[best].value <= 0:
        return f"Nothing is faster than {compared.plain}, as it is."
    return f"With {best} a token takes {percent(gains[best])} less time than with {compared.plain}."


def record_of_arms(compared: Comparison) -> dict[str, Any]:
    """Return seconds and gains by arm, as JSON."""
    gains = compared.gains
    return {
        arm.name: {
            "axis": arm.axis,
            "measured": gains[arm.name].value,
            "low": gains[arm.name].low,
            "high": gains[arm.name].high,
            "rounds": gains[arm.name].turns,
            "predicted": compared.predicted_gain(arm),
            "step_seconds": compared.turns.median(arm.name),
        }
        for arm in compared.measured
    }


# --- the whole


@dataclass(kw_only=True)
class Diagnosis:
    """Predictions, measurements and conclusions, with the evidence and what was diagnosed."""

    compared: Comparison
    verdict: Verdict
    findings: Sequence[Finding]
    not_tried: Mapping[str, str] = field(default_factory=dict)
    """Reasons by arm."""
    forecast: Forecast | None = None
    """Forecast of a plain step that waits for nothing; None without stored rates of this machine."""
    gathered: Gathered = field(default_factory=Gathered)
    of: str = "a run"
    """Name of the subject."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """More about it."""
    machine: Mapping[str, str] = field(default_factory=dict)
    """Description of the machine."""
    warnings: list[str] = field(default_factory=list)
    """Sentences that a reader must see first."""

    @property
    def gains(self) -> dict[str, Estimate]:
        """Measured gains by arm."""
        return self.compared.gains

    @property
    def stopped(self) -> bool:
        """It was interrupted."""
        return self.compared.stopped or self.gathered.stopped

    @property
    def seconds(self) -> float:
        """Median seconds of a plain step."""
        turns = self.compared.turns
        return turns.median(self.compared.plain) if turns.seconds else math.nan

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_fault]

    @property
    def named(self) -> str:
        """Name of the axis at fault: the one that binds, else that of the first fault that costs no time, else ""."""
        return self.verdict.axis or next((finding.axis for finding in self.faults), "")

    @property
    def sentence(self) -> str:
        """The verdict, with the fault that costs no time, if there is one."""
        if self.verdict.outcome == "binds" or not self.faults:
            return self.verdict.sentence
        return f"{self.faults[0].axis} is at fault: {self.faults[0].sentence} {self.verdict.sentence}"

    @property
    def tries(self) -> list[tuple[Arm, Comparison]]:
        """Arms that gained, best first: those of the verdict, and those of the evidence, each advice once."""
        every = (self.compared, *self.gathered.compared.values())
        tried = [(arm, compared) for compared in every for arm in compared.measured]
        gained = [(a, compared) for a, compared in tried if a.advice and compared.gains[a.name].value >= LEAST_GAIN]
        gained.sort(key=lambda pair: -pair[1].gains[pair[0].name].value)
        return [*{arm.advice: (arm, compared) for arm, compared in reversed(gained)}.values()][::-1]


def record_of(found: Diagnosis) -> dict[str, Any]:
    """Return the verdict, each gain with its prediction, what was not tried and why, findings and evidence, as JSON."""
    compared, gathered = found.compared, found.gathered
    record = {
        "outcome": found.verdict.outcome,
        "axis": found.verdict.axis,
        "named": found.named,
        "sentence": found.sentence,
        "decides": found.verdict.decides,
        "step_seconds": found.seconds,
        "predicted_step_seconds": compared.predicted.get(compared.plain),
        "gains": record_of_arms(compared),
        "not_tried": dict(found.not_tried),
        "findings": [asdict(finding) for finding in found.findings],
        "stopped": compared.stopped,
        "evidence": {
            section.name: record_of_arms(gathered.compared[section.name])
            if section.name in gathered.compared
            else [figure.as_json() for figure in section.figures]
            for section in gathered.sections
        },
        "evidence_not_tried": gathered.not_tried,
    }
    return plain(record)  # an open interval has no ends


def report_of(found: Diagnosis, command: str = "") -> Report:
    """Return the report for a page."""
    best = best_arms(found.compared)
    sections = [_verdict(found), _evidence(found), _to_try(found), _findings(found), *_step(found)]
    return Report(
        title=f"Diagnosis of {found.of}",
        lead=found.sentence,
        sections=[*sections, *found.gathered.sections, *_not_tried(found)],
        warnings=_warnings(found),
        highlights=[(percent(found.gains[a.name].value), f"{axis}: gain of {a.name}") for axis, a in best.items()],
        facts_title="What was diagnosed",
        facts={"The run": found.facts, "The machine": found.machine},
        command=command,
    )


def short_report_of(found: Diagnosis) -> Report:
    """Return what a terminal shows: the verdict, gains, what to try, and faults."""
    whole = table_of(found.compared)
    kept = [whole.columns.index(name) for name in ("made free", "axis", "gain", "predicted")]
    rows = [[row[at] for at in kept] for row in whole.rows if row[1]]
    table = Table(columns=[whole.columns[at] for at in kept], rows=rows, numeric=("gain", "predicted"))
    faults = [[fault.axis, fault.sentence, fault.fix] for fault in found.faults]
    wrong = Section(
        name="faults",
        title="What is wrong?",
        finding="These faults were seen." if faults else "No fault was seen.",
        tables=[Table(columns=("axis", "fault", "what to do first"), rows=faults)] if faults else [],
    )
    gains = replace(_evidence(found), plots=(), tables=[table])
    sections = [_verdict(found), gains, _to_try(found), wrong]
    return Report(title=f"Diagnosis of {found.of}", sections=sections, warnings=_warnings(found))


def _warnings(found: Diagnosis) -> list[str]:
    if found.compared.stopped:
        return [*found.warnings, "It was interrupted, and rests on the rounds until then."]
    interrupted = ["It was interrupted after the verdict; some evidence is missing."]
    return [*found.warnings, *(interrupted if found.gathered.stopped else [])]


def _verdict(found: Diagnosis) -> Section:
    words = f"{found.sentence} {found.verdict.decides}".strip()
    return Section(name="verdict", title="What binds?", finding=words)


def _evidence(found: Diagnosis) -> Section:
    compared = found.compared
    said = compared.predicted.get(compared.plain)
    words = f"{plural(compared.turns.count, 'round')} in turns; a plain step takes {1e3 * found.seconds:.4g} ms"
    return Section(
        name="evidence",
        title="What gains how much, predicted first and then measured?",
        finding=f"{words}." if said is None else f"{words}, {1e3 * said:.4g} ms were predicted.",
        tables=[table_of(compared)],
        plots=[plot_of(compared, "Share of a step that would go", "what is made free")],
        about="Brackets hold 95 % intervals of the median over rounds, of replay the mean. Those of an axis hold "
        "together, as its best arm counts.",
    )


def _to_try(found: Diagnosis) -> Section:
    """Return what gained, best first."""
    rows = [
        [arm.name, percent(compared.gains[arm.name]), arm.advice, percent(compared.predicted_gain(arm))]
        for arm, compared in found.tries
    ]
    table = Table(columns=("try", "gain", "how", "predicted"), rows=rows, numeric=("gain", "predicted"))
    words = NOTHING_GAINS
    if rows:
        arm, compared = found.tries[0]
        gain = compared.gains[arm.name]
        would = "would go" if gain.low > 0 else "may go; less than nothing is possible too"
        words = f"First {arm.name}: {percent(gain)} of a token's time {would}."
    return Section(name="what_to_try", title="What to try, best first?", finding=words, tables=[table] if rows else [])


def _findings(found: Diagnosis) -> Section:
    words = " ".join(fault.fix for fault in found.faults) or "Nothing of it needs an action."
    rows = [[each.axis, each.name, "fault" if each.is_fault else "fine", each.sentence] for each in found.findings]
    table = Table(columns=("axis", "name", "state", "what was seen"), rows=rows)
    return Section(name="findings", title="What else was seen?", finding=words, tables=[table])


def _step(found: Diagnosis) -> list[Section]:
    """Return the section of the parts of a step, if they were forecast."""
    if found.forecast is None:
        return []
    parts = found.forecast.by_class  # longest first
    bars = Series(label="forecast", x=(), y=[1e3 * s for s in parts.values()], kind="bars", dashed=True)
    plot = Plot(title="Parts of a step", x="class of operations", y="ms", series=[bars], labels=list(parts))
    largest = max(parts, key=lambda name: parts[name])
    share = parts[largest] / sum(parts.values())
    words = f"Most of it, {share:.0%}, is {largest}, by the forecast of this machine's rates."
    return [Section(name="step", title="What does a step consist of?", finding=words, plots=[plot])]


def _not_tried(found: Diagnosis) -> list[Section]:
    """Return the section of what was not tried; none if all was."""
    rows = [[name, why] for name, why in {**found.not_tried, **found.gathered.not_tried}.items()]
    table = Table(columns=("not tried", "why"), rows=rows)
    words = f"{len(rows)} of the experiments {'does' if len(rows) == 1 else 'do'} not apply, or had no time."
    return [Section(name="not_tried", title="What was not tried?", finding=words, tables=[table])] if rows else []
