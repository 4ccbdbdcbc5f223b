"""Answers of the command: what it prints, what --json prints, and the page that --out writes.

A plan is ten lines, each about one question. With --all, and on the page, they are the findings of its sections, above
the figures that words.toml names. A figure that a plan lacks, such as the cost on hardware without a price, is left out
of lines, tables and sentences.
"""

import errno
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import try_writing, write_json, write_text
from dsmini.console.messages import say
from dsmini.planner.figure import Figure
from dsmini.planner.hardware import OnPart, quiet
from dsmini.planner.here import steps_here, with_forecast
from dsmini.planner.plan import SECTIONS, Plan, Variation, plan, read_axis, vary
from dsmini.planner.published import PublishedFigure, Status, published_figures
from dsmini.planner.request import ONE_PROCESS, Setup, is_v3, presets
from dsmini.planner.search import search
from dsmini.planner.setup import changed
from dsmini.planner.words import explain, find, in_unit, in_words, named, shown, step_of, text
from dsmini.reading import read_toml
from dsmini.report import Detail, Report, Section, Table
from dsmini.report.figures import plain
from dsmini.report.units import human, plural

Record = dict[str, Any]
FILES = ("plan.html", "plan.json")
LEAD = "Predicted from sizes and data sheets. Nothing was measured. Each number opens its formula."
LEAD_HERE = "Predicted from sizes, and from rates that were measured on this machine. Each number opens its formula."
NEXT = "--explain kv_cache (or list), --all for the tables, --out plan for a page, --search, --vary context=4096,32768"
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
        "binds": {stage: binding.first for stage, binding in found.binds.items()},
        "figures": {section: figures_record(found.sheet.section(section)) for section in SECTIONS},
    }


def figures_record(figures: Mapping[str, Figure]) -> Record:
    """Return figures by name: value, unit in base units, title and source."""
    return {
        name: {"value": plain(f.value), "unit": f.title.unit, "title": f.title.title, "source": f.source}
        for name, f in figures.items()
    }


def heading(plan: Plan) -> str:
    """Return what is planned."""
    return f"{plan.setup.model.name} on {plan.setup.hardware.title}"


def ten_lines(plan: Plan) -> list[str]:
    """Return the plan in about ten lines: the model, what fits, time, cost, what binds, and what to ask next."""
    lines = [line for section in lines_of(plan).values() for line in section]
    lines += [*(("note", warning) for warning in warnings(plan)), ("next", NEXT)]
    return [heading(plan), *(f"{label:9} {line}" for label, line in lines)]


def lines_of(plan: Plan) -> dict[str, list[tuple[str, str]]]:
    """Return the lines of each section, each with its label."""
    s, made, r = plan.sheet, plan.setup, plan.setup.request
    saving = f", {s.cache_saving:%} less than multi-head attention" if s.cache_saving > 0 else ""
    model = (
        f"{s.parameters_main:words} parameters, of which a token uses {s.parameters_active:words}: {s.training_flops} "
        f"in training. A token's cache takes {s.kv_cache:amount}{saving}."
    )
    found = {"model": [("model", model)], "training": [("training", _layout(plan)), ("time", _time(plan))]}
    if plan.fits:
        found["training"].append(("binds", plan.binds["training"].words))
        failures = (
            f"A failure every {s.mean_time_to_failure}: {s.effective_share:%} of the time is training, with a "
            f"checkpoint every {s.checkpoint_interval}. The whole run takes {s.elapsed_time}."
        )
        found["reliability"] = [("failures", failures)]
    if not made.served:
        return found | {"inference": [("serving", f"not planned: {made.unserved}")]}
    gain = s.get("speculation_gain")
    drafts = "" if gain is None else f"; {plural(r.drafts, 'draft')} a step: {float(gain):.3g} times"
    decode = (
        f"{plural(r.decode_gpus or 1, 'GPU')}, {made.sources['decode']}. {s.decode_sequences:,.0f} sequences of "
        f"{s.context} a GPU take {s.decode_gpu_memory} of {s.gpu_memory}: {s.decode_tokens_per_second} each, "
        f"{s.decode_gpu_tokens_per_second} a GPU{_if_there(', ', s.get('decode_cost'))}{drafts}."
    )
    prefill = (
        f"{plural(r.prefill_gpus or 1, 'GPU')}, {made.sources['prefill']}. The first token of {s.prompt} comes after "
        f"{s.prefill_time_to_first_token}; {s.prefill_gpu_tokens_per_second} of prompts a GPU"
        f"{_if_there(', ', s.get('prefill_cost'))}."
    )
    binds = {stage: ("binds", plan.binds[stage].words) for stage in ("decode", "prefill")}
    found["inference"] = [("decode", decode), binds["decode"], ("prefill", prefill), binds["prefill"]]
    return found


def _if_there(before: str, figure: Figure | None) -> str:
    return "" if figure is None else f"{before}{figure}"


def _layout(plan: Plan) -> str:
    """Return the layout, the workload, and where both come from."""
    r, s, sources = plan.setup.request, plan.sheet, plan.setup.sources
    worth = {"pipeline": 2, "expert": 2, "tensor": 2, "zero": 1}
    options = [f"{name} {value}" for name, least in worth.items() if (value := getattr(r, name)) >= least]
    options += [f"recompute {r.recompute}"] * (r.recompute != "none")
    options += [str(r.precision), str(r.optimizer), *([str(r.schedule)] if s.pipeline > 1 else [])]
    work = sources["tokens"]
    if work == presets()["deepseek-v3"]["sources"]["workload"] and not is_v3(plan.setup.model.config):
        work += "; choose --tokens, --batch and --seq-len"
    steps = f"steps of {s.batch:,.0f} x {s.seq_len}, {work}"
    return f"{plural(r.gpus or 1, 'GPU')} ({', '.join(options)}), {sources['layout']}; {steps}"


def _time(plan: Plan) -> str:
    s, gpus = plan.sheet, plan.setup.request.gpus or 1
    needs = f"{'It' if gpus == 1 else 'The fullest GPU'} needs {s.memory_needed} of {s.gpu_memory}."
    if not plan.fits:
        return f"It does not fit: {plan.setup.misfit['training']}. {needs}"
    by = "by the parts of a step"
    if plan.setup.request.utilization is not None:
        by = f"as {s.utilization.source} says"
    cost = _if_there(" and ", s.get("training_cost"))
    who = f"{plural(gpus, 'GPU')} take{'s' * (gpus == 1)}"
    return f"{who} {s.training_time}{cost} for {s.tokens:words} tokens, at an MFU of {float(s.mfu):.3g} {by}. {needs}"


def warnings(plan: Plan, section: str = "") -> Iterator[str]:
    """Yield what a reader must know, of one section or of all."""
    s = plan.sheet
    if plan.fits and section in ("", "training") and s.memory_free < NARROW * s.gpu_memory:
        yield f"Memory is a lower bound, and only {s.memory_free} of {s.gpu_memory} are left."
    if section in ("", "inference"):
        said = (plan.setup.misfit.get(stage) for stage in ("decode", "prefill"))
        yield from (f"{sentence[0].upper()}{sentence[1:]}." for sentence in said if sentence)


@functools.cache
def words() -> dict[str, Any]:
    """Return the questions of sections, and the figures that they show first."""
    return read_toml(Path(__file__).parent / "words.toml")


def sections(plan: Plan, *, full: bool) -> list[Section]:
    """Return the sections of a plan.

    Args:
        full: all figures with their formulas, for a page; else the first ones of each section, for a terminal.
    """
    found: list[Section] = []
    for name, lines in lines_of(plan).items():
        figures, question = plan.sheet.section(name), words()["questions"][name]
        first = words()["headlines"]["unfit" if name == "training" and not plan.fits else name]
        details = [_detail(figures.pop(key), full) for key in first if key in figures and figures[key].value]
        others = [_detail(figure, full) for figure in figures.values()] if full else []
        section = Section(
            name=f"{name}_section",
            title=question,
            finding=" ".join(f"{label.capitalize()}: {line}" for label, line in lines),
            details={"" if full else question: details} if details else {},
            folded={plural(len(others), "other figure"): others} if others else {},
            warnings=list(warnings(plan, name)),
        )
        found.append(section)
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
    """Return the page of a plan, with more sections, such as a search or a variation."""
    every = named(plan.figures.values())
    inputs = [_detail(figure, full=True) for figure in every.values() if figure.op == "input"]
    last = Section(
        name="inputs_section",
        title="What is it computed from?",
        finding=f"{len(inputs)} inputs, each with its source, give {len(every) - len(inputs)} figures.",
        folded={plural(len(inputs), "input"): inputs},
    )
    return Report(
        title=heading(plan),
        lead=LEAD_HERE if plan.setup.hardware.name == "this" else LEAD,
        sections=[*sections(plan, full=True), *more, last],
        facts_title="What is planned",
        facts={"Training": {name: str(value) for name, value in plan.setup.request.given().items()}},
        command=command,
    )


def here_section(steps: Mapping[str, tuple[Any, Mapping[str, float]]]) -> Section:
    """Return the forecasts of this machine as a section: each step next to its roofs, and what takes longest."""
    columns, rows = ("step", "of", "forecast", "by roofs", "tensors", "process", "longest"), list[tuple[str, ...]]()
    for name, (found, row) in steps.items():
        longest = [f"{kind} {seconds / found.seconds:.0%}" for kind, seconds in list(found.by_class.items())[:3]]
        size = f"{found.shape.batch} x {found.shape.tokens:,} tokens, {found.shape.dtype}"
        amounts = (human(value, "s" if "seconds" in key else "bytes") for key, value in row.items())
        rows.append((name, size, *amounts, ", ".join(longest)))
    return Section(
        name="here_section",
        title="What will this machine take?",
        finding=f"{rows[0][0].capitalize()}: {rows[0][2]}; by roofs alone {rows[0][3]}.",
        tables=[Table(columns=columns, rows=rows, numeric=columns[2:6])],
        about=(
            "Forecast from the operations that the step would run here, at rates of this machine that were measured "
            "on other models; nothing of this model has run. Memory is at the peak of a step. "
            "python -m benchmarks plan compares such forecasts with what is then measured."
        ),
    )


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
    section = Section(name="names", title="Figures", finding=f"{len(every)} figures and inputs.", tables=[table])
    return Answer(record=figures_record(every), sections=[section])


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
            *(str(i), in_unit(c["step_seconds"], "s"), c["binds"], in_unit(c["memory"], "B"), f"{c['mfu']:.3f}"),
            f"pipeline {c['pipeline']}, expert {c['expert']}, tensor {c['tensor']}, zero {c['zero']}, micro-batch "
            f"{c['micro_batch']}, {c['schedule']}, {c['recompute']}, {c['precision']}",
        )
        for i, c in enumerate(records, 1)
    ]
    _, step, binds, memory, *_ = rows[0]
    columns = ("", "step", "binds", "memory", "MFU", "layout")
    section = Section(
        name="search_section",
        title=f"Which layouts fit {records[0]['gpus']:,} GPUs?",
        finding=f"The fastest takes {step} a step with {memory} on the fullest GPU. What binds: {binds}.",
        tables=[Table(columns=columns, rows=rows, numeric=("", "step", "memory", "MFU"))],
        about="One layout for each sizes of parallelism, with its fastest choices that fit. Memory is a lower bound.",
    )
    return Answer(
        record={"layouts": records},
        lines=[heading(best)],
        sections=[section],
        page=lambda: plan_page(best, command, [section]),
    )


def varied(made: Setup, axes: Sequence[str], names: Sequence[str], command: str, on_part: OnPart = quiet) -> Answer:
    """Return the plans of all values of one thing or of two: for each figure a line for each plan."""
    found, rows = vary(made, [read_axis(axis) for axis in axes], names, on_part), list[tuple[str, str, str]]()
    for name in found.names:
        for i, (place, figure) in enumerate(found.found(name).items()):
            value = UNFIT * found.plans[place].unfit(name) + shown(figure)
            of = ", ".join(axis.labels[j] for axis, j in zip(found.axes, place, strict=True))
            rows.append(("" if i else figure.title.title, of, value))
    unfit, of_what = any(value.startswith(UNFIT) for _, _, value in rows), ", ".join(axis.name for axis in found.axes)
    section = Section(
        name="variation_section",
        title=f"What changes with {of_what}?",
        finding="All else is as in the plan: layout and deployments stay; sequences follow the context.",
        tables=[Table(columns=("figure", of_what, "value"), rows=rows, numeric=("value",))],
        warnings=[
            *(f"{found.at(place)}: {reason}" for place, reason in found.problems.items()),
            *[f"{UNFIT.strip()} does not fit into the memory of a GPU"] * unfit,
        ],
    )
    return Answer(
        record=variation_record(found),
        lines=[f"{made.model.name} on {made.hardware.title}"],
        sections=[section],
        page=lambda: plan_page(plan(made), command, [section]),
    )


def variation_record(variation: Variation) -> Record:
    """Return a variation: the axes, and for each place its figures or why there are none."""
    plans: list[Record] = []
    for place in sorted({*variation.plans, *variation.problems}):
        found = {axis.name: axis.values[i] for axis, i in zip(variation.axes, place, strict=True)}
        found["problem"] = variation.problems.get(place)
        if place in variation.plans:
            found["fits"] = variation.plans[place].fits
            found |= {name: f.value for name in variation.names if (f := variation.found(name).get(place)) is not None}
        plans.append(found)
    return {"axes": {axis.name: list(axis.values) for axis in variation.axes}, "plans": plans}


def published() -> Answer:
    """Return the published figures next to ours."""
    figures = published_figures()
    here, on_page = (_published_section(figures, full=full) for full in (False, True))
    return Answer(
        record=[figure.record for figure in figures],
        sections=[here],
        page=lambda: Report(title="Published figures, and ours", sections=[on_page]),
    )


def _published_section(figures: Sequence[PublishedFigure], *, full: bool) -> Section:
    """Return the published figures; with sources and notes on a page, which a terminal has no room for."""
    of: dict[Status, int] = {f.status: sum(other.status == f.status for other in figures) for f in figures}
    columns = ("figure", "published", "ours", "error, %", "within", "verdict")
    rows = [(*_published_row(f), *((f.source, f.note) if full else ())) for f in figures]
    return Section(
        name="published_section",
        title="How far can it be trusted?",
        finding=(
            f"{len(figures)} published figures: {of['reproduced']} are reproduced from sizes of models and machines, "
            f"{of['follows']} follow from other printed figures, {of['fitted']} are fitted by one constant, "
            f"{of['missed']} are missed, and {of['misprint']} contradict their own source."
        ),
        tables=[Table(columns=(*columns, "source", "note") if full else columns, rows=rows, numeric=columns[1:5])],
        about=(
            "Errors are of unrounded values, next to the error to hold: half a unit of the last printed digit, where "
            "no note says otherwise. bf16_efficiency and fp8_efficiency are constants from printed runs; no others are."
        ),
    )


def _published_row(f: PublishedFigure) -> tuple[str, ...]:
    printed, ours = (
        in_words(value, True) if not f.unit and value >= 1e6 else in_unit(value, f.unit, given=True)
        for value in (f.printed, float(f"{f.ours:.4g}"))
    )
    return f.what, printed, ours, f"{100 * f.residual:+.2f}", f"{100 * f.within:.2g}", f.status
