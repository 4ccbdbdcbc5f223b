"""Answers of the command: what it prints, what --json prints, and the page that --out writes."""

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import write_json, write_text
from dsmini.console.messages import say
from dsmini.planner import record
from dsmini.planner.here import record_here, section_here, steps_here, with_forecast
from dsmini.planner.model.references import is_v3
from dsmini.planner.pages.comparison import search_section, variation_section
from dsmini.planner.pages.coverage import coverage
from dsmini.planner.pages.page import facts, plan_report
from dsmini.planner.published.published import published_figures
from dsmini.planner.quantities.explanation import explain, find, named, shown, text
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import V3_SOURCE, Setup
from dsmini.planner.training.search import allowed_choices, search
from dsmini.planner.varied_axis import read_axis
from dsmini.planner.vary import vary
from dsmini.planner.whole import Plan, whole_plan
from dsmini.report import Report, Section, Table

OnPart = Callable[[float, str], None]
HINT = "Ask for any figure that has a name: --explain kv_cache. All names: --explain list. A page: --out plan"


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """PlanAnswer to one question."""

    record: Any
    """PlanAnswer as JSON."""
    lines: Sequence[str] = ()
    """Lines to print before the report."""
    report: Report | None = None
    """What a terminal shows."""
    page: Callable[[], Report] | None = None
    """What a page shows; made on demand, since its formulas and plots take longer than a plan."""
    hint: str = ""

    def show(self, console: Console) -> None:
        """Print the answer."""
        for line in self.lines:
            say(console, line)
        if self.report is not None:
            self.report.show(console)
        if self.hint:
            say(console)
            say(console, self.hint, style="dim")

    def write(self, folder: Path) -> list[Path]:
        """Write plan.html and plan.json into a folder, which is made if it is not there; return their paths.

        Raises: ValueError for a folder that cannot be written.
        """
        made = self.page or (lambda: self.report)
        report = made()
        assert report is not None, "an answer without a report has no page"
        paths = [folder / "plan.html", folder / "plan.json"]
        try:
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(paths[0], report.html())
            write_json(paths[1], self.record)
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from None
        return paths


def planned(setup: Setup, command: str, on_part: OnPart = lambda done, what: None) -> PlanAnswer:
    """Return the whole plan; of this machine, with forecasts of its steps.

    Raises: ValueError for what does not fit, if it was asked for or if nothing fits.
    """
    if setup.refused:
        raise ValueError(setup.refused)
    plan = whole_plan(setup)
    found = record.plan_record(plan)
    start = time.perf_counter()
    if setup.hardware.name != "this" or not (steps := steps_here(plan, on_part)):
        return _answer(plan, found, (), command, hint=HINT)
    hint = f"The forecasts took {time.perf_counter() - start:.1f} s to count, and have no formula. {HINT}"
    plan = whole_plan(with_forecast(plan, steps))
    found, more = record.plan_record(plan), [section_here(steps)]
    sections = plan_report(plan, full=False, more=more).sections
    return _answer(plan, found | {"here": record_here(steps)}, sections, command, on_page=more, hint=hint)


def searched(setup: Setup, request: PlanRequest, command: str, on_part: OnPart) -> PlanAnswer:
    """Return the layouts that fit, fastest first, and the plan of the fastest on the page."""
    s, layout = setup, setup.layout.layout
    choices = allowed_choices(layout, request.layout_fields)
    cluster = (s.m, s.hardware, s.workload, layout.gpus)
    found = search(*cluster, choices=choices, assumptions=s.assumptions, on_part=on_part)
    shown_there, on_page = (search_section(found, full=full) for full in (False, True))
    plan = whole_plan(setup.with_layout(found[0].layout, "the fastest of all that fit"))
    return _answer(plan, {"layouts": record.search_record(found)}, (shown_there,), command, on_page=(on_page,))


def varied(
    setup: Setup, request: PlanRequest, axes: Sequence[str], names: Sequence[str], command: str, on_part: OnPart
) -> PlanAnswer:
    """Return the plans of all values of one thing or of two."""
    found = vary(setup, request, [read_axis(axis) for axis in axes], names, on_part)
    shown_there, on_page = (variation_section(found, full=full) for full in (False, True))
    return _answer(whole_plan(setup), record.variation_record(found), (shown_there,), command, on_page=(on_page,))


def published() -> PlanAnswer:
    """Return the published figures next to ours."""
    figures = published_figures()
    report = Report(title="Published figures, and ours", sections=[coverage(figures, full=False)])
    return PlanAnswer(record=record.published_record(figures), report=report)


def explained(setup: Setup, name: str, width: int) -> PlanAnswer:
    """Return the explanation of a figure, or all names for "list".

    Raises: ValueError for an unknown figure, with the nearest known ones.
    """
    figures = whole_plan(setup).all
    if name != "list":
        found = explain(find(figures.values(), name))
        return PlanAnswer(record=record.explanation_record(found), lines=[text(found, width).rstrip()])
    every = named(figures.values())
    rows = [(key, shown(figure), figure.title) for key, figure in every.items()]
    table = Table(columns=("name", "value", "figure"), rows=rows, numeric=("value",))
    section = Section(name="names", title="Figures", finding=f"{len(every)} figures and inputs.", tables=[table])
    return PlanAnswer(record=record.figures_record(every), report=Report(title="Figures", sections=[section]))


def _answer(
    plan: Plan,
    found: Any,
    more: Sequence[Section],
    command: str,
    *,
    on_page: Sequence[Section] | None = None,
    hint: str = "",
) -> PlanAnswer:
    """Return an answer that prints the plan, or only the sections that were asked for, and a page with both.

    Args:
        more: sections that were asked for.
        on_page: the same as a page shows them, if it does so in another way.
    """
    sections = more or plan_report(plan, full=False).sections
    return PlanAnswer(
        record=found,
        lines=_heading(plan),
        report=Report(title="", sections=sections),
        page=lambda: plan_report(plan, full=True, more=on_page or more, command=command),
        hint=hint,
    )


def _heading(plan: Plan) -> list[str]:
    """Return what is planned in a few lines."""
    cards = facts(plan)
    lines = [f"{plan.setup.model.name} on {plan.setup.hardware.title}"]
    layout = plan.training.layout
    sizes = ", ".join(
        f"{name} {getattr(layout, name)}"
        for name in ("gpus", "pipeline", "expert", "tensor", "zero", "recompute", "precision", "schedule")
    )
    lines.append(f"training  {sizes}; {plan.setup.layout.how}")
    work = plan.training.workload
    how = work.tokens.source
    if V3_SOURCE in how and not is_v3(plan.setup.m):
        how += "; choose --tokens, --batch and --seq-len"
    lines.append(f"workload  {shown(work.tokens)}, {work.batch.value:,.0f} x {shown(work.seq_len)} a step; {how}")
    if "Serving" in cards:
        serving = cards["Serving"]
        lines.append(f"serving   decode on {serving['decode']}; prefill on {serving['prefill']}")
    return lines
