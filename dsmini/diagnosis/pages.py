"""A diagnosis in words: the verdict first, then gains and what to try, then the evidence. A terminal shows less.

Every comparison of arms, that of the verdict and those of the evidence, has the same table, plot and record.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dsmini.diagnosis import roofline
from dsmini.diagnosis.arms import Comparison, percent
from dsmini.diagnosis.verdict import Diagnosis, best_arms
from dsmini.report import Plot, Report, Section, Series, Table
from dsmini.report.figures import plain
from dsmini.report.units import digits, human, plural

NOTHING_GAINS = "No change that was tried gains time: only less work or a faster machine would."
NOTHING_TRIED = "Nothing was tried: the time was over."
BRIEF = ("change", "axis", "gain", "predicted")
"""Columns of a terminal."""


# --- any comparison


def table_of(compared: Comparison, columns: Sequence[str] = (*BRIEF, "ms", "predicted ms", "meaning")) -> Table:
    """Return the table of all arms: gains and seconds, measured and predicted."""
    gains, rows, taken = compared.gains, [], compared.turns.seconds
    arms = compared.measured if columns == BRIEF else [arm for arm in compared.arms if arm.name in taken]
    for arm in arms:
        priced, cells = compared.predicted.get(arm.name), {"change": arm.name, "meaning": arm.words}
        cells["ms"] = digits(1e3 * compared.turns.median(arm.name))
        cells["predicted ms"] = "" if priced is None else digits(1e3 * priced)
        if arm.name in gains:
            predicted = percent(compared.predicted_gain(arm))
            cells |= {"axis": arm.axis or "", "gain": percent(gains[arm.name]), "predicted": predicted}
        rows.append([cells.get(name, "") for name in columns])
    return Table(columns=columns, rows=rows, numeric=("gain", "predicted", "ms", "predicted ms"))


def plot_of(compared: Comparison, title: str, x: str) -> Plot:
    """Return the plot: seconds on a line where the arms have places, else bars of gains."""
    gains, arms = compared.gains, compared.measured
    placed = sorted(
        (arm.at, arm.name) for arm in compared.arms if arm.at is not None and arm.name in compared.turns.seconds
    )
    if placed:
        at, names = [place for place, _ in placed], [name for _, name in placed]
        lines = [Series(label="measured", x=at, y=[1e3 * compared.turns.median(name) for name in names])]
        if all(name in compared.predicted for name in names):
            y = [1e3 * compared.predicted[name] for name in names]
            lines.append(Series(label="predicted", x=at, y=y, dashed=True, of="measured"))
        return Plot(title=title, x=x, y="ms", series=lines, log_x=True, log_y=True)
    found = [gains[arm.name] for arm in arms]
    ends: dict[str, Any] = {"low": [100 * g.low for g in found], "high": [100 * g.high for g in found]}
    if not all(gain.is_clear for gain in found):
        ends = {}
    bars = [Series(label="measured", x=(), y=[100 * g.value for g in found], kind="bars", **ends)]
    if compared.predicted:
        expected = [100 * (compared.predicted_gain(arm) or 0.0) for arm in arms]
        bars.append(Series(label="predicted", x=(), y=expected, kind="bars", dashed=True, of="measured"))
    return Plot(title=title, x=x, y="gain, %", series=bars, labels=[arm.name for arm in arms])


def sentence_of(compared: Comparison) -> str:
    """Return which arm is fastest, by how much, and if that may be chance."""
    gains = compared.gains
    best = max(gains, key=lambda name: (gains[name].low, gains[name].value), default="")
    if not best or gains[best].value <= 0:
        return f"Nothing was faster than {compared.plain}, as it is."
    gain = gains[best]
    words = f"With {best} a token took {percent(gain)} less time than with {compared.plain}"
    if not gain.is_clear:
        return f"{words}. That may be chance: it rests on {plural(gain.turns, 'round')}."
    return f"{words}{'.' if gain.low > 0 else ', which may be chance.'}"


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


def record_of(found: Diagnosis) -> dict[str, Any]:
    """Return the verdict, each gain with its prediction, what was not tried and why, findings and evidence, as JSON."""
    compared = found.compared
    record = {
        "outcome": found.verdict.outcome,
        "axis": found.verdict.axis,
        "named": found.named,
        "sentence": found.sentence,
        "decides": found.verdict.decides,
        "step_seconds": found.seconds,
        "predicted_step_seconds": compared.predicted.get(compared.plain),
        "gains": record_of_arms(compared),
        "not_tried": found.not_tried,
        "findings": [asdict(finding) | {"is_fault": finding.is_fault} for finding in found.findings],
        "stopped": found.stopped,
        "parts": {} if found.forecast is None else found.forecast.by_class,
        "tensor_bytes": None if found.forecast is None else found.forecast.peak,
        "evidence": {name: record_of_arms(sweep) for name, sweep in found.sweeps.items()},
    }
    return plain(record)  # an open interval has no ends


def report_of(found: Diagnosis, command: str = "") -> Report:
    """Return the report for a page."""
    best = best_arms(found.compared)
    rows = [[name, why] for name, why in found.not_tried.items()]
    untried = Section(
        name="not_tried",
        title="What was not tried?",
        finding=f"{plural(len(rows), 'experiment')} did not apply, or did not fit into the time.",
        tables=[Table(columns=("not tried", "why"), rows=rows)],
    )
    sections = [_verdict(found), _gains(found), _to_try(found), _findings(found), *_step(found), *found.sections]
    return Report(
        title=f"Diagnosis of {found.of}",
        lead=found.sentence,
        sections=[*sections, *([untried] if rows else [])],
        warnings=found.warnings,
        highlights=[(percent(found.gains[a.name].value), f"{axis}: gain of {a.name}") for axis, a in best.items()],
        facts_title="What was diagnosed",
        facts={"The run": found.facts, "The machine": found.machine},
        command=command,
    )


def short_report_of(found: Diagnosis) -> Report:
    """Return what a terminal shows: the verdict, gains, what to try, faults, and the forecast of a step in words."""
    step = [replace(section, tables=()) for section in _step(found)]
    sections = [_verdict(found), _gains(found, BRIEF), _to_try(found), _faults(found), *step]
    return Report(title=f"Diagnosis of {found.of}", sections=sections, warnings=found.warnings)


def _verdict(found: Diagnosis) -> Section:
    words = f"{found.sentence} {found.verdict.decides}".strip()
    return Section(name="verdict", title="What binds?", finding=words)


def _gains(found: Diagnosis, columns: Sequence[str] = ()) -> Section:
    compared = found.compared
    expected = compared.predicted.get(compared.plain)
    words, shown = f"A plain step takes {human(found.seconds, 's')}", dict[str, Any]()
    if compared.measured:
        words = f"{plural(compared.turns.count, 'round')} in turns; a{words[1:]}"
        table = table_of(compared, columns) if columns else table_of(compared)
        shown = {"tables": [table], "plots": [plot_of(compared, "Share of a step that a change saves", "change")]}
    if expected is not None:
        words = f"{words}, {human(expected, 's')} were predicted"
    return Section(
        name="evidence",
        title="How much does each change gain, predicted and then measured?",
        finding=f"{words}.",
        about="Brackets hold intervals of the median over rounds, of replay of the mean. In 95 of 100 diagnoses no "
        f"lower end is above the truth ({percent(compared.tail, 1)} for each change, which takes "
        f"{compared.least_turns} rounds). Where a gain is negative, the current choice is faster.",
        **shown,
    )


def _step(found: Diagnosis) -> list[Section]:
    """Return the section on the forecast of a step; none without one."""
    return [] if found.forecast is None or found.roofs is None else [roofline.section(found.forecast, found.roofs)]


def _to_try(found: Diagnosis) -> Section:
    """Return what gained, best first."""
    rows = [[arm.name, percent(gain), arm.advice, percent(predicted)] for arm, gain, predicted in found.tries]
    table = Table(columns=("try", "gain", "how", "predicted"), rows=rows, numeric=("gain", "predicted"))
    words = NOTHING_GAINS if found.compared.measured else NOTHING_TRIED
    if rows:
        arm, gain, _ = found.tries[0]
        words = f"Try {arm.name} first: it shortens the time of a token by {percent(gain)}."
        if not gain.is_clear:
            words = f"Try {arm.name} first: in few rounds it shortened the time of a token by {percent(gain)}."
        elif gain.low <= 0:
            words = f"Try {arm.name} first: it may shorten the time of a token, by {percent(gain)}, or not at all."
    return Section(name="what_to_try", title="What to try, best first?", finding=words, tables=[table] if rows else [])


def _findings(found: Diagnosis) -> Section:
    words = " ".join(fault.fix for fault in found.faults) or "None of them needs an action."
    rows = [[each.axis, each.name, "fault" if each.is_fault else "fine", each.sentence] for each in found.findings]
    table = Table(columns=("axis", "name", "state", "what was seen"), rows=rows)
    return Section(name="findings", title="What else was seen?", finding=words, tables=[table])


def _faults(found: Diagnosis) -> Section:
    rows = [[fault.axis, fault.sentence, fault.fix] for fault in found.faults]
    table = Table(columns=("axis", "fault", "what to do first"), rows=rows)
    words = "These faults were seen." if rows else "No fault was seen."
    return Section(name="faults", title="What is wrong?", finding=words, tables=[table] if rows else [])
