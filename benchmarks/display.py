"""What a call of python -m benchmarks shows of its results: tables in the terminal, and the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks import answers
from benchmarks.questions import Question
from dsmini.atomic import write_text
from dsmini.console.messages import say
from dsmini.report import Section, comparison
from dsmini.report.results import Finished, Results
from dsmini.report.rows import case_words
from dsmini.report.terminal import show_question, show_table
from dsmini.report.units import human, words


@dataclass(kw_only=True)
class Display:
    """The questions of a call, and where they are shown."""

    console: Console
    out: Path
    known: Mapping[str, Question]
    names: Sequence[str]
    """Questions of this call, in the order of known. The page shows all that have figures."""
    undrawn: str = ""
    """Why the page could not be written the last time it was tried; empty if it was."""
    changes: Sequence[comparison.Change] = ()
    """Result of compare."""
    drawn: dict[str, Section] = field(default_factory=dict)
    """Parts of the page by name, so that plots are not drawn again."""

    @property
    def path(self) -> Path:
        """File of results."""
        return self.out / "results.jsonl"

    def show_all(self, results: Results) -> int:
        """Show the tables and the page. Return the exit status."""
        having = results.of_questions(self.names)
        for name, finished in having.items():
            self.show(self.known[name], finished)
        self.draw(results)
        return 1 if sum([self.unequal(finished) for finished in having.values()]) else 0

    def show(self, question: Question, finished: Finished) -> None:
        """Print the figures of a question, and its sentence."""
        figures = finished.figures(question.name)
        show_question(self.console, question.title, answers.finding(question, figures), figures)
        if unsteady := finished.unsteady(question.name):
            say(self.console, unsteady, style="yellow")

    def draw(self, results: Results, changed: Section | None = None) -> None:
        """Write the page. A disk that is full stops no measurement: the figures are what counts."""
        path, before = self.out / "report.html", self.undrawn
        self.undrawn = ""
        try:
            write_text(path, answers.report(results, self.known, self.drawn, changed).html())
        except OSError as error:
            self.undrawn = error.strerror or str(error)
            if not before:
                words = f"{path} could not be written: {self.undrawn}; the figures are kept. Then: --report-only"
                say(self.console, words, style="bold red")

    def compare(self, results: Results, old: Results, path: Path) -> None:
        """Show what changed in the questions of this call, and draw the page with it."""
        self.changes = comparison.compare(old.figures(self.names), results.figures(self.names))
        warnings = answers.warnings_of_changes(self.names, old, results)
        different = [change for change in self.changes if change.verdict != "unchanged"]
        if different:
            show_table(self.console, comparison.table(different), f"Changes since {path}")
        say(self.console, f"{len(self.changes) - len(different)} of {len(self.changes)} figures are unchanged")
        for warning in warnings:
            say(self.console, warning, style="yellow")
        self.draw(results, answers.changes_section(self.changes, str(path), warnings))

    def unequal(self, finished: Finished) -> int:
        """Return how many counts are not what they must be, and say which."""
        wrong = [figure for name in self.names for figure in finished.figures(name) if figure.equal is False]
        for f in wrong:
            said = f"{human(f.measured, f.unit, True)}, predicted were {human(f.predicted, f.unit, True)}"
            say(self.console, f"{f.question} {case_words(f)}: {words(f.metric)} is {said}", style="bold red")
        return len(wrong)
