"""Show results: tables in the terminal, and the page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks import answers
from benchmarks.questions import Question
from dsmini.atomic import write_text
from dsmini.console.messages import say
from dsmini.report import Figure, Section, comparison
from dsmini.report.results import Finished, Results
from dsmini.report.rows import case_words
from dsmini.report.terminal import show_question, show_table
from dsmini.report.units import human, words


@dataclass(kw_only=True)
class Display:
    """Questions of a call, and the places that show them."""

    console: Console
    out: Path
    known: Mapping[str, Question]
    names: Sequence[str]
    """Names of the questions of this call, in the order of known. The page shows all that have figures."""
    undrawn: str = ""
    """Reason why the page could not be written the last time; empty if it was written."""
    changes: Sequence[comparison.Change] = ()
    """Result of compare."""
    drawn: dict[str, Section] = field(default_factory=dict)
    """Sections of the page by name, whose plots need not be drawn again."""

    @property
    def path(self) -> Path:
        """Path of the file of results."""
        return self.out / "results.jsonl"

    def show_all(self, results: Results) -> int:
        """Show the tables and the page. Return the exit status."""
        for name, finished in results.of_questions(self.names).items():
            self.show(self.known[name], finished)
        self.draw(results)
        return 1 if self.unequal(results.figures(self.names)) else 0

    def show(self, question: Question, finished: Finished) -> None:
        """Print the figures of a question, its warning and its finding."""
        figures = finished.figures(question.name)
        warnings = [finished.unsteady(question.name)]
        said = answers.finding(question, finished)
        show_question(self.console, question.title, said, figures, filter(None, warnings))

    def draw(self, results: Results, changed: Section | None = None) -> None:
        """Write the page. A full disk does not stop the measurements."""
        path, before = self.out / "report.html", self.undrawn
        self.undrawn = ""
        try:
            write_text(path, answers.report(results, self.known, self.drawn, changed).html())
        except OSError as error:
            self.undrawn = error.strerror or str(error)
            if not before:
                said = f"{path} could not be written: {self.undrawn}; the figures are saved, use --report-only later"
                say(self.console, said, style="bold red")

    def compare(self, results: Results, old: Results, path: Path) -> None:
        """Show the changes in the questions of this call, and draw the page with them."""
        self.changes = comparison.compare(old.figures(self.names), results.figures(self.names))
        warnings = answers.warnings_of_changes(self.names, old, results)
        different = [change for change in self.changes if change.verdict != "unchanged"]
        if different:
            show_table(self.console, comparison.table(different), f"Changes since {path}")
        say(self.console, f"{len(self.changes) - len(different)} of {len(self.changes)} figures are unchanged")
        for warning in warnings:
            say(self.console, warning, style="yellow")
        self.draw(results, answers.changes_section(self.changes, str(path), warnings))

    def unequal(self, figures: Iterable[Figure]) -> int:
        """Return the number of counts that differ from their prediction, and name each."""
        wrong = [figure for figure in figures if figure.equal is False]
        for f in wrong:
            said = f"{human(f.measured, f.unit, True)}, predicted: {human(f.predicted, f.unit, True)}"
            say(self.console, f"{f.question} {case_words(f)}: {words(f.metric)} is {said}", style="bold red")
        return len(wrong)
