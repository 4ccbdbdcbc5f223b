"""Plans in words: ten lines for a terminal, tables of figures, and the page whose numbers open their formulas.

Sentences are in words.toml. A figure that a plan lacks, such as the cost on hardware without a price, is left out of
lines, tables and sentences.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmini.planner.display import in_unit, in_words, percent, rounded, short, shown
from dsmini.planner.explanation import named, step_of
from dsmini.planner.figure import Figure
from dsmini.planner.plan import Plan
from dsmini.planner.request import Layout
from dsmini.planner.search import Candidate
from dsmini.planner.setup import STAGES, is_v3, presets
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
WAYS: Mapping[str, Callable[[Figure], str]] = {
    "": shown,
    "3": rounded,
    "g": lambda figure: f"{float(figure):.3g}",
    "n": lambda figure: f"{float(figure):,.0f}",
    "%": percent,
    "words": lambda figure: in_words(figure.value),
    "amount": lambda figure: shown(figure).partition("/")[0],
}
"""Ways to write a figure in a sentence: in three digits, whole, in percent, in words, without its "a token"."""


@functools.cache
def words() -> dict[str, Any]:
    """Return the sentences, the questions of sections, and the figures that they show first."""
    return read_toml(Path(__file__).parent / "words.toml")


class _Words(dict[str, Any]):
    """Words of a sentence: those given, and the figures of a plan, which are written by WAYS."""

    def __init__(self, plan: Plan, given: Mapping[str, str]) -> None:
        super().__init__(given)
        self.sheet = plan.sheet

    def __missing__(self, name: str) -> "_Written":
        return _Written(getattr(self.sheet, name))

    def says(self, part: re.Match[str]) -> str:
        """Return the part in brackets if all its figures are there."""
        names = re.findall(r"{(\w+)", part[1])
        return part[1] if all(name in self or self.sheet.or_zero(name) > 0 for name in names) else ""


@dataclasses.dataclass(frozen=True)
class _Written:
    figure: Figure

    def __format__(self, way: str) -> str:
        return WAYS[way](self.figure)


def sentence(plan: Plan, name: str, **given: str) -> str:
    """Return a sentence of words.toml about a plan, with words for what is no figure."""
    known = _Words(plan, given)
    return re.sub(r"\[(.*?)\]", known.says, words()["sentences"][name]).format_map(known)


# --- ten lines


def heading(plan: Plan) -> str:
    """Return what is planned."""
    return f"{plan.setup.model.name} on {plan.setup.hardware.title}"


def ten_lines(plan: Plan) -> list[str]:
    """Return the plan in about ten lines: the model, what fits, time, cost, what binds, and what to ask next."""
    said = findings(plan)
    lines = [("model", said["model"]), ("training", _layout_words(plan)), ("time", said["training"])]
    if plan.fits:
        lines += [("failures", said["reliability"]), ("binds", binds_words(plan, "training"))]
    if plan.setup.served:
        for stage, line in _serving(plan).items():
            lines += [(stage, line), ("binds", binds_words(plan, stage))]
    else:
        lines.append(("serving", f"not planned: {plan.setup.unserved}"))
    lines += [*(("note", warning) for warning in warnings(plan)), ("next", NEXT)]
    return [heading(plan), *(f"{label:9} {line}" for label, line in lines)]


def _layout_words(plan: Plan) -> str:
    """Return the layout, the workload, and where both come from."""
    layout, sources = plan.setup.layout, plan.setup.sources
    options = [f"{name} {value}" for name in ("pipeline", "expert", "tensor") if (value := getattr(layout, name)) > 1]
    options += [f"zero {layout.zero}"] * (layout.zero > 0)
    options += [f"recompute {layout.recompute}"] * (layout.recompute != "none")
    options += [layout.precision, layout.optimizer, *([layout.schedule] if layout.pipeline > 1 else [])]
    work = sources["tokens"]
    if work == presets()["deepseek-v3"]["sources"]["workload"] and not is_v3(plan.setup.model.config):
        work += "; choose --tokens, --batch and --seq-len"
    given = {"options": ", ".join(options), "layout_source": sources["layout"], "work_source": work}
    return sentence(plan, "layout", gpus_shown=plural(layout.gpus, "GPU"), **given)


def _serving(plan: Plan) -> dict[str, str]:
    """Return how many sequences decode on a GPU, and how prompts are read."""
    made = plan.setup
    given = {f"{stage}_gpus": plural(made.deployment(stage).gpus, "GPU") for stage in STAGES}
    given |= {f"{stage}_source": made.sources[stage] for stage in STAGES}
    drafts = plural(made.request.drafts, "draft")
    return {stage: sentence(plan, stage, **given, drafts_shown=drafts) for stage in STAGES}


def binds_words(plan: Plan, stage: str) -> str:
    """Return what binds a step, by how much, and what is next."""
    b = plan.binds[stage]
    then = f"; next: {b.second}" if b.second else ""
    return sentence(plan, "binds", first=b.first, ratio=in_unit(b.ratio, "")) + then


def findings(plan: Plan) -> dict[str, str]:
    """Return the answer of each section in a sentence or two."""
    found = {"model": sentence(plan, "model"), "training": _training(plan)}
    if plan.setup.served:
        found["inference"] = " ".join(f"{stage.capitalize()}: {line}" for stage, line in _serving(plan).items())
    else:
        found["inference"] = f"Serving is not planned: {plan.setup.unserved}."
    if plan.sheet.get("v32_flops_ratio") is not None:
        found["attention"] = _attention(plan)
    if plan.fits:
        found["reliability"] = sentence(plan, "reliability")
    return found


def _training(plan: Plan) -> str:
    gpus = plan.setup.layout.gpus
    fullest = "It" if gpus == 1 else "The fullest GPU"
    if not plan.fits:
        return sentence(plan, "unfit", misfit=plan.setup.misfit["training"], fullest=fullest)
    one = "This machine takes" if plan.setup.hardware.name == "this" else "One device takes"
    by = sentence(plan, "slowed" if plan.is_slowed else "assumed", assumed_utilization=_assumed(plan))
    return sentence(plan, "training", takers=one if gpus == 1 else f"{gpus:,} GPUs take", by=by, fullest=fullest)


def _assumed(plan: Plan) -> str:
    used = plan.sheet.utilization
    source = used.source if plan.setup.request.utilization is not None else "as in V3"
    return f"{in_unit(float(used), '')} ({source})"


def _attention(plan: Plan) -> str:
    s, saves = plan.sheet, "costs more operations than it saves at any length"
    return sentence(
        plan,
        "attention",
        seen=shown(s.context if plan.setup.served else s.seq_len),
        both=in_unit(float(s.v32_index_flops + s.v32_attention_flops), "FLOP"),
        whose="its" if plan.setup.model.config.attention == "dsa" else "V3.2's",
        saves=sentence(plan, "saves") if s.get("v32_crossover") is not None else saves,
        larger=percent(s.v32_cache_ratio - 1),
    )


def warnings(plan: Plan, section: str = "") -> Iterator[str]:
    """Yield what a reader must know, of one section or of all."""
    s, setup = plan.sheet, plan.setup
    if plan.fits and section in ("", "training"):
        if s.memory_free < NARROW * s.gpu_memory:
            yield sentence(plan, "full")
        if s.roof_utilization < (1 - NARROW) * s.utilization:
            used = ", which days and rent are computed with" if plan.is_slowed else ""
            yield sentence(plan, "slow", used=used, assumed_utilization=_assumed(plan))
    if section in ("", "inference"):
        yield from (f"{said[0].upper()}{said[1:]}." for stage in STAGES if (said := setup.misfit.get(stage)))
    assumed = setup.request.failures_per_node_day is None
    if plan.fits and section == "reliability" and assumed and s.gpus_per_node < s.gpus_per_failing_node:
        yield "The rate of failures is that of Meta's nodes of eight GPUs; for yours use --failures-per-node-day."


# --- the page, and the tables of --all


def plan_report(plan: Plan, *, full: bool, more: Sequence[Section] = (), command: str = "") -> Report:
    """Return a plan as a report.

    Args:
        full: all figures with their formulas and inputs, for a page; else the tables of a terminal.
        more: sections to add, such as a search or a variation.
    """
    lead = LEAD_HERE if plan.setup.hardware.name == "this" else LEAD
    return Report(
        title=heading(plan),
        lead=lead if full else "",
        sections=[*_sections(plan, full), _binds(plan), *more, *([_inputs(plan)] if full else [])],
        highlights=list(_highlights(plan)),
        facts_title="What is planned",
        facts=facts(plan),
        command=command,
    )


def _highlights(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the large numbers of a page, of training its time where it has no price."""
    for name, (text, said) in words()["highlights"].items():
        unfit = name.startswith("training_") and not plan.fits
        instead = name == "training_time" and plan.sheet.get("training_cost") is not None
        if plan.sheet.get(name) is not None and not unfit and not instead:
            yield text.format_map(_Words(plan, {})), said


def _sections(plan: Plan, full: bool) -> Iterator[Section]:
    """Yield a section for each question that the plan answers."""
    for name, finding in findings(plan).items():
        figures, question = plan.sheet.section(name), words()["questions"][name]
        first = words()["headlines"]["unfit" if name == "training" and not plan.fits else name]
        headlines = [figures.pop(key) for key in first if key in figures and figures[key].value]
        details = [_detail(f) if full else Detail(name=f.name, title=f.title.title, value=short(f)) for f in headlines]
        others = [_detail(figure) for figure in figures.values()] if full else []
        yield Section(
            name=f"{name}_section",
            title=question,
            finding=finding,
            details={"" if full else question: details} if details else {},
            folded={plural(len(others), "other figure"): others} if others else {},
            warnings=list(warnings(plan, name)),
        )


def _detail(figure: Figure) -> Detail:
    step = step_of(figure)
    formulas = [f"= {line}" for line in dict.fromkeys((step.formula, step.numbers)) if line]
    exact = [f"= {step.exact}"] if formulas and step.exact != step.value else []
    note = f"Source: {step.source}" if step.source else ""
    lines = [*formulas, *exact, *step.choices]
    return Detail(name=step.name, title=step.title, value=step.value, lines=lines, note=note, needs=step.needs)


def _inputs(plan: Plan) -> Section:
    """Return the section of all inputs."""
    every = named(plan.figures.values())
    inputs = [_detail(f) for f in every.values() if f.op == "input"]
    return Section(
        name="inputs_section",
        title="What is it computed from?",
        finding=f"{len(inputs)} inputs, each with its source, give {len(every) - len(inputs)} figures.",
        folded={plural(len(inputs), "input"): inputs},
    )


def _binds(plan: Plan) -> Section:
    """Return what binds training, decode and prefill."""
    rows = [(stage, b.first, f"{b.ratio:.3g}", b.second) for stage, b in plan.binds.items()]
    return Section(
        name="binding_section",
        title="What binds?",
        finding=" ".join(f"{stage.capitalize()}: {b.first}." for stage, b in plan.binds.items()),
        tables=[Table(columns=("step", "binds", "times", "next"), rows=rows, numeric=("times",))],
        about=(
            "Making what binds faster gains at most this many times. The parts of serving overlap, so there the next "
            "binds then. Those of a training step run one after the other, and hide each other: the step is computed "
            "again as if what binds took no time; next is what gains second most."
        ),
    )


def facts(plan: Plan) -> dict[str, dict[str, str]]:
    """Return what is planned, in cards: model, hardware, training, serving."""
    made, s, config = plan.setup, plan.sheet, plan.setup.model.config
    model = {
        "file": made.model.source,
        "layers": f"{config.n_layers}, {min(config.n_dense_layers, config.n_layers)} dense",
        "width": f"{config.dim:,}",
        "attention": f"{config.attention.upper()}, {config.n_heads} heads",
        "MTP depths": str(config.n_mtp_layers),
    }
    if config.n_dense_layers < config.n_layers:
        model["routed experts"] = f"{config.n_activated_experts} of {config.n_routed_experts}"
    numbers = (s.get(name) for name in made.hardware.numbers)
    machine = {"device": made.hardware.title} | {figure.title.title: rounded(figure) for figure in numbers}
    training = {"layout": made.sources["layout"], "sequences a step": f"{float(s.batch):,.0f} of {shown(s.seq_len)}"}
    training |= {name.replace("_", " "): str(value) for name, value in dataclasses.asdict(made.layout).items()}
    cards = {"Model": model, "Hardware": machine, "Training": training | {"tokens": shown(s.tokens)}}
    if made.served:
        serving = {x: f"{plural(made.deployment(x).gpus, 'GPU')}, {made.sources[x]}" for x in STAGES}
        serving |= {"weights": str(made.request.weight_dtype), "cache": str(made.request.cache_dtype)}
        serving |= {"sequences of a GPU": f"{float(s.decode_sequences):,.0f} of {shown(s.context)}"}
        cards["Serving"] = serving | {"prompt": shown(s.prompt)}
    return cards


# --- comparisons


def search_section(candidates: Sequence[Candidate]) -> Section:
    """Return the section of a search: layouts that fit, fastest first."""
    best, rows = candidates[0], list[tuple[str, ...]]()
    for i, c in enumerate(candidates, 1):
        step, memory = in_unit(c.step_seconds, "s"), in_unit(c.memory, "B")
        rows.append((str(i), step, c.binds, memory, f"{c.utilization:.3f}", _options(c.layout)))
    columns = ("", "step", "binds", "memory", "MFU", "layout")
    return Section(
        name="search_section",
        title=f"Which layouts fit {best.layout.gpus:,} GPUs?",
        finding=(
            f"The fastest takes {rows[0][1]} a step with {rows[0][3]} on the fullest GPU. What binds: {best.binds}."
        ),
        tables=[Table(columns=columns, rows=rows, numeric=("", "step", "memory", "MFU"))],
        about="One layout for each sizes of parallelism, with its fastest choices that fit. Memory is a lower bound.",
    )


def _options(layout: Layout) -> str:
    """Return a layout as the options that ask for it."""
    sizes = f"pipeline {layout.pipeline}, expert {layout.expert}, tensor {layout.tensor}, zero {layout.zero}"
    return f"{sizes}, micro-batch {layout.micro_batch}, {layout.schedule}, {layout.recompute}, {layout.precision}"


def variation_section(variation: Variation, *, full: bool) -> Section:
    """Return the section of a variation: over one axis as table and plots, over two as heat maps.

    Args:
        full: with the plots of a page.
    """
    one = len(variation.axes) == 1
    unfit = any(variation.plans[place].unfit(name) for name in variation.names for place in variation.found(name))
    problems = [f"{variation.at(place)}: {reason}" for place, reason in variation.problems.items()]
    return Section(
        name="variation_section",
        title=f"What changes with {' and '.join(axis.name for axis in variation.axes)}?",
        finding=_range(variation, variation.names[0]),
        plots=[_plot(variation, name) for name in variation.names[:MOST_PLOTS]] if one and full else (),
        heat_maps=() if one else [_heat_map(variation, name) for name in variation.names[:MOST_PLOTS]],
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
        return f"{title}: {shown(found[low])} everywhere."
    ends = (f"{shown(found[place])} at {variation.at(place)}" for place in (low, high))
    return f"{title}: from {' to '.join(ends)}."


def _bars(variation: Variation) -> Table:
    """Return a line for each figure and value, with a bar."""
    (axis,) = variation.axes
    rows: list[tuple[str, ...]] = []
    for name in variation.names:
        found = variation.found(name)
        largest = max(abs(float(figure)) for figure in found.values()) or 1.0
        for place, figure in found.items():
            title = "" if rows and place != next(iter(found)) else figure.title.title
            bar = "█" * round(BAR * abs(float(figure)) / largest)
            rows.append((title, axis.labels[place[0]], variation.cell(name, place), bar))
    return Table(columns=("figure", axis.name, "value", ""), rows=rows, numeric=(axis.name, "value"))


def _plot(variation: Variation, name: str) -> Plot:
    """Return the plot of a figure: a line over numbers, bars over names."""
    (axis,), found = variation.axes, variation.found(name)
    title = next(iter(found.values())).title
    points = [(float(axis.values[i]) if axis.numeric else float(i), float(figure)) for (i,), figure in found.items()]
    x, y = zip(*(sorted(points) if axis.numeric else points), strict=True)
    if axis.numeric:
        lines = [Series(label="", x=x, y=y)]
        wide_x, wide_y = _is_wide(x), _is_wide(y)
        return Plot(title=title.title, x=axis.name, y=title.unit, series=lines, log_x=wide_x, log_y=wide_y)
    series = [Series(label="", x=x, y=y, kind="bars")]
    return Plot(title=title.title, x="", y=title.unit, series=series, labels=axis.labels)


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
