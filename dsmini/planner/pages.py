"""Plans in words: ten lines for a terminal, tables of figures, and the page whose numbers open their formulas.

A figure that a plan lacks, such as the cost on hardware without a price, is left out of lines, tables and sentences.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsmini.planner.binding import Binding
from dsmini.planner.display import in_unit, in_words, percent, rounded, short, shown
from dsmini.planner.explanation import named, step_of
from dsmini.planner.figure import Figure
from dsmini.planner.layout import Layout
from dsmini.planner.plan import Plan
from dsmini.planner.search import Candidate
from dsmini.planner.setup import is_v3, presets
from dsmini.planner.vary import UNFIT, Variation, VariedAxis
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
    said = findings(plan)
    lines = {"model": said["model"], "training": _layout_words(plan), "time": said["training"]}
    if plan.fits:
        lines |= {"failures": said["reliability"], "binds": binds_words(plan.binds["training"])}
    if plan.setup.served:
        lines |= {"decode": decode_words(plan), " binds": binds_words(plan.binds["decode"])}
        lines |= {"prefill": prefill_words(plan), "  binds": binds_words(plan.binds["prefill"])}
    else:
        lines["serving"] = f"not planned: {plan.setup.unserved}"
    notes = (f"note      {warning}" for warning in warnings(plan))
    return [heading(plan), *(f"{label.strip():9} {line}" for label, line in lines.items()), *notes, f"next      {NEXT}"]


def _layout_words(plan: Plan) -> str:
    """Return the layout, the workload, and where both come from."""
    layout, setup, s = plan.setup.layout, plan.setup, plan.sheet
    numbers = {name: getattr(layout, name) for name in ("pipeline", "expert", "tensor")}
    sizes = [f"{name} {value}" for name, value in numbers.items() if value > 1]
    sizes += [f"zero {layout.zero}"] if layout.zero else []
    sizes += [f"recompute {layout.recompute}"] if layout.recompute != "none" else []
    sizes += [layout.precision, layout.optimizer] + ([layout.schedule] if layout.pipeline > 1 else [])
    how = setup.sources["tokens"]
    if how == presets()["deepseek-v3"]["sources"]["workload"] and not is_v3(setup.model.config):
        how += "; choose --tokens, --batch and --seq-len"
    return (
        f"{plural(layout.gpus, 'GPU')} ({', '.join(sizes)}), {setup.sources['layout']}; steps of "
        f"{float(s.batch):,.0f} x {shown(s.seq_len)}, {how}"
    )


def decode_words(plan: Plan) -> str:
    """Return the decoding of a GPU: how many sequences of which length, and how fast."""
    s, setup = plan.sheet, plan.setup
    cost = f", {shown(s.decode_cost)}" if s.get("decode_cost") is not None else ""
    gain = s.get("speculation_gain")
    drafts = f"; {plural(setup.request.drafts, 'draft')} a step: {float(gain):.3g} times" if gain is not None else ""
    memory = f"{shown(s.decode_gpu_memory)} of {rounded(s.gpu_memory)}"
    return (
        f"{plural(setup.deployment('decode').gpus, 'GPU')}, {setup.sources['decode']}. "
        f"{float(s.decode_sequences):,.0f} sequences of {shown(s.context)} a GPU take {memory}: "
        f"{shown(s.decode_tokens_per_second)} each, {shown(s.decode_gpu_tokens_per_second)} a GPU{cost}{drafts}."
    )


def prefill_words(plan: Plan) -> str:
    """Return how prompts are read."""
    s, setup = plan.sheet, plan.setup
    cost = f", {shown(s.prefill_cost)}" if s.get("prefill_cost") is not None else ""
    return (
        f"{plural(setup.deployment('prefill').gpus, 'GPU')}, {setup.sources['prefill']}. The first token of "
        f"{shown(s.prompt)} comes after {shown(s.prefill_time_to_first_token)}; "
        f"{shown(s.prefill_gpu_tokens_per_second)} of prompts a GPU{cost}."
    )


def binds_words(binding: Binding) -> str:
    """Return what binds a step, by how much, and what is next."""
    then = f"; next: {binding.second}" if binding.second else ""
    return f"{binding.first}: without it at most {in_unit(binding.ratio, '')} times as fast{then}"


def findings(plan: Plan) -> dict[str, str]:
    """Return the answer of each section in a sentence or two."""
    s, setup = plan.sheet, plan.setup
    saved = f", {percent(s.cache_saving)} less than multi-head attention" if s.cache_saving > 0 else ""
    found = {
        "model": (
            f"{in_words(s.parameters_main.value)} parameters, of which a token uses "
            f"{in_words(s.parameters_active.value)}: {shown(s.training_flops)} in training. A token's cache takes "
            f"{_bytes(s.kv_cache)}{saved}."
        ),
        "training": _training(plan),
    }
    if setup.served:
        found["inference"] = f"Decode: {decode_words(plan)} Prefill: {prefill_words(plan)}"
    else:
        found["inference"] = f"Serving is not planned: {setup.unserved}."
    if s.get("v32_flops_ratio") is not None:
        found["attention"] = _attention(plan)
    if plan.fits:
        found["reliability"] = (
            f"A failure every {shown(s.mean_time_to_failure)}: {percent(s.effective_share_at_any_rate)} of the time "
            f"trains, with a checkpoint every {shown(s.checkpoint_interval)}. The whole run takes "
            f"{shown(s.elapsed_time)}."
        )
    return found


def _training(plan: Plan) -> str:
    s, setup, layout = plan.sheet, plan.setup, plan.setup.layout
    fullest = "It" if layout.gpus == 1 else "The fullest GPU"
    needs = f"{fullest} needs {shown(s.memory_needed)} of {rounded(s.gpu_memory)}."
    if not plan.fits:
        return f"It does not fit: {setup.misfit['training']}. {needs}"
    one = "This machine takes" if setup.hardware.name == "this" else "One device takes"
    gpus = one if layout.gpus == 1 else f"{layout.gpus:,} GPUs take"
    cost = f" and {shown(s.training_cost)}" if s.get("training_cost") is not None else ""
    by = f"by the parts of a step, at an MFU of {in_unit(s.roof_utilization.value, '')}"
    by = by if plan.is_slowed else f"at an MFU of {_assumed(plan)}"
    return f"{gpus} {shown(s.training_time)}{cost} for {in_words(float(s.tokens))} tokens, {by}. {needs}"


def _assumed(plan: Plan) -> str:
    used = plan.sheet.utilization
    source = used.source if plan.setup.request.utilization is not None else "as in V3"
    return f"{in_unit(float(used), '')} ({source})"


def _attention(plan: Plan) -> str:
    s, own = plan.sheet, plan.setup.model.config.attention == "dsa"
    crossover = s.get("v32_crossover")
    saves = "costs more operations than it saves at any length"
    if crossover is not None:
        saves = f"saves operations from {shown(crossover)} on"
    seen, whose = s.context if plan.setup.served else s.seq_len, "its" if own else "V3.2's"
    both = in_unit(float(s.v32_index_flops + s.v32_attention_flops), "FLOP")
    return (
        f"At {shown(seen)} a layer's attention of a token takes {both} with {whose} indexer, "
        f" {shown(s.v32_dense_flops)} without. It {saves}. Its keys make the cache "
        f"{percent(s.v32_cache_ratio - 1)} larger: {_bytes(s.v32_kv_cache)} a token in FP8."
    )


def _bytes(rate: Figure) -> str:
    return shown(rate).partition("/")[0]


def warnings(plan: Plan, section: str = "") -> Iterator[str]:
    """Yield what a reader must know, of one section or of all."""
    s, setup = plan.sheet, plan.setup
    if plan.fits and section in ("", "training"):
        if s.memory_free < NARROW * s.gpu_memory:
            left = f"{shown(s.memory_free)} of {rounded(s.gpu_memory)}"
            yield f"Memory is a lower bound, and only {left} are left."
        if s.roof_utilization < (1 - NARROW) * s.utilization:
            used = ", which days and rent are computed with" if plan.is_slowed else ""
            reached = in_unit(s.roof_utilization.value, "")
            yield f"The parts of a step reach an MFU of {reached}{used}, not {_assumed(plan)}."
    if section in ("", "inference"):
        for stage in ("decode", "prefill"):
            if sentence := setup.misfit.get(stage):
                yield f"{sentence[0].upper()}{sentence[1:]}."
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
    made = [*_sections(plan, full), _binds(plan), *more]
    if full:
        made.append(_rest(plan))
    return Report(
        title=heading(plan),
        lead=(LEAD_HERE if plan.setup.hardware.name == "this" else LEAD) if full else "",
        sections=made,
        highlights=list(_highlights(plan)),
        facts_title="What is planned",
        facts=facts(plan),
        command=command,
    )


def _sections(plan: Plan, full: bool) -> Iterator[Section]:
    """Yield a section for each question that the plan answers."""
    for name, finding in findings(plan).items():
        figures = plan.sheet.section(name)
        first = words()["headlines"]["unfit" if name == "training" and not plan.fits else name]
        headlines = [figures[key] for key in first if key in figures and figures[key].value]
        there = {figure.name for figure in headlines}
        others = [figure for key, figure in figures.items() if key not in there]
        details = [_detail(f) if full else Detail(name=f.name, title=f.title.title, value=short(f)) for f in headlines]
        question = words()["questions"][name]
        yield Section(
            name=f"{name}_section",
            title=question,
            finding=finding,
            details={"" if full else question: details} if details else {},
            folded={plural(len(others), "other figure"): [_detail(f) for f in others]} if full and others else {},
            warnings=list(warnings(plan, name)),
        )


def _detail(figure: Figure) -> Detail:
    step = step_of(figure)
    note = f"Source: {step.source}" if step.source else ""
    if figure.op == "input":
        return Detail(name=step.name, title=step.title, value=step.value, note=note)
    exact = [] if step.exact == step.value else [f"= {step.exact}"]
    formulas = [f"= {line}" for line in dict.fromkeys((step.formula, step.numbers))]
    lines = [*formulas, *exact, *step.choices]
    return Detail(name=step.name, title=step.title, value=step.value, lines=lines, note=note, needs=step.needs)


def _rest(plan: Plan) -> Section:
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


def _highlights(plan: Plan) -> Iterator[tuple[str, str]]:
    s = plan.sheet
    yield _bytes(s.kv_cache), "of cache a token"
    yield shown(s.memory_needed), "of memory on the fullest GPU in training"
    if plan.fits:
        cost = s.get("training_cost")
        yield (shown(s.training_time), "of training") if cost is None else (shown(cost), "rent of the training")
    if plan.setup.served:
        yield shown(s.decode_tokens_per_second), "for each decoding sequence"


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
        stages = ("decode", "prefill")
        serving = {f"{x}": f"{plural(made.deployment(x).gpus, 'GPU')}, {made.sources[x]}" for x in stages}
        serving |= {"weights": str(made.request.weight_dtype), "cache": str(made.request.cache_dtype)}
        serving |= {"sequences of a GPU": f"{float(s.decode_sequences):,.0f} of {shown(s.context)}"}
        cards["Serving"] = serving | {"prompt": shown(s.prompt)}
    return cards


# --- comparisons


def search_section(candidates: Sequence[Candidate], peak: float) -> Section:
    """Return the section of a search: layouts that fit, fastest first.

    Args:
        peak: operations a second that a utilization refers to.
    """
    best = candidates[0]
    rows = [
        (
            str(i),
            in_unit(c.step, "s"),
            c.binds,
            in_unit(c.memory, "B"),
            f"{c.flops / peak / c.step:.3f}",
            _options(c.layout),
        )
        for i, c in enumerate(candidates, 1)
    ]
    return Section(
        name="search_section",
        title=f"Which layouts fit {best.layout.gpus:,} GPUs?",
        finding=(
            f"The fastest takes {in_unit(best.step, 's')} a step with {in_unit(best.memory, 'B')} on the fullest GPU. "
            f"What binds: {best.binds}."
        ),
        tables=[
            Table(
                columns=("", "step", "binds", "memory", "MFU", "layout"),
                rows=rows,
                numeric=("", "step", "memory", "MFU"),
            )
        ],
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
    axes = variation.axes
    one = len(axes) == 1
    cells = [variation.cell(name, place) for name in variation.names for place in variation.plans]
    problems = [f"{_at(axes, place)}: {reason}" for place, reason in variation.problems.items()]
    unfit = [f"{UNFIT.strip()} does not fit into the memory of a GPU"] * any(c.startswith(UNFIT) for c in cells)
    return Section(
        name="variation_section",
        title=f"What changes with {' and '.join(axis.name for axis in axes)}?",
        finding=_finding(variation),
        plots=list(_plots(variation)) if one and full else (),
        heat_maps=() if one else list(_heat_maps(variation)),
        tables=[_bars(variation)] if one else (),
        warnings=[*problems, *unfit],
        about="All else is as in the plan: layout and deployments stay; sequences follow the context.",
    )


def _finding(variation: Variation) -> str:
    """Tell between which values the first figure lies."""
    name = variation.names[0]
    found = [(place, figure) for place in variation.plans if (figure := variation.figure(name, place)) is not None]
    low, high = min(found, key=lambda pair: pair[1].value), max(found, key=lambda pair: pair[1].value)
    title = low[1].title.title
    if low[1].value == high[1].value:
        return f"{title}: {shown(low[1])} everywhere."
    return (
        f"{title}: from {shown(low[1])} at {_at(variation.axes, low[0])} to {shown(high[1])} at "
        f"{_at(variation.axes, high[0])}."
    )


def _at(axes: Sequence[VariedAxis], place: tuple[int, ...]) -> str:
    return ", ".join(f"{axis.name}={axis.labels[i]}" for axis, i in zip(axes, place, strict=True))


def _title(variation: Variation, name: str) -> str:
    there = (figure for place in variation.plans if (figure := variation.figure(name, place)) is not None)
    return next(there).title.title


def _bars(variation: Variation) -> Table:
    """Return a line for each figure and value, with a bar."""
    (axis,) = variation.axes
    rows: list[tuple[str, ...]] = []
    for name in variation.names:
        found = {i: figure for i in range(len(axis.values)) if (figure := variation.figure(name, (i,))) is not None}
        largest = max((abs(float(figure)) for figure in found.values()), default=0.0) or 1.0
        title = _title(variation, name)
        for i, figure in found.items():
            bar = "█" * round(BAR * abs(float(figure)) / largest)
            rows.append((title, axis.labels[i], variation.cell(name, (i,)), bar))
            title = ""
    return Table(columns=("figure", axis.name, "value", ""), rows=rows, numeric=(axis.name, "value"))


def _plots(variation: Variation) -> Iterator[Plot]:
    """Yield a plot for each figure: a line over numbers, bars over names."""
    (axis,) = variation.axes
    for name in variation.names[:MOST_PLOTS]:
        pairs = [(i, f) for i in range(len(axis.values)) if (f := variation.figure(name, (i,))) is not None]
        label, unit, y = pairs[0][1].title.title, pairs[0][1].title.unit, [float(figure) for _, figure in pairs]
        if axis.numeric:
            x = [float(axis.values[i]) for i, _ in pairs]
            order = sorted(range(len(x)), key=x.__getitem__)
            series = [Series(label="", x=[x[i] for i in order], y=[y[i] for i in order])]
            yield Plot(title=label, x=axis.name, y=unit, series=series, log_x=_is_wide(x), log_y=_is_wide(y))
        else:
            series = [Series(label="", x=[float(i) for i, _ in pairs], y=y, kind="bars")]
            yield Plot(title=label, x="", y=unit, series=series, labels=axis.labels)


def _is_wide(values: Iterable[float]) -> bool:
    found = list(values)
    return min(found) > 0 and max(found) > WIDE * min(found)


def _heat_maps(variation: Variation) -> Iterator[HeatMap]:
    down, across = variation.axes
    for name in variation.names[:MOST_PLOTS]:
        places = [[(i, j) for j in range(len(across.values))] for i in range(len(down.values))]
        figures = [[variation.figure(name, place) for place in row] for row in places]
        yield HeatMap(
            title=_title(variation, name),
            x=across.name,
            y=down.name,
            columns=across.labels,
            rows=down.labels,
            values=[[None if figure is None else figure.value for figure in row] for row in figures],
            cells=[[variation.cell(name, place) for place in row] for row in places],
        )
