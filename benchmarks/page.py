"""Show results: the figures that a reader came for, one answer for each question, and problems."""

import re
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.question import Question
from benchmarks.results import ROOT, Results, Run
from dsmini.report import Figure, Report, Section, pick
from dsmini.report.tables import case_words
from dsmini.report.units import human, plural, words


def report(sections: list[Section], figures: list[Figure], run: Run) -> Report:
    """Return the page of sections."""
    return Report(
        title="dsmini benchmarks",
        lead="What was measured, next to what was predicted from counts and from this machine's own rates.",
        sections=sections,
        facts={
            "The machine": {words(key): str(value) for key, value in run.setting["machine"].items()},
            "Its measured rates": run.rates,
            "The run": {"date": run.date[:16].replace("T", " "), "commit": run.commit, "setting": run.words}
            | run.setting["versions"],
        },
        highlights=headline(figures),
        command=run.command,
    )


def section(question: Question, found: Results, now: Run) -> Section:
    """Return a question with all that was measured."""
    reasons = dict.fromkeys(figure.note for figure in found.figures if figure.measured is None)
    run, finding = found[-1].run, question.answer(found.figures) or "; ".join(reasons) or "Nothing was measured yet."
    if busy := [result.steadiness for result in found if result.unsteady]:
        finding = (
            f"Times are unreliable: the machine was busy or throttled, and reached as little as {min(busy):.0%} of "
            f"the rates that predictions rest on; --fresh measures again. {finding}"
        )
    s, warnings = run.setting, list[str]()
    if s != now.setting:
        warnings.append(f"Measured earlier than the rest: {run.date[:10]}, commit {run.commit}, {run.words}.")
    where = f"--device {s['device']} --dtype {s['dtype']} --threads {s['threads']} --fresh"
    return Section(
        name=question.name,
        title=question.title,
        finding=spaced(finding),
        figures=found.figures,
        plots=[plot for draw in question.plots for plot in draw(found.figures)],
        about=" ".join((question.about or "").split()),
        command=f"python -m benchmarks {question.name}{' --quick' * s['quick']} {where}",
        warnings=warnings,
        errors=[(result.key, result.error) for result in found if result.error],
    )


def problems(found: Mapping[str, Results]) -> list[str]:
    """Return in words how many cases failed, and each count that differs from its prediction."""
    failed = sum(bool(result.error) for results in found.values() for result in results)
    told = [f"{plural(failed, 'case')} failed; the page has the tracebacks"] if failed else []
    for f in (f for results in found.values() for f in results.figures if f.equal is False):
        got, want = (human(value, f.unit, exact=True) for value in (f.measured, f.predicted))
        told.append(f"{f.question} {case_words(f)}: {words(f.metric)} is {got}, predicted: {want}")
    return told


# --- the figures that a reader came for


def headline(figures: list[Figure]) -> list[tuple[str, str]]:
    """Return the figures that a reader came for, each with its words: those of them that were measured, and a quote."""
    found: list[tuple[str, str]] = []

    def first(question: str, metric: str, **case: Any) -> list[Figure]:
        some = [f for f in pick(figures, metric, **case) if f.question == question and f.measured is not None]
        return some[:1]

    for f in first("kv-cache", "bytes_per_token", attention="MLA"):
        for mha in first("kv-cache", "bytes_per_token", attention="MHA"):
            less = 1 - (f.measured or 0.0) / (mha.measured or 1.0)
            found.append((human(f.measured, "bytes", exact=True), f"of cache for a token, {less:.1%} less than MHA's"))
    for question, doing, rate, roof in (
        ("decode", "in decoding at context {context}", "bandwidth", "what memory allows"),
        ("train", "in training", "flop_rate", "the matrix peak"),
    ):
        for f in first(question, "tokens_per_s"):
            share = "".join(f", {b.ratio:.0%} of {roof}" for b in first(question, rate) if b.ratio)
            found.append((human(f.measured, f.unit), doing.format(**f.case) + share))
    if errors := [f for f in pick(figures, "error") if f.question == "fp8-error"]:
        middle, expected = statistics.median(f.measured or 0.0 for f in errors), errors[0].predicted or 0.0
        found.append((f"{middle:.1%}", f"error of an FP8 product in training, {expected:.1%} expected from rounding"))
    return [(spaced(value), spaced(what)) for value, what in (*found, *quoted())] if found else []


def spaced(text: str) -> str:
    """Write percentages with a space, as everywhere: 85.9 %."""
    return re.sub(r"(\d)%", r"\1 %", text)


def quoted() -> list[tuple[str, str]]:
    """Return how much better experts are than dense layers, as docs/claims.md has it. Training takes too long here."""
    claims = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    row = re.search(r"equal tokens: by ([\d.]+ nats per byte), (95 % .*? seeds) \((.*?)\).*moe-or-dense", claims)
    if row is None:
        return []
    value, interval, date = row.groups()
    return [(value, f"experts better than dense layers, {interval}; not measured here: docs/claims.md, {date}")]
