"""The report: one page that holds all it shows, drawn from a file of results.

It is read offline, printed, or sent to somebody: no request leaves it, no script runs in it.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from benchmarks.question import Figure, Question, Value
from dsmini.atomic import write_text
from dsmini.measure.rates import Roofs
from dsmini.report import units
from dsmini.report.comparison import Change
from dsmini.report.plots import Drawing, draw
from dsmini.report.results import Finished, Results, Run

NEAR, FAR = 1.1, 1.5
"""A prediction within a tenth is near, beyond half as much again it is far off."""
WITHIN = 0.3
"""How near a prediction of time should be."""
STEADY = 0.75
"""What of its kept rates a quiet machine gives at least."""
WIDEST = 4.0
"""The bar of a ratio ends at 4 and at a quarter."""

SHOWN: tuple[tuple[str, Callable[[Figure], bool]], ...] = (
    ("predicted", lambda f: f.predicted is not None),
    ("measured", lambda f: f.measured is not None or f.note != ""),
    ("spread", lambda f: units.spread(f) != ""),
    ("ratio", lambda f: units.ratio(f) != ""),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure in a table of the page."""

    cells: Sequence[str]
    predicted: str
    measured: str
    spread: str
    ratio: str
    tone: str
    """near, off, far, equal, unequal, or nothing to compare with."""
    start: float
    length: float
    """Where the ratio's bar begins and how long it is, in percent of its track."""
    note: int | None
    """Which of the section's notes."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The figures of one metric."""

    metric: str
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Groups whose cases vary in the same things."""

    columns: Sequence[str]
    numeric: Sequence[bool]
    common: Sequence[tuple[str, str]]
    """What all of them share."""
    shown: Sequence[str]
    """Of predicted, measured, spread and ratio those that any figure has."""
    groups: Sequence[Group]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question of the page."""

    name: str
    title: str
    finding: str
    about: str
    drawings: Sequence[Drawing]
    tables: Sequence[Table]
    notes: Sequence[str]
    command: str
    warnings: Sequence[str]
    errors: Sequence[tuple[str, str]]
    """Cases that failed, with their tracebacks."""


def write_report(
    path: Path,
    results: Results,
    questions: Sequence[Question],
    changes: Sequence[Change] | None = None,
    old: str = "",
    mind: Sequence[str] = (),
) -> None:
    """Draw the page and put it in place whole.

    Args:
        questions: those to show, in order; those of which nothing was measured are left out.
        changes: since another file of results, `old`; None if there is nothing to compare with.
        mind: what else may have changed the figures.
    """
    write_text(path, render(results, questions, changes, old, mind))


def render(
    results: Results,
    questions: Sequence[Question],
    changes: Sequence[Change] | None = None,
    old: str = "",
    mind: Sequence[str] = (),
) -> str:
    """The page's text; see write_report."""
    latest = results.latest
    assert latest is not None, "a report is drawn once a run has begun"
    sections = [
        section(question, finished, latest.run)
        for question in questions
        if (finished := results.of_question(question.name))
    ]
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["svg"] = Markup  # of our own drawing, its labels escaped
    figures = [figure for q in questions if (f := results.of_question(q.name)) for figure in f.figures(q.name)]
    return environment.get_template("page.html.j2").render(
        run=latest.run,
        machine=machine(latest.roofs),
        facts=facts(latest.run),
        sections=sections,
        summary=summary(figures, len(sections)),
        changes=None if changes is None else [change_row(change) for change in changes],
        changed=changed(changes or ()),
        old=old,
        mind=mind,
    )


def section(question: Question, finished: Finished, latest: Run) -> Section:
    """A question with what there is of it."""
    figures = finished.figures(question.name)
    notes = list(dict.fromkeys(figure.note for figure in figures if figure.note))
    return Section(
        name=question.name,
        title=question.title,
        finding=finding(question, figures),
        about=question.about,
        drawings=drawings(question, figures),
        tables=tables(figures, notes),
        notes=notes,
        command=command(question.name, finished.run),
        warnings=warnings(question.name, finished, latest),
        errors=[(key, error) for (name, key), error in finished.errors.items() if name == question.name],
    )


def finding(question: Question, figures: Sequence[Figure]) -> str:
    """The question's sentence; what is measured so far may not be enough for it."""
    if not figures:
        return "Nothing has been measured yet."
    try:
        return question.finding(list(figures))
    except Exception as error:  # a defect of one question, or a case of it that is missing, must not take the rest
        return f"No finding yet: {type(error).__name__}: {error}"


def drawings(question: Question, figures: Sequence[Figure]) -> list[Drawing]:
    """The question's plots; one that cannot be drawn says why in its place."""
    if not figures:
        return []
    try:
        plots = question.plots(list(figures))
    except Exception as error:
        return [_failed("Plots", error)]
    drawn = []
    for number, plot in enumerate(plots):
        try:
            drawn.append(draw(plot, f"{question.name.replace('_', '-')}-{number}"))
        except Exception as error:
            drawn.append(_failed(plot.title, error))
    return drawn


def _failed(title: str, error: Exception) -> Drawing:
    return Drawing(title=title, caption=f"{type(error).__name__}: {error}", svg=None, legend=())


def tables(figures: Sequence[Figure], notes: Sequence[str]) -> list[Table]:
    """The figures by what their cases vary in, then by metric, in the order in which they came."""
    by_keys: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        by_keys.setdefault(tuple(figure.case), []).append(figure)
    return [_table(keys, group, notes) for keys, group in by_keys.items()]


def _table(keys: Sequence[str], figures: Sequence[Figure], notes: Sequence[str]) -> Table:
    common = shared(figures)
    columns = [key for key in keys if key not in common]
    by_metric: dict[str, list[Figure]] = {}
    for figure in figures:
        by_metric.setdefault(figure.metric, []).append(figure)
    return Table(
        columns=[units.words(column) for column in columns],
        numeric=[all(_is_number(f.case[column]) for f in figures) for column in columns],
        common=[(units.words(key), units.shown(value)) for key, value in common.items()],
        shown=[name for name, value in SHOWN if any(value(f) for f in figures)],
        groups=[
            Group(metric=units.words(metric), rows=[row(figure, columns, notes) for figure in group])
            for metric, group in by_metric.items()
        ],
    )


def is_time(figure: Figure) -> bool:
    """A time, a rate, or a ratio of them."""
    return figure.unit in ("s", "x") or figure.unit.endswith("/s")


def shared(figures: Sequence[Figure]) -> dict[str, Value]:
    """What the cases of several figures have in common."""
    if len(figures) < 2:
        return {}
    return {k: v for k, v in figures[0].case.items() if all(str(f.case.get(k)) == str(v) for f in figures)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def row(figure: Figure, columns: Sequence[str], notes: Sequence[str]) -> Row:
    """A figure with its ratio as a bar on a logarithmic track: twice and half are as far from the middle."""
    share = 0.0
    if figure.ratio is not None and figure.ratio > 0 and not figure.exact:
        share = 50 * max(-1.0, min(1.0, math.log(figure.ratio) / math.log(WIDEST)))
    return Row(
        cells=[units.shown(figure.case[column]) for column in columns],
        predicted=units.human(figure.predicted, figure.unit, figure.exact),
        measured=units.human(figure.measured, figure.unit, figure.exact),
        spread=units.spread(figure),
        ratio=units.ratio(figure),
        tone=tone(figure),
        start=round(50 + min(0.0, share), 2),
        length=round(abs(share), 2),
        note=notes.index(figure.note) + 1 if figure.note else None,
    )


def tone(figure: Figure) -> str:
    """How well a figure was predicted."""
    if figure.exact and figure.measured is not None and figure.predicted is not None:
        return "equal" if figure.measured == figure.predicted else "unequal"
    if figure.ratio is None or figure.ratio <= 0:
        return "none"
    off = max(figure.ratio, 1 / figure.ratio)
    return "near" if off <= NEAR else "off" if off <= FAR else "far"


def command(name: str, run: Run) -> str:
    """What measures a question again as it was measured, whatever is kept."""
    quick = " --quick" if run.quick else ""
    return (
        f"python -m benchmarks {name}{quick} --device {run.device} --dtype {run.dtype} --threads {run.threads} --fresh"
    )


def warnings(name: str, finished: Finished, latest: Run) -> list[str]:
    """What a reader must know before the figures."""
    said, run = [], finished.run
    if run.fingerprint != latest.fingerprint:
        said.append(
            f"Measured by an earlier run than the rest: {run.date[:10]}, commit {(run.commit or 'unknown')[:12]}, "
            f"{run.dtype} on {run.device}, {threads(run)}{', quick' if run.quick else ''}."
        )
    if words := unsteady(finished, name):
        said.append(words)
    if left := finished.left(name):
        said.append(f"{left} of {len(finished.plan[name])} cases {'is' if left == 1 else 'are'} still to be measured.")
    return said


def unsteady(finished: Finished, name: str) -> str:
    """What a reader must know of the machine while a question was measured; nothing if it was quiet, or does not
    matter, since no time was taken."""
    if not any(is_time(figure) for figure in finished.figures(name)):
        return ""
    steadiness = finished.steadiness(name)
    slow = {key: share for key, share in steadiness.items() if share < STEADY}
    fast = max(steadiness.values(), default=1.0)
    if slow:
        which = ", ".join(slow) if len(slow) <= 3 else f"{len(slow)} of {len(steadiness)} cases"
        return (
            f"The machine was busy or throttled: in {which} it gave as little as {min(slow.values()):.0%} of the rates "
            "that predictions rest on. --fresh measures again."
        )
    if fast > 1 / STEADY:
        return (
            f"The machine was faster than when its rates were measured, up to {fast:.2f} times: predictions are too "
            "low. --fresh measures its rates again too."
        )
    return ""


def threads(run: Run) -> str:
    return f"{run.threads} thread{'' if run.threads == 1 else 's'}"


def machine(roofs: Roofs | None) -> dict[str, list[tuple[str, str]]]:
    """The card, and the measured rates."""
    if roofs is None:
        return {"card": [], "roofs": []}
    rates = [(f"matrix product, {dtype}", units.human(rate, "FLOP/s")) for dtype, rate in roofs.peak.items()]
    rates += [
        ("reading memory", units.human(roofs.bandwidth, "bytes/s")),
        ("copying memory", units.human(roofs.copy, "bytes/s")),
        ("a call in a model", units.human(roofs.call, "s")),
    ]
    return {"card": [(units.words(key), str(value)) for key, value in roofs.card.items()], "roofs": rates}


def facts(run: Run) -> list[tuple[str, str]]:
    """The run, in a few words each."""
    return [
        ("date", run.date[:16].replace("T", " ")),
        ("commit", run.commit[:12] + ("-dirty" if run.commit.endswith("-dirty") else "") if run.commit else "unknown"),
        ("device", f"{run.device}, {threads(run)}"),
        ("dtype", run.dtype),
        ("sizes", "quick" if run.quick else "full"),
        *((name, version) for name, version in run.versions.items()),
    ]


def summary(figures: Sequence[Figure], questions: int) -> list[tuple[str, str]]:
    """The page in four numbers: value and what it counts."""
    exact = [f for f in figures if f.exact and f.measured is not None and f.predicted is not None]
    repeated = [f.ratio for f in figures if is_time(f) and f.low is not None and not f.bound and f.ratio]
    within = sum(1 - WITHIN <= ratio <= 1 + WITHIN for ratio in repeated)
    counted = [(str(questions), "question" if questions == 1 else "questions"), (f"{len(figures):,}", "figures")]
    if exact:
        equal = sum(f.measured == f.predicted for f in exact)
        counted.append((f"{equal} of {len(exact)}", "counts exactly as predicted"))
    if repeated:
        counted.append((f"{within} of {len(repeated)}", f"repeated timings within {WITHIN:.0%} of the prediction"))
    return counted


def changed(changes: Sequence[Change]) -> str:
    """How many figures fared how: 3 better, 1 worse, 40 unchanged."""
    counts = Counter(change.verdict for change in changes)
    always = [f"{counts.pop(verdict, 0)} {verdict}" for verdict in ("better", "worse", "unchanged")]
    return ", ".join([*always, *(f"{count} {verdict}" for verdict, count in sorted(counts.items()))])


def change_row(change: Change) -> Mapping[str, str]:
    """A change as words."""
    figure = change.name
    factor = "" if change.factor is None else f"{change.factor:.2f} ×"  # noqa: RUF001
    return {
        "question": figure.question,
        "case": case_words(figure),
        "metric": units.words(figure.metric),
        "old": units.human(change.old, figure.unit, figure.exact),
        "new": units.human(change.new, figure.unit, figure.exact),
        "factor": factor,
        "verdict": change.verdict,
    }


def case_words(figure: Figure, without: Collection[str] = ()) -> str:
    """A case on one line, without these keys."""
    return ", ".join(f"{units.words(k)} {units.shown(v)}" for k, v in figure.case.items() if k not in without)
