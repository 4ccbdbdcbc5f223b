"""Reports: questions with their answers, as text or page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from dsmini.console.messages import say
from dsmini.report import plots, tables
from dsmini.report.figures import Detail, Figure, Plot, Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question of a report, its answer, and the figures that the answer rests on."""

    name: str
    """Short name, unique in the report and the target of links, such as "decode"."""
    title: str
    """The question."""
    finding: str
    """The answer, in one sentence."""
    figures: Sequence[Figure] = ()
    plots: Sequence[Plot] = ()
    details: Mapping[str, Sequence[Detail]] = field(default_factory=dict)
    """Numbers that show their computation on a click, by heading."""
    folded: Mapping[str, Sequence[Detail]] = field(default_factory=dict)
    """More of them, that a page shows after a click on their heading, and a terminal not at all."""
    tables: Sequence[Table] = ()
    """Tables of anything that is not a figure."""
    about: str = ""
    """Two or three sentences about the measurement, with all that is simulated."""
    command: str = ""
    """Command that measures again."""
    warnings: Sequence[str] = ()
    """Warnings that a reader must see before the figures."""
    errors: Sequence[tuple[str, str]] = ()
    """Cases that failed, with their tracebacks."""

    @property
    def figure_tables(self) -> list[Table]:
        """Figures as tables of the page."""
        return tables.tables_of(self.figures, self.notes)

    @cached_property
    def notes(self) -> list[str]:
        """Notes of the figures, each once."""
        return list(dict.fromkeys(figure.note for figure in self.figures if figure.note))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Questions with their answers, for a terminal, or as one HTML page.

    Put every number into a Figure with its unit, prediction and spread, so that both format it alike. Put
    figures into Sections: one question each, with one sentence that answers it. This is a whole report:

        from dsmini.report import Figure, Plot, Report, Section, Series

        figures = [
            Figure(question="memory", case={"attention": kind}, metric="bytes_per_token", unit="bytes",
                   measured=measured, predicted=predicted, exact=True)
            for kind, measured, predicted in (("MLA", 70_272, 70_272), ("MHA", 3_997_696, 3_997_696))
        ]
        bars = Series(label="measured", x=(), y=[f.measured for f in figures], kind="bars")
        plot = Plot(title="Cache", x="attention", y="bytes per token", series=[bars], labels=["MLA", "MHA"])
        report = Report(
            title="What to run where",
            sections=[
                Section(name="memory", title="How much memory does a token take?", figures=figures, plots=[plot],
                        finding="MLA stores 70,272 bytes a token, 98 % less than multi-head attention."),
            ],
            facts={"The machine": {"processor": "an 8-core laptop"}},
        )
        report.show(Console())                              # tables and findings in a terminal
        Path("report.html").write_text(report.html())       # one page without requests and scripts

    A page reads well with one to four plots a section and labels below 40 characters. Name simulated parts in
    Figure.note. A section may also have a Table of words, warnings, and the command that measures again.
    """

    title: str
    sections: Sequence[Section]
    lead: str = ""
    """Sentence under the title."""
    warnings: Sequence[str] = ()
    """Warnings that a reader must see before all sections."""
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Cards of names and values, such as the machine and the versions, by title."""
    facts_title: str = "Where and when"
    highlights: Sequence[tuple[str, str]] = ()
    """Numbers at the top, each with its name."""
    command: str = ""
    """Command that made the report."""

    @property
    def measured(self) -> bool:
        """True if some figure was measured."""
        return any(figure.measured is not None for section in self.sections for figure in section.figures)

    def show(self, console: Console) -> None:
        """Print each answer with its warnings above its tables. Only the page has plots."""
        for warning in self.warnings:
            say(console, warning, style="yellow")
        for section in self.sections:
            console.print()
            say(console, section.title, style="bold")
            say(console, section.finding, style="cyan")
            for warning in section.warnings:
                say(console, warning, style="yellow")
            tables.show_figures(console, section.figures)
            for heading, details in section.details.items():
                tables.show_details(console, heading, details)
            for table in section.tables:
                tables.show_table(console, table)

    def html(self) -> str:
        """Return the page, which needs no other file: read it offline, print it, or send it."""
        import jinja2  # a plan without a page does not need it

        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        strict: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
        environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **strict)
        environment.filters |= {"svg": lambda plot, name: Markup(plots.svg(plot, name))}  # its labels are escaped
        page = environment.get_template("page.html.j2")
        groups = [g for s in self.sections for part in (s.details, s.folded) for g in part.values()]
        names = {detail.name for group in groups for detail in group}
        return page.render(report=self, themes=plots.THEMES, tones=tables.STYLES, names=names)
