"""Show results: one answer for each question, what changed, and problems."""

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.question import Question
from benchmarks.results import Result, Run, figures_of, of_question
from dsmini.report import Figure, Report, Section
from dsmini.report.tables import case_words
from dsmini.report.units import human, plural, words


def report(sections: list[Section], run: Run, warnings: Sequence[str] = ()) -> Report:
    """Return the page of sections."""
    return Report(
        title="dsmini benchmarks",
        lead="What was measured, next to what was predicted from counts and from this machine's own rates.",
        sections=sections,
        warnings=warnings,
        facts={
            "The machine": {words(key): str(value) for key, value in run.setting["machine"].items()},
            "Its measured rates": run.rates,
            "The run": {"date": run.date[:16].replace("T", " "), "commit": run.commit, "setting": run.words}
            | run.setting["versions"],
        },
        command=run.command,
    )


def section(question: Question, found: Sequence[Result], now: Run) -> Section:
    """Return a question with all that was measured."""
    figures = figures_of(found)
    reasons = dict.fromkeys(figure.note for figure in figures if figure.measured is None)
    nothing = all(figure.measured is None for figure in figures)
    unsaid = "Nothing was measured yet." if nothing else "The figures are below; an answer needs the other cases too."
    run, finding = found[-1].run, question.answer(figures) or "; ".join(reasons) or unsaid
    if busy := [result.steadiness for result in found if result.unsteady]:
        finding = (
            f"Times are unreliable: the machine was busy or throttled, and reached as little as {min(busy):.0%} of "
            f"the rates that predictions rest on; --fresh measures again. {finding}"
        )
    s, warnings = run.setting, list[str]()
    if s != now.setting:
        warnings.append(f"Measured earlier than the rest: {run.date[:10]}, commit {run.commit}, {run.words}.")
    where = f"--device {s['device']} --dtype {s['dtype']} --threads {s['threads']} --fresh"
    where += f" --text {shlex.quote(run.text)}" if question.needs_text and run.text else ""
    return Section(
        name=question.name,
        title=question.title,
        finding=spaced(finding),
        figures=figures,
        plots=[plot for draw in question.plots for plot in draw(figures)],
        about=" ".join((question.about or "").split()),
        command=f"python -m benchmarks {question.name}{' --quick' * s['quick']} {where}",
        warnings=warnings,
        errors=[(result.key, result.error) for result in found if result.error],
    )


def disturbed(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return in one sentence what disturbed the rates that predictions rest on; none if nothing did."""
    words = [result.run.disturbed for results in found.values() for result in results if result.run.disturbed]
    return [f"{word}; the same command measures again." for word in words[-1:]]


def problems(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return in words how many cases failed, and each count that differs from its prediction."""
    every = [result for results in found.values() for result in results]
    failed = sum(bool(result.error) for result in every)
    told = [f"{plural(failed, 'case')} failed; the page has the tracebacks"] if failed else []
    for f in (f for f in figures_of(every) if f.equal is False):
        got, want = (human(value, f.unit, exact=True) for value in (f.measured, f.predicted))
        told.append(f"{f.question} {case_words(f)}: {words(f.metric)} is {got}, predicted: {want}")
    return told


def changes(path: str, before: Sequence[Result], found: Mapping[str, Sequence[Result]], now: Run) -> Section:
    """Return what changed since an older file, as factors: values now over values then.

    A value changed if the two 95 % intervals do not meet; a count, if it is another one; a time of too few turns for an
    interval never. Where a value may be below 0, the change is a difference.
    """
    changed, unchanged, new, others = list[Figure](), 0, 0, dict[str, None]()
    for name, results in found.items():
        old = of_question(before, name, now.setting)
        for result in old:
            keys = ("machine", "device", "dtype", "threads", "quick")
            if unequal := [key for key in keys if result.run.setting[key] != now.setting[key]]:
                was = f"was measured with another {', '.join(unequal)}: {result.run.words}"
                others[f"{path} {was}; now it is {now.words}."] = None
        then = {_key(f): f for f in figures_of(old) if f.measured}
        for f in (f for f in figures_of(results) if f.measured):
            if _key(f) not in then:
                new += 1
                continue
            (low, high), (old_low, old_high) = _ends(f), _ends(then[_key(f)])
            if low <= old_high and old_low <= high:
                unchanged += 1
                continue
            value, was = f.measured, then[_key(f)].measured
            assert value and was, "only measured figures are compared"
            how: dict[str, Any] = {"case": {"question": name, **f.case}, "predicted": None, "exact": False}
            if min(low, old_low) > 0:
                how |= {"unit": "x", "measured": value / was, "low": low / old_high, "high": high / old_low}
            else:
                how |= {"metric": f"change of {f.metric}", "measured": value - was}
                how |= {"low": low - old_high, "high": high - old_low}
            changed.append(dataclasses.replace(f, **how))
    changed.sort(key=lambda f: -abs(math.log(f.measured or 1.0)) if f.unit == "x" else -abs(f.measured or 0.0))
    told = "; ".join(f"{words(f.metric)} of {case_words(f)} {human(f.measured, f.unit)}" for f in changed[:3])
    finding = f"{plural(len(changed), 'value')} changed{', most of all ' if told else ''}{told}. "
    finding += f"{unchanged} are the same or within their intervals, {new} are not in the older file."
    title = f"What changed since {path}? Values now over values then"
    return Section(name="changes", title=title, finding=spaced(finding), figures=changed, warnings=list(others))


def _key(f: Figure) -> tuple[Any, ...]:
    return f.metric, *sorted(f.case.items())


def _ends(f: Figure) -> tuple[float, float]:
    """Return the ends of the interval of a measured value: of a count the value twice, of a time of few turns none."""
    assert f.measured is not None, "the caller picks measured figures"
    if f.is_time and f.low is None:
        return -math.inf, math.inf
    return f.measured if f.low is None else f.low, f.measured if f.high is None else f.high


def spaced(text: str) -> str:
    """Write percentages with a space, as everywhere: 85.9 %."""
    return re.sub(r"(\d)%", r"\1 %", text)
