"""Answers of the command: what it prints, what --json prints, and the page that --out writes."""

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import try_writing, write_json, write_text
from dsmini.console.messages import say
from dsmini.planner.display import shown
from dsmini.planner.explanation import explain, find, named, text
from dsmini.planner.figure import Figure
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.here import record_here, section_here, steps_here, with_forecast
from dsmini.planner.pages import heading, plan_report, search_section, ten_lines, variation_section
from dsmini.planner.plan import SECTIONS, Plan, plan
from dsmini.planner.published import published_figures, published_section
from dsmini.planner.request import ONE_PROCESS, Setup
from dsmini.planner.search import search
from dsmini.planner.setup import changed
from dsmini.planner.vary import Variation, read_axis, vary
from dsmini.report import Report, Section, Table
from dsmini.report.figures import plain

Record = dict[str, Any]
FILES = ("plan.html", "plan.json")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer to one question."""

    record: Any
    """Answer as JSON."""
    lines: Sequence[str] = ()
    """Lines to print before the sections."""
    sections: Sequence[Section] = ()
    """Sections for a terminal."""
    page: Callable[[], Report] | None = None
    """Report for the page; made on demand, since its formulas and plots take longer than a plan."""

    def show(self, console: Console) -> None:
        """Print the answer."""
        for line in self.lines:
            say(console, line)
        Report(title="", sections=self.sections).show(console)

    def write(self, folder: Path) -> list[Path]:
        """Write plan.html and plan.json into a folder that check_folder has seen; return their paths."""
        assert self.page is not None, "an answer without a page"
        page, record = (folder / name for name in FILES)
        write_text(page, self.page().html())
        write_json(record, self.record)
        return [page, record]


def check_folder(folder: Path) -> None:
    """Make a folder for the page if it is not there. Raises: ValueError for one that cannot be written."""
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} in it is a folder")
            try_writing(folder / name)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from None


def planned(made: Setup, command: str, on_part: OnPart = quiet, *, whole: bool = False) -> Answer:
    """Return the plan in ten lines, or with all tables; of this machine, with forecasts of its steps.

    Raises: ValueError if neither training nor serving fits.
    """
    if made.refused:
        raise ValueError(made.refused)
    found, more, extra = plan(made), list[Section](), Record()
    start = time.perf_counter()
    if made.hardware.name == "this" and (steps := steps_here(found, on_part)):
        section, extra = section_here(steps), {"here": record_here(steps)}
        more = [replace(section, about=f"{section.about} They took {time.perf_counter() - start:.1f} s to count.")]
        found = plan(with_forecast(made, found, steps))
    return Answer(
        record=plan_record(found) | extra,
        lines=[heading(found)] if whole else ten_lines(found),
        sections=[*(plan_report(found, full=False).sections if whole else ()), *more],
        page=lambda: plan_report(found, full=True, more=more, command=command),
    )


def searched(made: Setup, command: str, on_part: OnPart = quiet) -> Answer:
    """Return the layouts that fit, fastest first, and the plan of the fastest on the page.

    Raises: ValueError if no layout fits, with what would fit.
    """
    found = search(made, on_part=on_part)
    best = plan(changed(made, found[0][0].request.given(), made.hardware, "the fastest of all that fit"))
    records = [record for _, record in found]
    section = search_section(records)
    return Answer(
        record={"layouts": records},
        lines=[heading(best)],
        sections=[section],
        page=lambda: plan_report(best, full=True, more=[section], command=command),
    )


def varied(made: Setup, axes: Sequence[str], names: Sequence[str], command: str, on_part: OnPart = quiet) -> Answer:
    """Return the plans of all values of one thing or of two."""
    found = vary(made, [read_axis(axis) for axis in axes], names, on_part)
    there, on_page = (variation_section(found, full=full) for full in (False, True))
    return Answer(
        record=variation_record(found),
        lines=[f"{made.model.name} on {made.hardware.title}"],
        sections=[there],
        page=lambda: plan_report(plan(made), full=True, more=[on_page], command=command),
    )


def published() -> Answer:
    """Return the published figures next to ours."""
    figures = published_figures()
    there, on_page = (published_section(figures, full=full) for full in (False, True))
    return Answer(
        record=[figure.record for figure in figures],
        sections=[there],
        page=lambda: Report(title="Published figures, and ours", sections=[on_page]),
    )


def explained(made: Setup, name: str, width: int) -> Answer:
    """Return the explanation of a figure, or all names for "list".

    Raises: ValueError for an unknown figure, with the nearest known ones.
    """
    figures = plan(made).figures
    if name != "list":
        found = explain(find(figures.values(), name))
        record = {kind: [asdict(step) for step in steps] for kind, steps in found.items()}
        return Answer(record=record, lines=[text(found, width)])
    every = named(figures.values())
    rows = [(key, shown(figure), figure.title.title) for key, figure in every.items()]
    table = Table(columns=("name", "value", "figure"), rows=rows, numeric=("value",))
    section = Section(name="names", title="Figures", finding=f"{len(every)} figures and inputs.", tables=[table])
    return Answer(record=figures_record(every), sections=[section])


# --- JSON


def plan_record(found: Plan) -> Record:
    """Return a plan: its setup, what binds, and its figures by section and name."""
    made = found.setup
    return {
        "config": made.model.source,
        "hardware": made.hardware.name,
        "layout": made.request.given(ONE_PROCESS) | {"chosen": made.sources["layout"]},
        "fits": found.fits,
        "misfit": dict(made.misfit),
        "unserved": made.unserved,
        "binds": {stage: binding.first for stage, binding in found.binds.items()},
        "figures": {section: figures_record(found.sheet.section(section)) for section in SECTIONS},
    }


def figures_record(figures: Mapping[str, Figure]) -> Record:
    """Return figures by name: value, unit in base units, title and source."""
    return {
        name: {"value": plain(f.value), "unit": f.title.unit, "title": f.title.title, "source": f.source}
        for name, f in figures.items()
    }


def variation_record(variation: Variation) -> Record:
    """Return a variation: the axes, and for each place its figures or why there are none."""
    plans: list[Record] = []
    for place in sorted({*variation.plans, *variation.problems}):
        found = {axis.name: axis.values[i] for axis, i in zip(variation.axes, place, strict=True)}
        found["problem"] = variation.problems.get(place)
        if place in variation.plans:
            there = {name: variation.found(name).get(place) for name in variation.names}
            found["fits"] = variation.plans[place].fits
            found |= {name: f.value for name, f in there.items() if f is not None}
        plans.append(found)
    return {"axes": {axis.name: list(axis.values) for axis in variation.axes}, "plans": plans}
