"""Show results: the figures that a reader came for, one answer for each question, the page, and JSON."""

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import comparison
from benchmarks.question import Question
from benchmarks.results import ROOT, Measured, Results
from dsmini.atomic import write_text
from dsmini.console.messages import say
from dsmini.measure.rates import from_json
from dsmini.report import Figure, Report, Section, pick
from dsmini.report.rows import case_words
from dsmini.report.units import human, plural, words

NOTHING = "Nothing was measured yet."


class Answer:
    """All that a call has to say.

    Args:
        asked: names of the questions of this call.
        left_out: reasons for the others.
        old: results to compare with.
    """

    def __init__(
        self,
        results: Results,
        known: Mapping[str, Question],
        asked: Sequence[str],
        left_out: Mapping[str, str],
        old: Results | None,
    ) -> None:
        self.results, self.asked, self.left_out = results, asked, left_out
        self.of = {name: results.of(name) for name in known if name not in left_out}
        """Questions that have figures or errors."""
        self.of = {name: found for name, found in self.of.items() if found.figures or found.errors}
        self.sections = {name: self._section(known[name], found) for name, found in self.of.items()}
        self.mine = {name: results.of(name) for name in asked}
        figures = results.figures(asked)
        self.changes = comparison.compare(old.figures(asked), figures) if old else []
        if old:
            different = [change for change in self.changes if change.verdict != "unchanged"]
            told = [f"{count} {verdict}" for verdict, count in Counter(c.verdict for c in different).items()]
            told.append(f"{len(self.changes) - len(different)} of {len(self.changes)} figures are unchanged.")
            self.sections["changes"] = Section(
                name="changes",
                title="What changed?",
                finding=", ".join(told),
                tables=[comparison.table(different)] if different else [],
                about=comparison.RULE,
                warnings=self._differences(old),
            )

    def _section(self, question: Question, found: Measured) -> Section:
        """Return a question with all that was measured."""
        run, latest, plots = found.run, self.results.latest, []
        left = f"{plural(len(found.left), 'case')} still to be measured." if found.left else ""
        warnings = [found.unsteady, left]
        if run.id != latest.id:
            warnings.insert(0, f"Measured earlier than the rest: {run.date[:10]}, commit {run.commit}, {run.words}.")
        mark = "Times are unreliable, the machine was not steady. " if found.unsteady else ""
        # the figures may not be enough, and a defect of one question must not spoil the others
        try:
            finding = f"{mark}{question.answer(found.figures) or NOTHING}"
        except Exception as error:
            finding = f"No answer: {type(error).__name__}: {error}"
        try:
            plots = [plot for draw in question.plots for plot in draw(found.figures)]
        except Exception as error:
            warnings.append(f"No plots: {type(error).__name__}: {error}")
        s = run.setting
        where = f"--device {s['device']} --dtype {s['dtype']} --threads {s['threads']} --fresh"
        return Section(
            name=question.name,
            title=question.title,
            finding=spaced(finding),
            figures=found.figures,
            plots=plots,
            about=" ".join((question.about or "").split()),
            command=f"python -m benchmarks {question.name}{' --quick' * s['quick']} {where}",
            warnings=list(filter(None, warnings)),
            errors=list(found.errors.items()),
        )

    def _differences(self, old: Results) -> list[str]:
        """Return warnings: what besides the code may have changed the figures."""
        before, now = old.latest, self.results.latest
        different = f"The settings differ: {before.words} before, {now.words} now."
        said = [different] if before.words != now.words else []
        for when, found in (("before", old), ("now", self.results)):
            if busy := [name for name in self.asked if found.of(name).unsteady]:
                said.append(f"The machine was not steady {when} in {', '.join(busy)}.")
        return said

    def show(self, console: Console, tables: bool) -> None:
        """Print the headline, then the answers, each above its table if tables are wanted."""
        for value, what in headline(self.results, [name for name in self.asked if name in self.of]):
            say(console, f"{value}  {what}", style="bold")
        sections = [section for name, section in self.sections.items() if name in (*self.asked, "changes")]
        sections = [section if tables else dataclasses.replace(section, figures=()) for section in sections]
        Report(title="", sections=sections).show(console)
        say(console)
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, why in self.left_out.items() if why == reason]
            say(console, f"left out: {', '.join(names)} ({reason})", style="dim")

    def problems(self, console: Console) -> int:
        """Print the number of failed cases and each count that differs from its prediction. Return the exit status."""
        problems = []
        if failed := sum(len(found.errors) for found in self.mine.values()):
            problems.append(f"{plural(failed, 'case')} failed; the page has the tracebacks")
        for f in (f for f in self.results.figures(self.asked) if f.equal is False):
            got, want = (human(value, f.unit, exact=True) for value in (f.measured, f.predicted))
            problems.append(f"{f.question} {case_words(f)}: {words(f.metric)} is {got}, predicted: {want}")
        for problem in problems:
            say(console, problem, style="bold red")
        return int(bool(problems))

    def draw(self, console: Console, out: Path) -> int:
        """Write the page. Return 1 if it cannot be written: the figures are saved."""
        path = out / "report.html"
        try:
            write_text(path, self.report().html())
        except OSError as error:
            why = error.strerror or error
            said = f"{path} could not be written: {why}; the figures are saved, use --report-only later"
            say(console, said, style="bold red")
            return 1
        say(console, f"report  {path}")
        return 0

    def report(self) -> Report:
        """Return the page of all questions that have figures or errors."""
        latest = self.results.latest
        run = {"date": latest.date[:16].replace("T", " "), "commit": latest.commit, "setting": latest.words}
        busy = [name for name, found in self.of.items() if found.unsteady]
        warning = f"The machine was not steady during {', '.join(busy)}: do not rely on the times and ratios there."
        return Report(
            title="dsmini benchmarks",
            lead="What was measured, next to what was predicted from counts and from this machine's own rates.",
            sections=list(self.sections.values()),
            warnings=[warning] if busy else [],
            facts={
                "The machine": {words(key): str(value) for key, value in latest.setting["machine"].items()},
                "Its measured rates": rates(latest.rates),
                "The run": run | latest.setting["versions"],
            },
            highlights=headline(self.results, list(self.of)),
            command=latest.command,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the answer for programs: the latest run's date, command, commit and setting, and what follows.

        figures: those of this call's questions.
        failed: cases that raised or took too long.
        left: keys of cases still to be measured, by question.
        left_out: reason for each question that was left out.
        steadiness: least share of its stored rates that the machine reached, by question.
        changes: figures that are not unchanged since --compare.
        """
        run = self.results.latest
        return {
            **{"date": run.date, "command": run.command, "commit": run.commit, **run.setting},
            "figures": [figure.as_json() for found in self.mine.values() for figure in found.figures],
            "failed": [
                {"question": name, "case": key, "error": error.strip().splitlines()[-1]}
                for name, found in self.mine.items()
                for key, error in found.errors.items()
            ],
            "left": {name: found.left for name, found in self.mine.items() if found.left},
            "left_out": dict(self.left_out),
            "steadiness": {name: found.steadiness for name, found in self.mine.items() if found.figures},
            "changes": [change.as_json() for change in self.changes if change.verdict != "unchanged"],
        }


def rates(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the rates of a machine in words; none if an older version measured other ones."""
    try:
        roofs = from_json(stored)
    except (KeyError, TypeError, AttributeError):
        return {}
    said = {f"matrix product, {dtype}": human(rate, "FLOP/s") for dtype, rate in roofs.peak.items()}
    said |= {"reading memory": human(roofs.bandwidth, "bytes/s"), "copying memory": human(roofs.copy, "bytes/s")}
    return said | {"a call in a model": human(roofs.call, "s")}


def headline(results: Results, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the figures that a reader came for, each with its words: those of them that were measured, and a quote."""
    if not {"kv-cache", "decode", "train", "fp8-error"} & set(names):
        return []
    found: list[tuple[str, str]] = []

    def first(question: str, metric: str, **case: Any) -> list[Figure]:
        some = results.figures([question]) if question in names else []
        return [f for f in pick(some, metric, **case) if f.measured is not None][:1]

    for f in first("kv-cache", "bytes_per_token", attention="MLA"):
        for mha in first("kv-cache", "bytes_per_token", attention="MHA"):
            less = 1 - (f.measured or 0.0) / (mha.measured or 1.0)
            found.append((human(f.measured, "bytes", exact=True), f"of cache for a token, {less:.1%} less than MHA's"))
    for f in first("decode", "tokens_per_s"):
        share = "".join(f", {b.ratio:.0%} of what memory allows" for b in first("decode", "bandwidth") if b.ratio)
        found.append((human(f.measured, f.unit), f"in decoding at context {f.case['context']}{share}"))
    for f in first("train", "tokens_per_s"):
        share = "".join(f", {b.ratio:.0%} of the matrix peak" for b in first("train", "flop_rate") if b.ratio)
        found.append((human(f.measured, f.unit), f"in training{share}"))
    errors = [f for f in results.figures(["fp8-error"] if "fp8-error" in names else []) if f.metric == "error"]
    if errors:
        middle, expected = statistics.median(f.measured or 0.0 for f in errors), errors[0].predicted or 0.0
        found.append((f"{middle:.1%}", f"error of an FP8 product in training, {expected:.1%} expected from rounding"))
    return [(spaced(value), spaced(what)) for value, what in [*found, *quoted()]]


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
