"""Show results: the figures that a reader came for, one answer for each question, the page, and JSON."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import comparison
from benchmarks.question import Question
from benchmarks.results import ROOT, Results
from dsmini.atomic import write_text
from dsmini.console.messages import say
from dsmini.measure.rates import from_json
from dsmini.report import Figure, Report, Section, pick
from dsmini.report.rows import case_words
from dsmini.report.terminal import show_figures, show_table
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
        self.results, self.known, self.asked, self.left_out = results, known, asked, left_out
        self.names = [name for name in known if results.run_of(name) and name not in left_out]
        """Questions that have figures or errors."""
        self.old = old
        self.changes = comparison.compare(old.figures(asked), results.figures(asked)) if old else []

    def answer(self, name: str) -> str:
        """Return a question's answer, marked where the machine was busy; the figures may not be enough for it."""
        try:
            said = self.known[name].answer(self.results.figures([name])) or NOTHING
        except Exception as error:  # a missing case or a defect of one question must not spoil the others
            return f"No answer: {type(error).__name__}: {error}"
        mark = "Times are unreliable, the machine was not steady. " if self.results.unsteady(name) else ""
        return spaced(f"{mark}{said}")

    def show(self, console: Console, tables: bool) -> None:
        """Print the headline, then the answers, each above its table if tables are wanted."""
        for value, what in headline(self.results, [name for name in self.names if name in self.asked]):
            say(console, f"{value}  {what}", style="bold")
        for name in (name for name in self.names if name in self.asked):
            say(console)
            say(console, self.known[name].title, style="bold")
            say(console, self.answer(name), style="cyan")
            for warning in filter(None, [self.results.unsteady(name), self._left(name)]):
                say(console, warning, style="yellow")
            if tables:
                show_figures(console, self.results.figures([name]))
        say(console)
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            say(console, f"left out: {', '.join(names)} ({reason})", style="dim")
        if self.old:
            different = [change for change in self.changes if change.verdict != "unchanged"]
            if different:
                show_table(console, comparison.table(different), "Changes")
            say(console, f"{len(self.changes) - len(different)} of {len(self.changes)} figures are unchanged")
            for warning in self._differences():
                say(console, warning, style="yellow")

    def _left(self, name: str) -> str:
        left = self.results.left(name)
        return f"{plural(len(left), 'case')} still to be measured." if left else ""

    def _differences(self) -> list[str]:
        """Return warnings: what besides the code may have changed the figures."""
        assert self.old is not None, "something is compared"
        before, now = self.old.latest, self.results.latest
        said = []
        if before and now and before.words != now.words:
            said.append(f"The settings differ: {before.words} before, {now.words} now.")
        for when, found in (("before", self.old), ("now", self.results)):
            if busy := [name for name in self.asked if found.unsteady(name)]:
                said.append(f"The machine was not steady {when} in {', '.join(busy)}.")
        return said

    def problems(self, console: Console) -> int:
        """Print the number of failed cases and each count that differs from its prediction. Return the exit status."""
        status = 0
        if failed := sum(len(self.results.failed(name)) for name in self.asked):
            say(console, f"{plural(failed, 'case')} failed; the page has the tracebacks", style="bold red")
            status = 1
        for f in (f for f in self.results.figures(self.asked) if f.equal is False):
            got, want = (human(value, f.unit, exact=True) for value in (f.measured, f.predicted))
            said = f"{f.question} {case_words(f)}: {words(f.metric)} is {got}, predicted: {want}"
            say(console, said, style="bold red")
            status = 1
        return status

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
        assert latest is not None, "a page is drawn once a run has begun"
        sections = [self._section(name) for name in self.names]
        if self.old:
            finding, table = f"{comparison.counted(self.changes)}.", comparison.table(self.changes)
            about = {"about": comparison.RULE, "warnings": self._differences()}
            tables = [table] if self.changes else []
            sections.append(Section(name="changes", title="What changed?", finding=finding, tables=tables, **about))
        setting = latest.setting
        facts = {
            "The machine": {words(key): str(value) for key, value in setting["machine"].items()},
            "Its measured rates": rates(latest.rates),
            "The run": {"date": latest.date[:16].replace("T", " "), "commit": latest.commit, "setting": latest.words}
            | setting["versions"],
        }
        busy = [name for name in self.names if self.results.unsteady(name)]
        warning = f"The machine was not steady during {', '.join(busy)}: do not rely on the times and ratios there."
        return Report(
            title="dsmini benchmarks",
            lead="What was measured, next to what was predicted from counts and from this machine's own rates.",
            sections=sections,
            warnings=[warning] if busy else [],
            facts=facts,
            highlights=headline(self.results, self.names),
            command=latest.command,
        )

    def _section(self, name: str) -> Section:
        """Return a question with all that was measured."""
        question, figures, run = self.known[name], self.results.figures([name]), self.results.run_of(name)
        latest = self.results.latest
        assert run and latest, "only questions that have a run are shown"
        warnings = [self.results.unsteady(name), self._left(name)]
        if run.id != latest.id:
            warnings.insert(0, f"Measured earlier than the rest: {run.date[:10]}, commit {run.commit}, {run.words}.")
        setting, plots = run.setting, []
        try:
            plots = [plot for draw in question.plots for plot in draw(figures)]
        except Exception as error:  # as above
            warnings.append(f"No plots: {type(error).__name__}: {error}")
        sizes = " --quick" if setting["quick"] else ""
        where = f"--device {setting['device']} --dtype {setting['dtype']} --threads {setting['threads']} --fresh"
        return Section(
            name=name,
            title=question.title,
            finding=self.answer(name),
            figures=figures,
            plots=plots,
            about=" ".join((question.about or "").split()),
            command=f"python -m benchmarks {name}{sizes} {where}",
            warnings=list(filter(None, warnings)),
            errors=list(self.results.failed(name).items()),
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
        assert run is not None, "the caller has begun a run, or found one"
        failed = {name: self.results.failed(name) for name in self.asked}
        return {
            **{"date": run.date, "command": run.command, "commit": run.commit, **run.setting},
            "figures": [figure.as_json() for figure in self.results.figures(self.asked)],
            "failed": [
                {"question": name, "case": key, "error": error.strip().splitlines()[-1]}
                for name, errors in failed.items()
                for key, error in errors.items()
            ],
            "left": {name: left for name in self.asked if (left := self.results.left(name))},
            "left_out": dict(self.left_out),
            "steadiness": {name: self.results.steadiness(name) for name in self.asked if self.results.of(name)},
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
