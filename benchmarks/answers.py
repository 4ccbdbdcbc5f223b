"""Turn a file of results into the sections of the page, the changes, and the last line of a call."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.questions import NOTHING, Question
from dsmini.measure.rates import from_json
from dsmini.report import Figure, Plot, Report, Section, comparison
from dsmini.report.provenance import Run
from dsmini.report.results import Finished, Results
from dsmini.report.units import human, words

UNSTEADY = "Times and ratios are unreliable, the machine was not steady: "
FACTS = ("date", "command", "commit", "code", "versions", "device", "dtype", "threads", "quick", "machine")


def report(
    results: Results, known: Mapping[str, Question], drawn: dict[str, Section], changed: Section | None = None
) -> Report:
    """Return the page of all questions that have figures or errors.

    Args:
        drawn: sections of earlier pages by name; updated here. An equal section is not drawn again.
    """
    latest = results.latest
    assert latest is not None, "a report is drawn once a run has begun"
    sections = [section(known[name], finished, latest.run) for name, finished in results.of_questions(known).items()]
    sections = [old if (old := drawn.get(new.name)) == new and old else new for new in sections]
    drawn |= {section.name: section for section in sections}
    machine = {words(key): str(value) for key, value in latest.run.machine.items()}
    facts = {"The machine": machine, "Its measured rates": rates(latest.rates), "The run": latest.run.facts()}
    return Report(
        title="dsmini benchmarks",
        lead="What was measured, next to what was predicted from counts and from this machine's own rates.",
        sections=[*sections, changed] if changed else sections,
        warnings=busy_warnings(results, known),
        facts=facts,
        command=latest.run.command,
    )


def busy_warnings(results: Results, names: Iterable[str]) -> list[str]:
    """Return one sentence if the machine was not steady while any of these questions was measured."""
    busy = results.unsteady(names)
    if not busy:
        return []
    return [
        f"The machine was not steady during {', '.join(busy)}: do not rely on the times and ratios there. "
        "Measure again with --fresh on a quiet machine."
    ]


def rates(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the rates of a machine in words; none if an older version measured other ones."""
    try:
        roofs = from_json(stored)
    except (KeyError, TypeError, AttributeError):
        return {}
    said = {f"matrix product, {dtype}": human(rate, "FLOP/s") for dtype, rate in roofs.peak.items()}
    said |= {"reading memory": human(roofs.bandwidth, "bytes/s"), "copying memory": human(roofs.copy, "bytes/s")}
    return said | {"a call in a model": human(roofs.call, "s")}


def section(question: Question, finished: Finished, latest: Run) -> Section:
    """Return a question as a section with all that was measured."""
    run, figures = finished.run, finished.figures(question.name)
    sizes = [*(["--quick"] if run.quick else []), "--device", run.device, "--dtype", run.dtype]
    return Section(
        name=question.name,
        title=question.title,
        finding=finding(question, finished),
        figures=figures,
        plots=plots(question, figures),
        about=question.about,
        command=" ".join(["python -m benchmarks", question.name, *sizes, f"--threads {run.threads} --fresh"]),
        warnings=finished.warnings(question.name, latest),
        errors=[(key, error) for (name, key), error in finished.errors.items() if name == question.name],
    )


def finding(question: Question, finished: Finished) -> str:
    """Return the question's finding, marked where the machine was busy; the figures may not be enough for it."""
    figures, mark = finished.figures(question.name), UNSTEADY if finished.unsteady(question.name) else ""
    try:
        return f"{mark}{question.finding(figures)}" if figures else NOTHING
    except Exception as error:  # a missing case or a defect of one question must not spoil the page
        return f"No finding yet: {type(error).__name__}: {error}"


def plots(question: Question, figures: Sequence[Figure]) -> list[Plot]:
    """Return the question's plots; an empty one with the reason if drawing fails."""
    try:
        return question.plots(list(figures)) if figures else []
    except Exception as error:
        return [Plot(title="Plots", x="", y="", series=(), caption=f"{type(error).__name__}: {error}")]


def changes_section(changes: Sequence[comparison.Change], old: str, warnings: Sequence[str]) -> Section:
    """Return what changed since another file of results."""
    return Section(
        name="changes",
        title="What changed?",
        finding=f"{comparison.counted(changes)} since {old}.",
        tables=[comparison.table(changes)] if changes else [],
        warnings=warnings,
        about=comparison.RULE,
    )


def warnings_of_changes(names: Iterable[str], old: Results, new: Results) -> list[str]:
    """Return warnings: differences other than the code that may have changed the figures."""
    said = []
    if old.latest and new.latest:
        before, now = (
            f"{r.setting}, {r.machine.get('processor')}, torch {r.versions.get('torch')}"
            for r in (old.latest.run, new.latest.run)
        )
        if before != now:
            said.append(f"The settings differ: {before} before, {now} now.")
    for when, results in (("before", old), ("now", new)):
        if busy := results.unsteady(names):
            said.append(f"The machine was not steady {when} in {', '.join(busy)}.")
    return said


def last_line(results: Results, names: Sequence[str], changes: Iterable[comparison.Change]) -> dict[str, Any]:
    """Return the answer for programs: the setting of the latest run, and all figures.

    Its keys besides those of the setting:
        failed: cases that raised or took too long.
        left: number of cases still to be measured, by question.
        left_out: reason for each case that was left out, by question.
        earlier: settings of the questions whose figures come from an earlier run.
        steadiness: least share of its stored rates that the machine reached, by question.
        changes: result of compare.
    """
    latest, having = results.latest, results.of_questions(names)
    assert latest is not None, "the caller has begun a run, or found one"
    planned = having | {name: latest for name in names if name in latest.plan}
    return facts(latest.run) | {
        "figures": [figure.as_json() for figure in results.figures(names)],
        "failed": [
            {"question": name, "case": key, "error": error.strip().splitlines()[-1]}
            for (name, key), error in latest.errors.items()
            if name in names
        ],
        "left": {name: left for name, finished in planned.items() if (left := finished.left(name))},
        "left_out": latest.run.left_out,
        "earlier": {n: facts(f.run) for n, f in having.items() if f.run.fingerprint != latest.run.fingerprint},
        "steadiness": {name: min(f.steadiness(name).values(), default=None) for name, f in having.items()},
        "changes": [change.as_json() for change in changes if change.verdict != "unchanged"],
    }


def facts(run: Run) -> dict[str, Any]:
    """Return the setting of a run for programs."""
    return {fact: getattr(run, fact) for fact in FACTS}
