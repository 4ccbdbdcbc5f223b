"""A diagnosis as a report: the verdict first, then gains and what to try, then the evidence. A terminal shows less."""

from dataclasses import replace

from dsmini.diagnosis.diagnosis import Diagnosis
from dsmini.diagnosis.evidence.gather import Gathered
from dsmini.diagnosis.tries import tries_of
from dsmini.report import Figure, Plot, Report, Section, Series, Table

NO_EVIDENCE = Gathered(not_tried={})
NOTHING_GAINS = "Nothing that was tried gains: less work, or a faster machine, is what is left."


def report_of(
    found: Diagnosis, title: str, facts: dict[str, dict[str, str]], command: str, gathered: Gathered = NO_EVIDENCE
) -> Report:
    """Return the report of a diagnosis."""
    sections = [_verdict(found), _evidence(found), _to_try(found, gathered), _findings(found), _step(found)]
    return Report(
        title=title,
        lead=found.sentence,
        sections=[*sections, *gathered.sections, *_not_tried(found, gathered)],
        warnings=_warnings(found, gathered),
        highlights=[
            (_percent(found.gains[name].value), f"{axis.value}: gain of {name}") for axis, name in found.best.items()
        ],
        facts_title="What was diagnosed",
        facts=facts,
        command=command,
    )


def short_report_of(found: Diagnosis, title: str, gathered: Gathered = NO_EVIDENCE) -> Report:
    """Return what a terminal shows: the verdict, gains, what to try, and faults."""
    gains = [
        [
            name,
            found.work.changes[name].axis.value,
            str(g),
            "" if (p := _predicted(found, name)) is None else _percent(p),
        ]
        for name, g in found.gains.items()
    ]
    table = Table(columns=("made free", "axis", "gain", "predicted"), rows=gains, numeric=("gain", "predicted"))
    verdict, measured, faults = _verdict(found), _evidence(found), [f for f in found.findings if f.is_fault]
    rows = [[fault.axis, fault.sentence, fault.fix] for fault in faults]
    return Report(
        title=title,
        sections=[
            replace(verdict, tables=()),
            replace(measured, figures=(), plots=(), tables=[table]),
            _to_try(found, gathered),
            Section(
                name="faults",
                title="What is wrong?",
                finding="These faults were seen." if faults else "No fault was seen.",
                tables=[Table(columns=("axis", "fault", "what to do first"), rows=rows)] if faults else [],
            ),
        ],
        warnings=_warnings(found, gathered),
    )


def _warnings(found: Diagnosis, gathered: Gathered) -> list[str]:
    seen = [words for section in gathered.sections for words in section.warnings]
    if found.stopped:
        return ["It was interrupted, and rests on the rounds until then.", *seen]
    return ["It was interrupted after the verdict; some evidence is missing.", *seen] if gathered.stopped else seen


def _to_try(found: Diagnosis, gathered: Gathered) -> Section:
    """Return what gained, best first."""
    tries = tries_of(found, gathered.sections)
    rows = [[each.what, each.gain, each.action, each.predicted] for each in tries]
    table = Table(columns=("try", "gain", "how", "predicted"), rows=rows, numeric=("gain", "predicted"))
    return Section(
        name="what_to_try",
        title="What to try, best first?",
        finding=f"First {tries[0].what}: {tries[0].gain} of a token's time would go." if tries else NOTHING_GAINS,
        tables=[table] if tries else [],
    )


def _not_tried(found: Diagnosis, gathered: Gathered) -> list[Section]:
    """Return the section of what was not tried; none if all was."""
    rows = [[name, why] for name, why in {**found.not_tried, **gathered.not_tried}.items()]
    table = Table(columns=("not tried", "why"), rows=rows)
    words = f"{len(rows)} of the experiments {'does' if len(rows) == 1 else 'do'} not apply, or had no time."
    return [Section(name="not_tried", title="What was not tried?", finding=words, tables=[table])] if rows else []


def _verdict(found: Diagnosis) -> Section:
    rows = [
        [axis.value, str(found.gains[name]), name, found.work.changes[name].action]
        for axis, name in sorted(found.best.items(), key=lambda item: -found.gains[item[1]].low)
    ]
    finding = found.sentence + (f" {found.verdict.decides}" if found.verdict.decides else "")
    table = Table(columns=("axis", "gain", "by", "what to do where it gains"), rows=rows)
    words = Table(columns=("here", "meaning", "article", "textbook"), rows=found.work.vocabulary)
    return Section(
        name="verdict",
        title="What binds?",
        finding=finding,
        tables=[table, words],
        prose=[("Two vocabularies", found.work.about_words)],
    )


def _evidence(found: Diagnosis) -> Section:
    names, rows = list(found.gains), []
    for name, g in found.gains.items():
        said = _predicted(found, name)
        apart = "" if said is None else f"{100 * (g.value - said):+.0f}"
        rows.append(
            [
                name,
                found.work.changes[name].axis.value,
                found.work.changes[name].words,
                "" if said is None else _percent(said),
                str(g),
                apart,
            ]
        )
    table = Table(
        columns=("made free", "axis", "meaning", "predicted", "measured", "points apart"),
        rows=rows,
        numeric=("predicted", "measured", "points apart"),
    )
    gains = found.gains.values()
    bars = [
        Series(
            label="measured",
            x=(),
            y=[g.value for g in gains],
            low=[g.low for g in gains],
            high=[g.high for g in gains],
            kind="bars",
        )
    ]
    if found.prediction is not None:
        predicted = [_predicted(found, name) or 0.0 for name in names]
        bars.append(Series(label="predicted", x=(), y=predicted, kind="bars", dashed=True, of="measured"))
    plot = Plot(title="Share of a step that would go", x="what is made free", y="gain", series=bars, labels=names)
    return Section(
        name="evidence",
        title="What gains how much, predicted first and then measured?",
        finding=f"{found.measured.rounds} rounds in turns; a plain step takes {1e3 * found.measured.seconds:.4g} ms"
        + (f", {1e3 * found.prediction.plain:.4g} ms were predicted." if found.prediction else "."),
        tables=[table],
        plots=[plot],
    )


def _step(found: Diagnosis) -> Section:
    measured = found.work.parts(found.measured)
    if found.prediction is None:
        words = " and ".join(f"{1e3 * s:.4g} ms are {name}" for name, s in measured.items())
        return Section(
            name="step",
            title="What does a step consist of?",
            finding=f"A plain step takes {1e3 * found.measured.seconds:.4g} ms" + (f"; {words}." if words else "."),
        )
    parts = {**measured, **found.prediction.forecast.by_class}
    figures = [
        Figure(question="step", case={"part": name}, metric="seconds", unit="s", predicted=seconds)
        for name, seconds in parts.items()
    ]
    bars = Series(label="forecast", x=(), y=[1e3 * s for s in parts.values()], kind="bars", dashed=True)
    plot = Plot(title="Parts of a step", x="class of operations", y="ms", series=[bars], labels=list(parts))
    largest = max(parts, key=lambda name: parts[name])
    share = parts[largest] / sum(parts.values())
    return Section(
        name="step",
        title="What does a step consist of?",
        finding=f"Most of it, {share:.0%}, is {largest}, by the forecast of this machine's rates.",
        figures=figures,
        plots=[plot],
    )


def _findings(found: Diagnosis) -> Section:
    faults = [finding for finding in found.findings if finding.is_fault]
    words = "; ".join(finding.fix for finding in faults) if faults else "Nothing of it needs an action."
    rows = [
        [finding.axis, finding.name, "fault" if finding.is_fault else "fine", finding.sentence]
        for finding in found.findings
    ]
    table = Table(columns=("axis", "name", "state", "what was seen"), rows=rows)
    return Section(name="findings", title="What else was seen?", finding=words, tables=[table])


def _predicted(found: Diagnosis, name: str) -> float | None:
    return None if found.prediction is None else found.prediction.gain(name)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
