"""Answers of the command: what it prints, what --json prints, and the page that --out writes.

A plan is ten lines, each about one question. With --all, and on the page, they are the findings of its sections, above
the figures that words.toml names. All sentences are in words.toml, with the rule by which a plan leaves some out.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import write_json, write_text
from dsmini.console.messages import say
from dsmini.planner.figure import Figure, titles
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.here import Steps, steps_here, with_forecast
from dsmini.planner.plan import SECTIONS, Axis, Plan, Variant, labels, plan, read_axis, vary
from dsmini.planner.published import PublishedFigure, published_figures
from dsmini.planner.request import ONE_PROCESS, Setup, is_v3, presets
from dsmini.planner.search import search
from dsmini.planner.serving import STAGES
from dsmini.planner.setup import changed
from dsmini.planner.words import explain, find, named, shown, step_of, text
from dsmini.reading import read_toml
from dsmini.report import Detail, Report, Section, Table, Toned, heat_map
from dsmini.report.figures import plain
from dsmini.report.units import human, in_words, plural

Record = dict[str, Any]
FILES = ("plan.html", "plan.json")
NARROW = 0.05
"""Share of the memory that is left which is worth a warning."""
UNFIT = "! "
"""Mark of a figure whose plan does not fit."""


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


# --- words


@functools.cache
def words() -> dict[str, Any]:
    """Return the sentences of words.toml."""
    return read_toml(Path(__file__).parent / "words.toml")


def section(name: str, values: Mapping[str, Any] | None = None, **parts: Any) -> Section:
    """Return a section with its title, finding and note from words.toml, in which values stand for their names."""
    said = {key: words()[name].get(key, "").format_map(values or {}) for key in ("title", "finding", "about")}
    return Section(name=f"{name}_section", **said | parts)


def heading(plan: Plan) -> str:
    """Return what is planned."""
    return words()["plan"].format(model=plan.setup.model.name, machine=plan.setup.hardware.title)


def lines_of(plan: Plan) -> dict[str, list[tuple[str, str]]]:
    """Return the lines of each section that has any, each with its label."""
    values = _values(plan)

    def said(part: str) -> str:
        try:
            return part.format_map(values)
        except KeyError:  # the plan lacks what the part names
            return ""

    found: dict[str, list[tuple[str, str]]] = {}
    for name in SECTIONS:
        lines = [(label, [said(part) for part in parts]) for label, *parts in words()[name]["lines"]]
        if kept := [(label, "".join(parts)) for label, parts in lines if parts[0]]:
            found[name] = kept
    return found


def _values(plan: Plan) -> dict[str, Any]:
    """Return what sentences name: words, and the figures, of a training that does not fit only its memory."""
    s, made, r = plan.sheet, plan.setup, plan.setup.request
    unfit, one = () if plan.fits else words()["training"]["unfit"], r.gpus == 1
    found: dict[str, Any] = {f.name: f for f in s if plan.fits or f.title.section != "training" or f.name in unfit}
    if s.cache_saving <= 0:
        del found["cache_saving"]
    found |= {f"{stage}_binds": _binds(plan, stage) for stage in plan.waits}
    found |= {"layout": _layout(made), "chosen": made.sources["layout"], "workload": _workload(made)}
    found |= {"whose": "It" if one else "The fullest GPU", "take": "takes" if one else "take"}
    found["by"] = "by the parts of a step" if r.utilization is None else f"as {s.utilization.source} says"
    if made.unserved:
        found["unserved"] = made.unserved
    if not plan.fits:
        del found["training_binds"]
        found["misfit"] = made.misfit["training"]
    return found


def _binds(plan: Plan, stage: str) -> str:
    """Return what binds a step, by how much, and what is next: of training's parts, or of those that overlap."""
    seconds, (first, second, *_) = plan.waits[stage], plan.longest(stage)
    if stage in STAGES:
        gain = human(seconds[first] / seconds[second], "")
        return words()["overlapping"].format(first=first, second=second, gain=gain)
    share, rest = (100 * seconds[part] / sum(seconds.values()) for part in (first, second))
    return words()["in_turn"].format(first=first, second=second, share=share, rest=rest)


def _layout(made: Setup) -> str:
    """Return the choices of a layout that divide something or say how training computes."""
    r: Any = made.request
    worth = {"pipeline": 2, "expert": 2, "tensor": 2, "zero": 1}
    found = [f"{name} {value}" for name, least in worth.items() if (value := getattr(r, name)) >= least]
    found += [f"recompute {r.recompute}"] * (r.recompute != "none")
    return ", ".join([*found, r.precision, r.optimizer, *[r.schedule] * (r.pipeline > 1)])


def _workload(made: Setup) -> str:
    """Return where the workload comes from, and how to choose one in the place of another model's."""
    other = made.sources["tokens"] == presets()["deepseek-v3"]["sources"]["workload"] and not is_v3(made.model.config)
    return made.sources["tokens"] + words()["another_workload"] * other


# --- a plan


def planned(made: Setup, command: str, on_part: OnPart = quiet, *, whole: bool = False) -> Answer:
    """Return the plan in ten lines, or with all tables; of this machine, with forecasts of its steps.

    Raises: ValueError if neither training nor serving fits.
    """
    if made.refused:
        raise ValueError(made.refused)
    found, more, extra = plan(made), list[Section](), Record()
    if made.hardware.name == "this" and (steps := steps_here(found, on_part)):
        more, extra = [here_section(steps)], {"here": {name: row for name, (_, row) in steps.items()}}
        found = plan(with_forecast(found, steps))
    return Answer(
        record=plan_record(found) | extra,
        lines=[heading(found)] if whole else ten_lines(found),
        sections=[*(sections(found, full=False) if whole else ()), *more],
        page=lambda: plan_page(found, command, more),
    )


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
        "binds": {stage: found.longest(stage)[0] for stage in found.waits},
        "figures": {name: figures_record(found.sheet.section(name)) for name in SECTIONS},
    }


def figures_record(figures: Mapping[str, Figure]) -> Record:
    """Return figures by name: value, unit in base units, title and source."""
    return {
        name: {"value": plain(f.value), "unit": f.title.unit, "title": f.title.title, "source": f.source}
        for name, f in figures.items()
    }


def ten_lines(plan: Plan) -> list[str]:
    """Return the plan in about ten lines: the model, what fits, time, cost, what binds, and what to ask next."""
    lines = [line for found in lines_of(plan).values() for line in found]
    lines += [("note", warning) for found in warnings(plan).values() for warning in found]
    return [heading(plan), *(f"{label:9} {line}" for label, line in [*lines, ("next", words()["next"])])]


def warnings(plan: Plan) -> dict[str, list[str]]:
    """Return what a reader of a section must know."""
    s, misfit = plan.sheet, plan.setup.misfit
    narrow = [words()["narrow"].format_map({f.name: f for f in s})]
    return {
        "training": narrow if 0 <= s.memory_free < NARROW * s.gpu_memory else [],
        "inference": [f"{misfit[stage][0].upper()}{misfit[stage][1:]}." for stage in STAGES if stage in misfit],
    }


def sections(plan: Plan, *, full: bool) -> list[Section]:
    """Return the sections of a plan.

    Args:
        full: all figures with their formulas, for a page; else the first ones of each section, for a terminal.
    """
    found: list[Section] = []
    for name, lines in lines_of(plan).items():
        figures = plan.sheet.section(name)
        first = words()[name]["unfit" if name == "training" and not plan.fits else "figures"]
        details = [_detail(figures.pop(key), full) for key in first if key in figures and figures[key].value]
        others = [_detail(figure, full) for figure in figures.values()] if full else []
        parts: dict[str, Any] = {
            "finding": " ".join(f"{label.capitalize()}: {line}" for label, line in lines),
            "details": {"": details} if details else {},
            "folded": {plural(len(others), "other figure"): others} if others else {},
        }
        found.append(section(name, **parts, warnings=warnings(plan).get(name, [])))
    return found


def _detail(figure: Figure, full: bool) -> Detail:
    step = step_of(figure)
    if not full:
        return Detail(name=step.name, title=step.title, value=step.value)
    exact = [step.exact] if step.formula and step.exact != step.value else []
    note = f"Source: {step.source}" if step.source else ""
    lines = [f"= {line}" for line in [*step.lines, *exact]]
    return Detail(name=step.name, title=step.title, value=step.value, lines=lines, note=note, needs=step.needs)


def plan_page(plan: Plan, command: str, more: Sequence[Section]) -> Report:
    """Return the page of a plan; sections of what was asked besides, such as a variation, come first."""
    every = named(plan.figures.values())
    inputs = [_detail(figure, full=True) for figure in every.values() if figure.op == "input"]
    counts = {"inputs": len(inputs), "figures": len(every) - len(inputs)}
    last = section("inputs", counts, folded={plural(len(inputs), "input"): inputs})
    return Report(
        title=heading(plan),
        lead=words()["lead_here" if plan.setup.hardware.name == "this" else "lead"],
        sections=[*more, *sections(plan, full=True), last],
        facts_title="What is planned",
        facts={"Training": {name: str(value) for name, value in plan.setup.request.given().items()}},
        command=command,
    )


def here_section(steps: Steps) -> Section:
    """Return the forecasts of this machine as a section: each step next to its roofs, and what takes longest."""
    columns, rows = ("step", "of", "forecast", "by roofs", "tensors", "process", "longest"), list[tuple[str, ...]]()
    for name, (found, row) in steps.items():
        longest = [
            f"{kind} {100 * seconds / found.seconds:.0f} %" for kind, seconds in list(found.by_class.items())[:3]
        ]
        size = f"{found.shape.batch} x {found.shape.tokens:,} tokens, {found.shape.dtype}"
        amounts = (human(value, "s" if "seconds" in key else "bytes") for key, value in row.items())
        rows.append((name, size, *amounts, ", ".join(longest)))
    first = {"step": rows[0][0].capitalize(), "seconds": rows[0][2], "roof_seconds": rows[0][3]}
    return section("here", first, tables=[Table(columns=columns, rows=rows, numeric=columns[2:6])])


# --- one figure


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
    return Answer(record=figures_record(every), sections=[section("names", {"figures": len(every)}, tables=[table])])


# --- comparisons


def searched(made: Setup, command: str, on_part: OnPart = quiet) -> Answer:
    """Return the layouts that fit, fastest first, and the plan of the fastest on the page.

    Raises: ValueError if no layout fits, with what would fit.
    """
    found = search(made, on_part=on_part)
    best = plan(changed(made, found[0][0].request.given(), made.hardware, "the fastest of all that fit"))
    records = [record for _, record in found]
    rows = [
        (
            *(str(i), human(c["step_seconds"], "s"), c["binds"], human(c["memory"], "B"), f"{c['mfu']:.3f}"),
            words()["search"]["layout"].format(**c),
        )
        for i, c in enumerate(records, 1)
    ]
    columns = ("", "step", "binds", "memory", "MFU", "layout")
    table = Table(columns=columns, rows=rows, numeric=("", "step", "memory", "MFU"))
    first = dict(zip(columns, rows[0], strict=True)) | {"gpus": records[0]["gpus"]}
    more = [section("search", first, tables=[table])]
    page = functools.partial(plan_page, best, command, more)
    return Answer(record={"layouts": records}, lines=[heading(best)], sections=more, page=page)


def varied(made: Setup, texts: Sequence[str], names: Sequence[str], command: str, on_part: OnPart = quiet) -> Answer:
    """Return the plans of all values of one thing, side by side, or of two, as heat maps."""
    axes = [read_axis(text) for text in texts]
    variants, names = vary(made, axes, names, on_part)
    tables = [_side_by_side(variants, axes[0], names)]
    if len(axes) == 2:
        tables = [_heat_map(variants, axes, name) for name in names]
    warnings = [f"{each.at}: {each.problem}" for each in variants if each.problem]
    why = {each.at: each.plan.setup.unserved for each in variants if each.plan is not None}
    unserved = words()["variation"]["unserved"]
    warnings += [unserved.format(at=at, why=why[at]) for at in why if why[at] not in ("", made.unserved)]
    if any(cell.startswith(UNFIT) for table in tables for row in table.rows for cell in row):
        warnings.append(words()["variation"]["unfit"])
    of_what = ", ".join(name for name, _ in axes)
    more = [section("variation", {"axes": of_what}, tables=tables, warnings=warnings)]
    return Answer(
        record=variation_record(axes, variants, names),
        lines=[f"{made.model.name} on {made.hardware.title}"],
        sections=more,
        page=lambda: plan_page(plan(made), command, more),
    )


def _cell(variant: Variant, name: str) -> tuple[str, float | None]:
    """Return a figure of a variant in words, marked if its plan does not fit, and its value; "" where there is none."""
    if variant.plan is None or (figure := variant.figure(name)) is None:
        return "", None
    return UNFIT * variant.plan.unfit(name) + shown(figure), float(figure)


def _side_by_side(variants: Sequence[Variant], axis: Axis, names: Sequence[str]) -> Table:
    """Return a table with a row for each figure and a column for each value that has a plan."""
    found = [each for each in variants if each.plan is not None]
    columns = labels(each.values[axis[0]] for each in found)
    rows = [(titles()[name].title, *(_cell(each, name)[0] for each in found)) for name in names]
    return Table(columns=(axis[0], *columns), rows=rows, numeric=columns)


def _heat_map(variants: Sequence[Variant], axes: Sequence[Axis], name: str) -> Table:
    """Return a figure as a heat map: the values of the first axis are rows, those of the second columns."""
    (y, rows), (x, columns) = axes
    cells = iter(_cell(each, name) for each in variants)
    grid = {label: [next(cells) for _ in columns] for label in labels(rows)}
    return heat_map(titles()[name].title, f"{y} \\ {x}", labels(columns), grid)


def variation_record(axes: Sequence[Axis], variants: Sequence[Variant], names: Sequence[str]) -> Record:
    """Return a variation: the axes, and for each variant its figures or why there are none."""
    plans: list[Record] = []
    for each in variants:
        found: Record = {**each.values, "problem": each.problem or None}
        if each.plan is not None:
            found["fits"] = each.plan.fits
            found |= {name: f.value for name in names if (f := each.figure(name)) is not None}
        plans.append(found)
    return {"axes": {name: list(values) for name, values in axes}, "plans": plans}


def published() -> Answer:
    """Return the published figures next to ours; with sources and notes on a page, which a terminal has no room for."""
    figures = published_figures()
    statuses = [figure.status for figure in figures]
    counts = {"all": len(figures), **{status: statuses.count(status) for status in statuses}}
    columns = ("figure", "published", "ours", "error, %", "within", "verdict")
    rows = [_published_row(f) for f in figures]
    there = [(*row, f.source, f.note) for row, f in zip(rows, figures, strict=True)]
    numeric = columns[1:5]
    here = section("published", counts, tables=[Table(columns=columns, rows=rows, numeric=numeric)])
    wide = Table(columns=(*columns, "source", "note"), rows=there, numeric=numeric)
    return Answer(
        record=[figure.record for figure in figures],
        sections=[here],
        page=lambda: Report(title="Published figures, and ours", sections=[replace(here, tables=[wide])]),
    )


def _published_row(f: PublishedFigure) -> tuple[str, ...]:
    """Return the figure in words. Ours has no unit where it is the same, nor "a token", which the name says."""
    printed, ours = (
        in_words(value, True) if not f.unit and value >= 1e6 else human(value, f.unit.partition("/")[0], given=True)
        for value in (f.printed, float(f"{f.ours:.4g}"))
    )
    unit = printed.partition(" ")[2]
    return (
        *(
            f.what,
            printed,
            ours.removesuffix(f" {unit}"),
            f"{100 * f.residual:+.2f}",
            f"{100 * f.within:.2g}",
            Toned(f.status, f.status),
        ),
    )
