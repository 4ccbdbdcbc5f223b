"""Plans in words: ten lines for a terminal, tables of figures, and the page whose numbers open their formulas.

A figure that a plan lacks, such as the cost on hardware without a price, is left out of lines, tables and sentences.
Questions, and the figures that a section shows first, are in words.toml.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsmini.planner.display import in_unit, short, shown
from dsmini.planner.explanation import named, step_of
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.plan import Plan
from dsmini.planner.request import is_v3, presets
from dsmini.planner.serving import STAGES
from dsmini.planner.vary import UNFIT, Variation
from dsmini.reading import read_toml
from dsmini.report import Detail, HeatMap, Plot, Report, Section, Series, Table
from dsmini.report.units import plural

LEAD = "Predicted from sizes and data sheets. Nothing was measured. Each number opens its formula."
LEAD_HERE = "Predicted from sizes, and from rates that were measured on this machine. Each number opens its formula."
NEXT = "--explain kv_cache (or list), --all for the tables, --out plan for a page, --search, --vary context=4096,32768"
NARROW = 0.05
"""Share of the memory that is left, or of the MFU that is missed, which is worth a warning."""
MOST_PLOTS = 8
"""Most figures of a variation that are drawn; the table has all."""
BAR = 12
"""Length of the longest bar of a terminal, in characters."""
WIDE = 20.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""


@functools.cache
def words() -> dict[str, Any]:
    """Return the questions of sections, and the figures that they show first."""
    return read_toml(Path(__file__).parent / "words.toml")


# --- ten lines


def heading(plan: Plan) -> str:
    """Return what is planned."""
    return f"{plan.setup.model.name} on {plan.setup.hardware.title}"


def ten_lines(plan: Plan) -> list[str]:
    """Return the plan in about ten lines: the model, what fits, time, cost, what binds, and what to ask next."""
    lines = [("model", _model(plan.sheet)), ("training", _layout(plan)), ("time", _training(plan))]
    if plan.fits:
        lines += [("failures", _failures(plan.sheet)), ("binds", _binds(plan, "training"))]
    if not plan.setup.served:
        lines.append(("serving", f"not planned: {plan.setup.unserved}"))
    for stage in STAGES if plan.setup.served else ():
        lines += [(stage, SERVING[stage](plan)), ("binds", _binds(plan, stage))]
    lines += [*(("note", warning) for warning in warnings(plan)), ("next", NEXT)]
    return [heading(plan), *(f"{label:9} {line}" for label, line in lines)]


def findings(plan: Plan) -> dict[str, str]:
    """Return the answer of each section in a sentence or two."""
    found = {"model": _model(plan.sheet), "training": _training(plan)}
    served = " ".join(f"{stage.capitalize()}: {SERVING[stage](plan)}" for stage in STAGES) if plan.setup.served else ""
    found["inference"] = served or f"Serving is not planned: {plan.setup.unserved}."
    if plan.sheet.get("v32_flops_ratio") is not None:
        found["attention"] = _attention(plan)
    if plan.fits:
        found["reliability"] = _failures(plan.sheet)
    return found


def _if_there(before: str, figure: Figure | None) -> str:
    return "" if figure is None else f"{before}{figure}"


def _model(s: Sheet) -> str:
    saving = f", {s.cache_saving:%} less than multi-head attention" if s.cache_saving > 0 else ""
    return (
        f"{s.parameters_main:words} parameters, of which a token uses {s.parameters_active:words}: {s.training_flops} "
        f"in training. A token's cache takes {s.kv_cache:amount}{saving}."
    )


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


def _training(plan: Plan) -> str:
    s, gpus = plan.sheet, plan.setup.request.gpus or 1
    needs = f"{'It' if gpus == 1 else 'The fullest GPU'} needs {s.memory_needed} of {s.gpu_memory:3}."
    if not plan.fits:
        return f"It does not fit: {plan.setup.misfit['training']}. {needs}"
    who = f"{gpus:,} GPUs take"
    if gpus == 1:
        who = "This machine takes" if plan.setup.hardware.name == "this" else "One device takes"
    by = f"at an MFU of {_assumed(plan)}"
    if plan.is_slowed:
        by = f"by the parts of a step, at an MFU of {s.roof_utilization:3}"
    cost = _if_there(" and ", s.get("training_cost"))
    return f"{who} {s.training_time}{cost} for {s.tokens:words} tokens, {by}. {needs}"


def _assumed(plan: Plan) -> str:
    used = plan.sheet.utilization
    return f"{in_unit(float(used), '')} ({used.source if plan.setup.request.utilization is not None else 'as in V3'})"


def _failures(s: Sheet) -> str:
    return (
        f"A failure every {s.mean_time_to_failure}: {s.effective_share_at_any_rate:%} of the time trains, with a "
        f"checkpoint every {s.checkpoint_interval}. The whole run takes {s.elapsed_time}."
    )


def _decode(plan: Plan) -> str:
    s, r = plan.sheet, plan.setup.request
    gain = s.get("speculation_gain")
    drafts = "" if gain is None else f"; {plural(r.drafts, 'draft')} a step: {gain:.3g} times"
    return (
        f"{plural(r.decode_gpus or 1, 'GPU')}, {plan.setup.sources['decode']}. {s.decode_sequences:,.0f} sequences of "
        f"{s.context} a GPU take {s.decode_gpu_memory} of {s.gpu_memory:3}: {s.decode_tokens_per_second} each, "
        f"{s.decode_gpu_tokens_per_second} a GPU{_if_there(', ', s.get('decode_cost'))}{drafts}."
    )


def _prefill(plan: Plan) -> str:
    s, r = plan.sheet, plan.setup.request
    return (
        f"{plural(r.prefill_gpus or 1, 'GPU')}, {plan.setup.sources['prefill']}. The first token of {s.prompt} comes "
        f"after {s.prefill_time_to_first_token}; {s.prefill_gpu_tokens_per_second} of prompts a GPU"
        f"{_if_there(', ', s.get('prefill_cost'))}."
    )


SERVING = {"decode": _decode, "prefill": _prefill}


def _attention(plan: Plan) -> str:
    s, crossover = plan.sheet, plan.sheet.get("v32_crossover")
    saves = (
        f"saves operations from {crossover} on" if crossover else "costs more operations than it saves at any length"
    )
    whose = "its" if plan.setup.model.config.attention == "dsa" else "V3.2's"
    return (
        f"At {s.context if plan.setup.served else s.seq_len} a layer's attention of a token takes "
        f"{in_unit(float(s.v32_index_flops + s.v32_attention_flops), 'FLOP')} with {whose} indexer, "
        f"{s.v32_dense_flops} without. It {saves}. Its keys make the cache {s.v32_cache_ratio - 1:%} larger: "
        f"{s.v32_kv_cache:amount} a token in FP8."
    )


def _binds(plan: Plan, stage: str) -> str:
    """Return what binds a step, by how much, and what is next."""
    b = plan.binds[stage]
    return f"{b.first}: without it at most {in_unit(b.ratio, '')} times as fast{b.second and f'; next: {b.second}'}"


def warnings(plan: Plan, section: str = "") -> Iterator[str]:
    """Yield what a reader must know, of one section or of all."""
    s = plan.sheet
    if plan.fits and section in ("", "training"):
        if s.memory_free < NARROW * s.gpu_memory:
            yield f"Memory is a lower bound, and only {s.memory_free} of {s.gpu_memory:3} are left."
        if s.roof_utilization < (1 - NARROW) * s.utilization:
            used = ", which days and rent are computed with" if plan.is_slowed else ""
            yield f"The parts of a step reach an MFU of {s.roof_utilization:3}{used}, not {_assumed(plan)}."
    if section in ("", "inference"):
        yield from (f"{said[0].upper()}{said[1:]}." for stage in STAGES if (said := plan.setup.misfit.get(stage)))


# --- the page, and the tables of --all


def plan_report(plan: Plan, *, full: bool, more: Sequence[Section] = (), command: str = "") -> Report:
    """Return a plan as a report.

    Args:
        full: all figures with their formulas and inputs, for a page; else the tables of a terminal.
        more: sections to add, such as a search or a variation.
    """
    every = named(plan.figures.values())
    inputs = [_detail(figure) for figure in every.values() if figure.op == "input"]
    binds = " ".join(f"{stage.capitalize()}: {_binds(plan, stage)}." for stage in plan.binds)
    sections = [
        *(_section(plan, name, finding, full) for name, finding in findings(plan).items()),
        Section(name="binding_section", title="What binds?", finding=binds, about=words()["binds"]),
        *more,
        Section(
            name="inputs_section",
            title="What is it computed from?",
            finding=f"{len(inputs)} inputs, each with its source, give {len(every) - len(inputs)} figures.",
            folded={plural(len(inputs), "input"): inputs},
        ),
    ]
    lead = LEAD_HERE if plan.setup.hardware.name == "this" else LEAD
    return Report(
        title=heading(plan),
        lead=lead if full else "",
        sections=sections if full else sections[:-1],
        highlights=list(_highlights(plan)),
        facts_title="What is planned",
        facts={"Training": {name: str(value) for name, value in plan.setup.request.given().items()}},
        command=command,
    )


def _highlights(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the large numbers of a page, of training its time where it has no price."""
    for name, said in words()["highlights"].items():
        figure = plan.sheet.get(name)
        instead = name == "training_time" and plan.sheet.get("training_cost") is not None
        if figure is not None and not instead and (plan.fits or not name.startswith("training_")):
            yield f"{figure:amount}" if name == "kv_cache" else shown(figure), said


def _section(plan: Plan, name: str, finding: str, full: bool) -> Section:
    """Return the section of a question."""
    figures, question = plan.sheet.section(name), words()["questions"][name]
    first = words()["headlines"]["unfit" if name == "training" and not plan.fits else name]
    headlines = [figures.pop(key) for key in first if key in figures and figures[key].value]
    details = [_detail(f) if full else Detail(name=f.name, title=f.title.title, value=short(f)) for f in headlines]
    others = [_detail(figure) for figure in figures.values()] if full else []
    return Section(
        name=f"{name}_section",
        title=question,
        finding=finding,
        details={"" if full else question: details} if details else {},
        folded={plural(len(others), "other figure"): others} if others else {},
        warnings=list(warnings(plan, name)),
    )


def _detail(figure: Figure) -> Detail:
    step = step_of(figure)
    exact = [step.exact] if step.formula and step.exact != step.value else []
    lines = [*(f"= {line}" for line in [*step.lines, *exact]), *step.choices]
    note = f"Source: {step.source}" if step.source else ""
    return Detail(name=step.name, title=step.title, value=step.value, lines=lines, note=note, needs=step.needs)


# --- comparisons


def search_section(found: Sequence[dict[str, Any]]) -> Section:
    """Return the section of a search: layouts that fit, fastest first."""
    rows = [
        (
            *(str(i), in_unit(c["step_seconds"], "s"), c["binds"], in_unit(c["memory"], "B")),
            f"{c['utilization']:.3f}",
            f"pipeline {c['pipeline']}, expert {c['expert']}, tensor {c['tensor']}, zero {c['zero']}, micro-batch "
            f"{c['micro_batch']}, {c['schedule']}, {c['recompute']}, {c['precision']}",
        )
        for i, c in enumerate(found, 1)
    ]
    _, step, binds, memory, *_ = rows[0]
    columns = ("", "step", "binds", "memory", "MFU", "layout")
    return Section(
        name="search_section",
        title=f"Which layouts fit {found[0]['gpus']:,} GPUs?",
        finding=f"The fastest takes {step} a step with {memory} on the fullest GPU. What binds: {binds}.",
        tables=[Table(columns=columns, rows=rows, numeric=("", "step", "memory", "MFU"))],
        about="One layout for each sizes of parallelism, with its fastest choices that fit. Memory is a lower bound.",
    )


def variation_section(variation: Variation, *, full: bool) -> Section:
    """Return the section of a variation: over one axis as table and plots, over two as heat maps.

    Args:
        full: with the plots of a page.
    """
    names, one = variation.names, len(variation.axes) == 1
    unfit = any(variation.plans[place].unfit(name) for name in names for place in variation.found(name))
    problems = [f"{variation.at(place)}: {reason}" for place, reason in variation.problems.items()]
    return Section(
        name="variation_section",
        title=f"What changes with {' and '.join(axis.name for axis in variation.axes)}?",
        finding=_range(variation, names[0]),
        plots=[_plot(variation, name) for name in names[:MOST_PLOTS]] if one and full else (),
        heat_maps=() if one else [_heat_map(variation, name) for name in names[:MOST_PLOTS]],
        tables=[_bars(variation)] if one else (),
        warnings=[*problems, *[f"{UNFIT.strip()} does not fit into the memory of a GPU"] * unfit],
        about="All else is as in the plan: layout and deployments stay; sequences follow the context.",
    )


def _range(variation: Variation, name: str) -> str:
    """Tell between which values a figure lies."""
    found = variation.found(name)
    low, high = (most(found, key=lambda place: found[place].value) for most in (min, max))
    title = found[low].title.title
    if found[low].value == found[high].value:
        return f"{title}: {found[low]} everywhere."
    return f"{title}: from {found[low]} at {variation.at(low)} to {found[high]} at {variation.at(high)}."


def _bars(variation: Variation) -> Table:
    """Return a line for each figure and value, with a bar."""
    (axis,) = variation.axes
    rows: list[tuple[str, ...]] = []
    for name in variation.names:
        found = variation.found(name)
        largest, title = max(abs(float(figure)) for figure in found.values()) or 1.0, ""
        for place, figure in found.items():
            title = figure.title.title if place == next(iter(found)) else ""
            bar = "█" * round(BAR * abs(float(figure)) / largest)
            rows.append((title, axis.labels[place[0]], variation.cell(name, place), bar))
    return Table(columns=("figure", axis.name, "value", ""), rows=rows, numeric=(axis.name, "value"))


def _plot(variation: Variation, name: str) -> Plot:
    """Return the plot of a figure: a line over numbers, bars over names."""
    (axis,), found = variation.axes, variation.found(name)
    title = next(iter(found.values())).title
    points = [(float(axis.values[i]) if axis.numeric else float(i), float(figure)) for (i,), figure in found.items()]
    x, y = zip(*(sorted(points) if axis.numeric else points), strict=True)
    words: dict[str, Any] = {"title": title.title, "y": title.unit}
    if axis.numeric:
        return Plot(**words, x=axis.name, series=[Series(label="", x=x, y=y)], log_x=_is_wide(x), log_y=_is_wide(y))
    return Plot(**words, x="", series=[Series(label="", x=x, y=y, kind="bars")], labels=axis.labels)


def _is_wide(values: Iterable[float]) -> bool:
    found = list(values)
    return min(found) > 0 and max(found) > WIDE * min(found)


def _heat_map(variation: Variation, name: str) -> HeatMap:
    (down, across), found = variation.axes, variation.found(name)
    places = [[(i, j) for j in range(len(across.values))] for i in range(len(down.values))]
    return HeatMap(
        title=next(iter(found.values())).title.title,
        x=across.name,
        y=down.name,
        columns=across.labels,
        rows=down.labels,
        values=[[found[place].value if place in found else None for place in row] for row in places],
        cells=[[variation.cell(name, place) for place in row] for row in places],
    )
