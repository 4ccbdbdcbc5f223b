"""Answers of the command: what it prints, what --json prints, and the page that --out writes.

A plan is about ten lines, each with one question. With --all, and on the page, they stand above the figures of their
section. The sentences are here, each next to the figures that it names.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import write_json, write_text
from dsmini.config.fields import require
from dsmini.console.messages import say
from dsmini.planner.figure import Figures, explain, needed, step_of, text
from dsmini.planner.hardware import OnPart, load_hardware, quiet
from dsmini.planner.layout import Layout
from dsmini.planner.plan import (
    WORKLOAD,
    Axis,
    Plan,
    Variant,
    changed,
    compared,
    labels,
    make_plan,
    read_axis,
    side_by_side,
    vary,
)
from dsmini.planner.published import Published, published_figures
from dsmini.planner.request import LAYOUT, SERVING, Model, PlanRequest, is_v3, presets
from dsmini.planner.run import Run
from dsmini.planner.search import EVERY, Search, alone_options, candidates
from dsmini.planner.serving import STAGES, Served
from dsmini.report import Detail, Report, Section, Table, Toned, heat_map
from dsmini.report.figures import plain
from dsmini.report.units import DAY, human, in_words, plural

Record = dict[str, Any]
FILES = ("plan.html", "plan.json")
MAIN = ("model", "time", "failures", "decode", "serving")
"""Lines that are the finding of their section; the others are said once, below it."""
NARROW = 0.05
"""Share of the memory that is left which is worth a warning."""
UNFIT = "! "
"""Mark of a figure whose plan does not fit."""
TITLES = {
    "model": "What is the model?",
    "training": "What does training take?",
    "reliability": "What do failures cost?",
    "inference": "What does serving take?",
}
FIRST: dict[str, tuple[str, ...]] = {
    "model": (
        *("parameters_main", "mtp_parameters", "parameters_active", "training_flops", "kv_cache", "mha_kv_cache"),
        *("cache_saving", "model_bytes"),
    ),
    "training": (
        *("memory_needed", "memory_free", "state_parameter", "step_seconds", "computing_seconds"),
        *("dispatching_seconds", "reducing_seconds", "bubble_seconds", "exchange_seconds", "update_seconds", "mfu"),
        *("dispatch_seconds", "slow_row_bytes", "nodes_reached", "training_tokens_per_second", "training_gpu_hours"),
        *("training_time", "training_cost"),
    ),
    "reliability": ("mean_time_to_failure", "checkpoint_interval", "effective_share", "elapsed_time", "elapsed_cost"),
    "inference": (
        *("decode_gpu_weights", "decode_gpu_cache", "decode_gpu_memory", "decode_sequences"),
        *("decode_sequences_that_fit", "decode_longest_context", "decode_time_per_token", "decode_tokens_per_second"),
        *("decode_gpu_tokens_per_second", "decode_memory_time", "decode_slow_link_time", "speculation_gain"),
        *("decode_cost", "prefill_time_to_first_token", "prefill_gpu_tokens_per_second", "prefill_cost"),
    ),
}
"""Figures that a terminal shows of each section, and a page first."""


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


# --- sentences

Lines = list[tuple[str, str]]
"""Sentences, each after the label of what it is about."""


def heading(plan: Plan) -> str:
    """Return what is planned."""
    return f"{plan.model.name} on {plan.hardware.title}"


def lines_of(plan: Plan) -> dict[str, Lines]:
    """Return the lines of each section that has any."""
    found = {
        "model": _model(plan),
        "training": _training(plan),
        "reliability": _failures(plan) if plan.failures else [],
        "inference": _serving(plan, plan.served) if plan.served else [("serving", f"not planned: {plan.unserved}.")],
    }
    return {name: lines for name, lines in found.items() if lines}


def _model(plan: Plan) -> Lines:
    f = plan.figures
    said = f"{in_words(f['parameters_main'])} parameters"
    if f["mtp_parameters"]:
        said += f" ({in_words(f['parameters_total'])} with multi-token prediction)"
    said += f", of which a token uses {in_words(f['parameters_active'])}: {f['training_flops']} in training. "
    said += f"A token's cache takes {human(f['kv_cache'], 'B')}"
    saved = f["cache_saving"]
    return [("model", said + (f", {100 * saved:.3g} % less than multi-head attention." if saved > 0 else "."))]


def _training(plan: Plan) -> Lines:
    r, f, how, layout = plan.request, plan.figures, plan.sources, plan.training.layout
    gpus, workload = plural(layout.gpus, "GPU"), how["tokens"]
    if workload == WORKLOAD and not is_v3(plan.model.config):
        workload += "; choose --tokens, --batch and --seq-len"
    lines = [
        ("training", f"{gpus} ({_layout(layout)}), {how['layout']}."),
        ("steps", f"{r.batch:,} sequences of {r.seq_len:,} tokens, {workload}."),
    ]
    if precision := _precision(plan):
        lines.append(("precision", precision))
    one = layout.gpus == 1
    fullest = f"{'It' if one else 'The fullest GPU'} needs {f['memory_needed']} of {_memory(plan)}."
    if not plan.fits:
        return [*lines, ("time", f"It does not fit: {plan.chosen.misfit}. {fullest}")]
    cost = f" and {f['training_cost']}" if "training_cost" in f else ""
    by = "by the parts of a step" if r.utilization is None else f"as {how['utilization']} says"
    said = f"{gpus} {'takes' if one else 'take'} {f['training_time']}{cost} for {in_words(plan.run.tokens)} tokens, "
    said += f"at an MFU of {f['mfu']:.3g} {by}. {fullest}"
    if plan.hardware.price is None and plan.hardware.networked:
        said += " No price of this hardware is published; --price 2, in dollars an hour, adds the cost."
    seconds, (first, second, *_) = plan.waits["training"], plan.longest("training")
    share, rest = (100 * seconds[part] / sum(seconds.values()) for part in (first, second))
    slowest = f"{first}, {share:.0f} % of a step; next: {second}, {rest:.0f} %."
    return [*lines, ("time", said), ("slowest", slowest)]


def _memory(plan: Plan) -> str:
    return human(plan.hardware.memory, "B")


def _precision(plan: Plan) -> str:
    """Return why training is in BF16 where FP8 could be had, and what FP8 gains; "" elsewhere."""
    open_ = plan.asked.precision is None and plan.request.precision == "bf16"
    able = "fp8" in plan.hardware.peaks and plan.fits and plan.request.utilization is None
    if not open_ or not able or plan.run.training_time < DAY:
        return ""
    said, time = (
        "BF16, since the config does not ask for FP8; with --precision fp8 this layout",
        plan.in_precision("fp8"),
    )
    if time is None:
        return f"{said} does not fit."
    return f"{said} takes {human(time, 's')} in place of {plan.figures['training_time']}."


def _layout(r: Layout) -> str:
    """Return the choices of a layout that divide something or say how training computes."""
    worth = {"pipeline": 2, "expert": 2, "tensor": 2, "zero": 1}
    found = [f"{name} {value}" for name, least in worth.items() if (value := getattr(r, name)) >= least]
    found += [f"recompute {r.recompute}"] if r.recompute != "none" else []
    found += [r.precision, r.optimizer]
    return ", ".join([*found, r.schedule] if r.pipeline > 1 else found)


def _failures(plan: Plan) -> Lines:
    f = plan.figures
    said = f"A failure every {f['mean_time_to_failure']}: {100 * f['effective_share']:.3g} % of the time is training, "
    said += f"with a checkpoint every {f['checkpoint_interval']}. The whole run takes {f['elapsed_time']}."
    return [("failures", said)]


def _serving(plan: Plan, served: Served) -> Lines:
    f, w, memory = plan.figures, served.w, _memory(plan)
    gpus = {d.stage: f"{plural(d.gpus, 'GPU')}, {plan.sources[d.stage]}." for d in (served.decode.d, served.prefill.d)}
    costs = {stage: f", at least {cost}." if (cost := f.get(f"{stage}_cost")) else "." for stage in STAGES}
    decode = f"{gpus['decode']} {f['decode_sequences']} sequences of {in_words(w.context)} tokens a GPU take "
    decode += f"{f['decode_gpu_memory']} of {memory}: at most {f['decode_tokens_per_second']} each and "
    decode += f"{f['decode_gpu_tokens_per_second']} a GPU{costs['decode']}"
    prompts = served.prefill.d.gpus // served.prefill.d.tensor
    prefill = f"{gpus['prefill']} Reading {in_words(w.prompt)} tokens takes at least {f['prefill_time_to_first_token']}"
    prefill += f" ({prompts} prompts at a time)" if prompts > 1 else ""
    prefill += f", with {f['prefill_gpu_memory']} of {memory}; at most "
    prefill += f"{f['prefill_gpu_tokens_per_second']} of prompts a GPU{costs['prefill']}"
    lines = [("decode", decode)]
    if served.drafts is not None:
        lines.append(("drafts", _drafts(plan)))
    lines += [("slowest", _overlapping(plan, "decode")), ("prefill", prefill)]
    lines.append(("slowest", _overlapping(plan, "prefill")))
    if plan.published and plan.hardware.name == "h800":
        printed = presets()["deepseek-v3"]["printed"]
        said = f"DeepSeek measured {printed['decode']} and {printed['prefill']} ({printed['source']})."
        lines.append(("measured", said))
    return lines


def _drafts(plan: Plan) -> str:
    r, gain = plan.request, plan.figures["speculation_gain"]
    said = f"If multi-token prediction drafts {plural(r.drafts, 'token')} a step and {100 * r.acceptance:.3g} % are "
    said += f"accepted, decoding is at most {gain} times as fast"
    return said + ("." if gain > 1 else ", so drafts do not pay.")


def _overlapping(plan: Plan, stage: str) -> str:
    """Return what a step waits for that overlaps, and what is next."""
    seconds, parts = plan.waits[stage], plan.longest(stage)
    if len(parts) == 1:
        return f"{parts[0]}."
    first, second, *_ = parts
    gain = human(seconds[first] / seconds[second], "")
    return f"{first}. If it took no time a step would be {gain} times as fast, and {second} would be slowest."


def ten_lines(plan: Plan) -> list[str]:
    """Return the plan in a few lines: the model, what fits, time, cost, what is slowest, and what to ask next."""
    lines = [line for found in lines_of(plan).values() for line in found]
    lines += [("note", warning) for found in warnings(plan).values() for warning in found]
    asks = "--explain kv_cache (or list), --all for the tables, --out plan for a page, --search, "
    lines.append(("next", f"{asks}--vary hardware=h100,b200, --compare kimi-k2"))
    return [heading(plan), *(f"{label:10} {said}" for label, said in lines)]


def warnings(plan: Plan) -> dict[str, list[str]]:
    """Return what a reader of a section must know."""
    free = plan.training.memory_free
    narrow = [f"Memory is a lower bound, and only {human(free, 'B')} of {_memory(plan)} are left."]
    misfit = [plan.misfit[stage] for stage in STAGES if stage in plan.misfit]
    return {
        "training": narrow if 0 <= free < NARROW * plan.hardware.memory else [],
        "inference": [f"{sentence[0].upper()}{sentence[1:]}." for sentence in misfit],
    }


# --- a plan


def planned(plan: Plan, command: str, *, whole: bool = False) -> Answer:
    """Return the plan in ten lines, or with all tables. Raises: ValueError if neither training nor serving fits."""
    require(not plan.refused, plan.refused)
    return Answer(
        record=plan_record(plan),
        lines=ten_lines(plan),
        sections=sections(plan) if whole else [],
        page=lambda: plan_page(plan, command, []),
    )


def plan_record(plan: Plan) -> Record:
    """Return a plan: its layout, work and deployments, what is slowest, and its figures and inputs by section."""
    served = plan.served
    return {
        "config": plan.model.source,
        "hardware": plan.hardware.name,
        "layout": plan.request.given(LAYOUT) | {"chosen": plan.sources["layout"]},
        "work": plan.request.given(("batch", "seq_len", "tokens")),
        "serving": plan.request.given((*SERVING, "drafts", "acceptance")) if served else {},
        "deployments": {d.stage: asdict(d) for d in (served.decode.d, served.prefill.d)} if served else {},
        "fits": plan.fits,
        "misfit": plan.misfit,
        "unserved": plan.unserved,
        "warnings": warnings(plan),
        "binds": {stage: plan.longest(stage)[0] for stage in plan.waits},
        "figures": {name: figures_record(figures) for name, figures in plan.sections.items()},
    }


def figures_record(figures: Figures) -> Record:
    """Return figures by name: value, unit in base units, title and source."""
    return {name: plain(figure.record) for name, figure in figures.items()}


def sections(plan: Plan) -> list[Section]:
    """Return the sections of a plan: a terminal shows the first figures, a page all of them with their formulas."""
    found: list[Section] = []
    for name, lines in lines_of(plan).items():
        first = FIRST[name][: None if name != "training" or plan.fits else 3]  # of what does not fit, only the memory
        shown = [key for key in first if plan.sections[name].get(key)]
        others = [key for key in plan.computed[name] if key not in shown]
        main = next(said for label, said in lines if label in MAIN)
        section = Section(
            name=f"{name}_section",
            title=TITLES[name],
            finding=main,
            about=" ".join(f"{label.capitalize()}: {said}" for label, said in lines if said != main),
            details={"": _details(plan, shown)} if shown else {},
            folded={plural(len(others), "other figure"): _details(plan, others)} if others else {},
            warnings=warnings(plan).get(name, []),
        )
        found.append(section)
    return found


def _details(plan: Plan, names: Sequence[str]) -> list[Detail]:
    """Return figures with their formulas and sources."""
    found: list[Detail] = []
    for step in (step_of(plan.figures, name) for name in names):
        exact = [step.exact] if step.formula and step.exact != step.value else []
        note = f"Source: {step.source}" if step.source else ""
        lines = [f"= {line}" for line in [*step.lines, *exact]]
        found.append(
            Detail(name=step.name, title=step.title, value=step.value, lines=lines, note=note, needs=step.needs)
        )
    return found


def plan_page(plan: Plan, command: str, more: Sequence[Section]) -> Report:
    """Return the page of a plan; sections of what was asked besides, such as a variation, come first."""
    figures = plan.figures
    main = {name for names in FIRST.values() for name in names}
    inputs = [name for name, f in figures.items() if not f.formula and name not in main]
    last = Section(
        name="inputs_section",
        title="What is it computed from?",
        finding=f"{len(inputs)} inputs, each with its source, give {len(figures) - len(inputs)} figures.",
        folded={plural(len(inputs), "input"): _details(plan, inputs)},
    )
    lead = "Predicted from sizes and data sheets. Nothing was measured. Each number opens its formula."
    if plan.hardware.name == "this":
        lead = "Predicted from sizes, and from rates that were measured on this machine. Each number opens its formula."
    return Report(
        title=heading(plan),
        lead=lead,
        sections=[*more, *sections(plan), last],
        facts_title="What is planned",
        facts={"Training": {name: str(value) for name, value in plan.request.given().items()}},
        command=command,
    )


# --- one figure


def explained(plan: Plan, name: str, width: int, depth: int | None = None) -> Answer:
    """Return the explanation of a figure, or all names for "list".

    Args:
        depth: most formulas between a figure and this one.

    Raises: ValueError for an unknown figure, with the nearest known ones.
    """
    figures = plan.figures
    if name != "list":
        found = explain(figures, name, depth)
        record = {kind: [asdict(step) for step in steps] for kind, steps in found.items()}
        lines, left = [text(found, width)], len(needed(figures, name)) - sum(map(len, found.values()))
        if depth is None and len(found["steps"]) > 12:
            lines.append("\n--depth 1 shows only what the formula names itself.")
        elif left:
            lines.append(f"\n{plural(left, 'figure')} and inputs more are further away; leave out --depth for all.")
        return Answer(record=record, lines=lines)
    rows = [(key, str(figure), figure.title) for key, figure in figures.items()]
    table = Table(columns=("name", "value", "figure"), rows=rows, numeric=("value",))
    names = Section(
        name="names_section", title="Figures", finding=f"{len(figures)} figures and inputs.", tables=[table]
    )
    return Answer(record=figures_record(figures), sections=[names])


# --- comparisons


def searched(plan: Plan, command: str, on_part: OnPart = quiet) -> Answer:
    """Return the layouts that fit, fastest first, and the plan of the fastest on the page.

    Raises: ValueError if no layout fits, with what would fit.
    """
    precisions = tuple(p for p in EVERY["precision"] if p == "bf16" or "fp8" in plan.hardware.peaks)
    if plan.request.precision == "fp32":
        precisions = ("fp32",)
    options = {**EVERY, "precision": precisions, **{name: (value,) for name, value in plan.asked.given().items()}}
    how: dict[str, Any] = {"m": plan.m, "hardware": plan.hardware, "assumed": plan.assumed}
    alone = {} if plan.asked.recompute else {"recompute": alone_options(None, 1)["recompute"]}
    found = candidates(Search(base=plan.training.layout, options=options, alone=alone, **how), on_part)
    *_, fastest = found[0]
    layout = {name: getattr(fastest.layout, name) for name in LAYOUT}
    best = changed(plan, layout, plan.hardware, "the fastest of all that fit")
    best.sources["layout"] = "the fastest of all that fit"
    by_parts = replace(plan.inputs, request=replace(plan.request, utilization=None))
    records: list[Record] = []
    rows: list[tuple[str, ...]] = []
    for seconds, memory, _, t in found:
        c = {name: getattr(t.layout, name) for name in LAYOUT}
        mfu, binds = Run(t, by_parts).mfu, max(t.parts, key=lambda part: t.parts[part])
        records.append({**c, "memory": memory, "step_seconds": seconds, "mfu": mfu, "binds": binds})
        words = f"pipeline {c['pipeline']}, expert {c['expert']}, tensor {c['tensor']}, zero {c['zero']}, "
        words += f"micro-batch {c['micro_batch']}, {c['schedule']}, {c['recompute']}, {c['precision']}"
        rows.append((str(len(records)), human(seconds, "s"), binds, human(memory, "B"), f"{mfu:.3f}", words))
    columns = ("", "step", "slowest", "memory", "MFU", "layout")
    _, step, binds, memory, *_ = rows[0]
    section = Section(
        name="search_section",
        title=f"Which layouts fit {plural(records[0]['gpus'], 'GPU')}?",
        finding=f"The fastest takes {step} a step with {memory} on the fullest GPU. The longest part: {binds}.",
        about="One layout for each combination of sizes, with its fastest choices that fit. Memory is a lower bound.",
        tables=[Table(columns=columns, rows=rows, numeric=("", "step", "memory", "MFU"))],
    )
    return _side({"layouts": records}, [heading(best)], section, best, command)


def varied(plan: Plan, texts: Sequence[str], names: Sequence[str], command: str, on_part: OnPart = quiet) -> Answer:
    """Return the plans of all values of one thing, side by side, or of two, as heat maps."""
    axes = [read_axis(text) for text in texts]
    variants, names = vary(plan, axes, names, on_part)
    title = f"What changes with {', '.join(name for name, _ in axes)}?"
    finding = "Everything else is as planned: the layout and the serving GPUs stay; the number of sequences follows "
    finding += "the context where you left it open."
    section = _comparison(title, finding, axes, variants, names, plan.unserved)
    return _side(variation_record(axes, variants, names), [heading(plan)], section, plan, command)


def compare(request: PlanRequest, models: Sequence[Model], command: str, on_part: OnPart = quiet) -> Answer:
    """Return the plans of several models on equally many GPUs, side by side."""
    hardware = load_hardware(request.hardware)
    gpus = int(request.gpus or min(presets()["deepseek-v3"]["training"]["gpus"], hardware.most_gpus))
    request, axes = replace(request, gpus=gpus), [("model", tuple(model.name for model in models))]
    makers = [({"model": model.name}, functools.partial(make_plan, request, model, hardware)) for model in models]
    variants = side_by_side(makers, on_part)
    names = ["tokens", "seq_len", *compared(variants), "training_gpu_hours"]
    title = f"How do they compare on {plural(gpus, 'GPU')} of {hardware.title}?"
    finding = "Layouts are those that a plan of each chooses. Training tokens are those of each config, or --tokens "
    finding += "for all."
    section = _comparison(title, finding, axes, variants, names)
    first = next(each.plan for each in variants if each.plan is not None)
    return _side(variation_record(axes, variants, names), [], section, first, command)


def _side(record: Record, lines: Sequence[str], section: Section, plan: Plan, command: str) -> Answer:
    """Return an answer that is a section next to a plan's page."""
    page = functools.partial(plan_page, plan, command, [section])
    return Answer(record=record, lines=lines, sections=[section], page=page)


def _comparison(
    title: str,
    finding: str,
    axes: Sequence[Axis],
    variants: Sequence[Variant],
    names: Sequence[str],
    unserved: str = "",
) -> Section:
    """Return figures of one axis side by side, or of two as heat maps, with what has no plan, and why.

    Args:
        unserved: reason that needs no mention.
    """
    tables = [_side_by_side(variants, axes[0][0], names)]
    if len(axes) == 2:
        tables = [_heat_map(variants, axes, name) for name in names]
    warnings = [f"{each.at}: {each.problem}" for each in variants if each.problem]
    made = [(each.at, each.plan) for each in variants if each.plan is not None]
    told = ("", unserved)
    warnings += [f"{at}: serving is not planned: {p.unserved}" for at, p in made if p.unserved not in told]
    unpriced = {p.hardware.name for _, p in made if p.hardware.price is None}
    if unpriced and any(p.hardware.price for _, p in made):
        without = ", ".join(sorted(unpriced))
        warnings.append(f"no price of {without} is published; --price, in dollars an hour, adds costs")
    if any(cell.startswith(UNFIT) for table in tables for row in table.rows for cell in row):
        warnings.append("! does not fit into the memory of a GPU")
    return Section(name="variation_section", title=title, finding=finding, tables=tables, warnings=warnings)


def _cell(variant: Variant, name: str) -> tuple[str, float | None]:
    """Return a figure of a variant in words, marked if its plan does not fit, and its value; "" where there is none."""
    if variant.plan is None or (figure := variant.figure(name)) is None:
        return "", None
    return f"{UNFIT if variant.plan.unfit(name) else ''}{figure}", float(figure)


def _title(variants: Sequence[Variant], name: str) -> str:
    """Return the title of a figure that some variant has."""
    return next(f.title for each in variants if (f := each.figure(name)) is not None)


def _side_by_side(variants: Sequence[Variant], axis: str, names: Sequence[str]) -> Table:
    """Return a table with a row for each figure and a column for each value that has a plan."""
    found = [each for each in variants if each.plan is not None]
    columns = labels(each.values[axis] for each in found)
    rows = [(_title(variants, name), *(_cell(each, name)[0] for each in found)) for name in names]
    return Table(columns=(axis, *columns), rows=rows, numeric=columns)


def _heat_map(variants: Sequence[Variant], axes: Sequence[Axis], name: str) -> Table:
    """Return a figure as a heat map: the values of the first axis are rows, those of the second columns."""
    (y, rows), (x, columns) = axes
    cells = iter(_cell(each, name) for each in variants)
    grid = {label: [next(cells) for _ in columns] for label in labels(rows)}
    return heat_map(_title(variants, name), f"{y} \\ {x}", labels(columns), grid)


def variation_record(axes: Sequence[Axis], variants: Sequence[Variant], names: Sequence[str]) -> Record:
    """Return a variation: the axes, and for each variant its figures or why there are none."""
    plans: list[Record] = []
    for each in variants:
        found: Record = {**each.values, "problem": each.problem or None}
        if each.plan is not None:
            found["fits"] = each.plan.fits
            found |= {name: f.plain for name in names if (f := each.figure(name)) is not None}
        plans.append(found)
    return {"axes": {name: list(values) for name, values in axes}, "plans": plans}


# --- published figures


def published() -> Answer:
    """Return the published figures next to ours; with sources and notes on a page, which a terminal has no room for."""
    figures = published_figures()
    statuses = [figure.status for figure in figures]
    n = {status: statuses.count(status) for status in ("reproduced", "follows", "fitted", "missed", "misprint")}
    columns = ("figure", "published", "ours", "error, %", "within", "verdict")
    rows = [_published_row(f) for f in figures]
    there = [(*row, f.source, f.note) for row, f in zip(rows, figures, strict=True)]
    here = Section(
        name="published_section",
        title="How far can it be trusted?",
        finding=f"{len(figures)} published figures: {n['reproduced']} are reproduced from sizes of models and "
        f"machines, {n['follows']} follow from other printed figures, {n['fitted']} are fitted by one constant, "
        f"{n['missed']} are missed, and {n['misprint']} contradict their own source.",
        about="Errors are of unrounded values, next to the error to hold: half a unit of the last printed digit, where "
        "no note says otherwise. bf16_efficiency, fp8_efficiency and link_efficiency are constants from printed runs; "
        "no others are.",
        tables=[Table(columns=columns, rows=rows, numeric=columns[1:5])],
    )
    wide = Table(columns=(*columns, "source", "note"), rows=there, numeric=columns[1:5])
    return Answer(
        record=[figure.record for figure in figures],
        sections=[here],
        page=lambda: Report(title="Published figures, and ours", sections=[replace(here, tables=[wide])]),
    )


def _published_row(f: Published) -> tuple[str, ...]:
    """Return the figure in words. Ours has no unit where it is the same, nor "a token", which the name says."""
    printed, ours = (
        in_words(value, True) if not f.unit and value >= 1e6 else human(value, f.unit.partition("/")[0], given=True)
        for value in (float(f.printed), float(f"{f.ours:.4g}"))
    )
    ours = ours.removesuffix(f" {printed.partition(' ')[2]}")
    return f.what, printed, ours, f"{100 * f.residual:+.2f}", f"{100 * f.within:.2g}", Toned(f.status, f.status)
