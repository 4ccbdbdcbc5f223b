"""Answers of the command: what it prints, what --json prints, and the page that --out writes.

A plan is a line for each question, after the word training, decode or prefill. Misfits come first. With --all,
and on the page, the lines stand above the figures of their section. The sentences are here, each next to the figures that
it names. A bound is written "at most" or "at least"; other times and rates of serving are estimates.
"""  # noqa: E501

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import write_json, write_text
from dsmini.config.fields import require
from dsmini.console.messages import say
from dsmini.planner.deployments import IN_TIME, OWN, TPOT, TTFT, Deployments
from dsmini.planner.figure import Figures, explain, needed, step_of, text
from dsmini.planner.hardware import OnPart, load_hardware, quiet
from dsmini.planner.layout import Layout
from dsmini.planner.plan import WORKLOAD, Plan, Variant, changed, compared, make_plan, read_axis, side_by_side, vary
from dsmini.planner.request import LAYOUT, SERVING, Model, PlanRequest, is_v3, presets
from dsmini.planner.run import Run
from dsmini.planner.search import EVERY, Search, what_would_fit
from dsmini.planner.serving import PHASES, PRODUCTS, Served
from dsmini.report import Detail, Plot, Report, Section, Series, Table
from dsmini.report.figures import plain
from dsmini.report.units import NOTHING, alike, human, in_words, plural, span

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
    status: int = 0
    """Exit status: 2 where something does not fit."""

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


def heading(plan: Plan) -> str:
    """Return what is planned."""
    return f"{plan.model.name} on {plan.hardware.title}"


def lines_of(plan: Plan) -> dict[str, list[str]]:
    """Return the sentences of each section that has any."""
    found = {"model": _model(plan), "training": _training(plan)}
    if plan.unserved:
        return {**found, "decode": [f"not planned: {plan.unserved}."]}
    return found | {phase: _served(plan, each) for phase, each in plan.found.items() if each.every}


def _model(plan: Plan) -> list[str]:
    f, r = plan.figures, plan.request
    said = f"{in_words(f['parameters_main'])} parameters"
    if f["mtp_parameters"]:
        said += f" ({in_words(f['parameters_total'])} with multi-token prediction)"
    said += f", of which a token uses {in_words(f['parameters_active'])}: {f['training_flops']} in training. "
    said += f"A token's cache takes {human(f['kv_cache'], 'B')} in {r.cache_dtype or 'bfloat16'}"
    saved = f["cache_saving"]
    said += f", {100 * saved:.3g} % less than multi-head attention." if saved > 0 else "."
    if "engram_read" in f:
        said += f" In serving the host's memory holds Engram's tables, {f['engram_bytes']}, of which it reads "
        said += f"{f['engram_read']}; that time is not planned."
    left = ", ".join(f"{name}={getattr(plan.model.config, name)}" for name in plan.model.defaults)
    left = f"sizes that its file leaves to dsmini's defaults: {left}." if left else ""
    return [line for line in (said, left, _forced(plan)) if line]


def _forced(plan: Plan) -> str:
    """Return why weights are not served in the dtype of the release, where the hardware forces that; "" elsewhere."""
    released, dtype, h = plan.model.released.weights, plan.request.weight_dtype, plan.hardware
    if plan.asked.weight_dtype or released is None or dtype in (None, released):
        return ""
    units = " or ".join(PRODUCTS[released])
    other = "; --weight-dtype int8 takes units that it has" if "int8" in h.peaks else ""
    return f"weights are served in {dtype}, since {h.title} has no {units} units{other}."


def _training(plan: Plan) -> list[str]:
    r, f, how, layout = plan.request, plan.figures, plan.inputs.sources, plan.training.layout
    gpus, workload = plural(layout.gpus, "GPU"), how["tokens"]
    if workload == WORKLOAD and not is_v3(plan.model.config):
        workload += "; choose --tokens, --batch and --seq-len"
    lines = [
        f"{gpus} ({_layout(layout)}), {how['layout']}.",
        f"steps of {r.batch:,} sequences of {r.seq_len:,} tokens, {workload}.",
    ]
    one = layout.gpus == 1
    fullest = f"{'It' if one else 'The fullest GPU'} needs {f['memory_needed']} of {human(plan.hardware.memory, 'B')}."
    if not plan.training.fits:
        return [*lines, fullest]
    if plan.asked.precision is None and r.precision == "bf16" and "fp8" in plan.hardware.peaks:
        lines.append("BF16, since the config does not ask for FP8; --vary precision=bf16,fp8 shows what that takes.")
    share = f"{100 * f['effective_share']:.3g} % of the time is training, {f['elapsed_time']} in all."
    lines.append(f"a failure every {f['mean_time_to_failure']}: {share}")
    cost = f" and {span(f['training_cost'], f['training_cost_most'], '$')}" if "training_cost" in f else ""
    by = "from the predicted parts of a step" if r.utilization is None else f"as {how['utilization']} says"
    cost = f" (at least {f['least_training_time']}){cost}"
    said = f"{gpus} {'takes' if one else 'take'} {f['training_time']}{cost} for {in_words(plan.run.tokens)} tokens, "
    said += f"at an MFU of {f['mfu']:.3g} {by}. {fullest}"
    if plan.hardware.price is None and plan.hardware.networked:
        said += " No price of this hardware is published; --price 2, in dollars an hour, adds the cost."
    seconds, (first, second, *_) = plan.waits["training"], plan.longest("training")
    share, rest = (100 * seconds[part] / sum(seconds.values()) for part in (first, second))
    return [said, *lines, f"slowest: {first}, {share:.0f} % of a step; next: {second}, {rest:.0f} %."]


def _layout(r: Layout) -> str:
    """Return the choices of a layout that divide something or say how training computes."""
    worth = {"pipeline": 2, "expert": 2, "tensor": 2, "context_parallel": 2, "zero": 1, "micro_batch": 2}
    found = [f"{name} {value}" for name, least in worth.items() if (value := getattr(r, name)) >= least]
    found += [f"recompute {r.recompute}"] if r.recompute != "none" else []
    found += [r.precision, r.optimizer]
    return ", ".join([*found, r.schedule] if r.pipeline > 1 else found)


def _served(plan: Plan, found: Deployments) -> list[str]:
    """Return the points of a search, its bound, and why other deployments were left out."""
    r, phase = plan.request, found.phase
    limit = human(found.limit, "s")
    points = [(f"cheapest in {limit}" if name == IN_TIME else name, each) for name, each in found.points.items()]
    names = [(" and ".join(name for name, other in points if other is each), each) for _, each in points]
    slow = {name: f"{name} in more than {limit}" for name, each in names if name == OWN and each.time > found.limit}
    lines = [f"{slow.get(name, name)}: {_point(each, not plan.misfit)}" for name, each in names]
    lines = list(dict.fromkeys(lines))
    if IN_TIME not in found.points:
        lines.insert(0, f"no deployment {'gives a token' if phase == 'decode' else 'reads a prompt'} in {limit}.")
    user = f"a first token in at least {human(found.least_time, 's')}"
    if phase == "decode":
        user = f"a user at most {human(1 / found.least_time, 'token/s')}"
    bound = f"bound of {_searched(found, r)}: {user}, a GPU at most {human(found.most, 'token/s')}."
    out = ", ".join(f"{n:,} {why}" for why, n in found.rejected.items() if n)
    sizes = sorted({each.d.gpus for each in found.every})
    on = plural(sizes[0], "GPU") if len(sizes) == 1 else f"{len(sizes)} numbers of GPUs up to {sizes[-1]}"
    bound += f" Estimated: {plural(len(found.every), 'deployment')} on {on}; left out: {out or 'none'}."
    return [*lines, bound]


def _searched(found: Deployments, r: PlanRequest) -> str:
    """Return which deployments a bound holds for."""
    s, phase = found.main.s, found.phase
    gpus, tensor = (r.decode_gpus, r.decode_tensor) if phase == "decode" else (r.prefill_gpus, r.prefill_tensor)
    on = f"{'' if gpus or found.most_gpus == 1 else 'up to '}{plural(found.most_gpus, 'GPU')}"
    on += f", tensor {tensor}" if tensor else ""
    on += f", {plural(r.sequences, 'sequence')} of each" if r.sequences and phase == "decode" else ""
    said = f"any deployment on {on}, in {100 * s.a['memory_share']:.3g} % of the memory, with "
    said += f"{plural(int(s.tokens[phase]), 'token')}, {s.dtype} weights, {s.cache.dtype} cache"
    if s.c.attention == "dsa" or s.c.compress_ratios is not None:
        said += f", {r.indexer_dtype} indexer"
    if drafts := max(each.d.drafts for each in found.every):
        few = "" if r.drafts else "at most "
        said += f", {few}{plural(drafts, 'draft')} accepted with {100 * r.acceptance:.3g} %"
    return said


def _point(each: Served, priced: bool) -> str:
    """Return a deployment with its estimates, bounds, price, memory, and what takes longest."""
    user = f"{human(each.tokens_per_second, 'token/s')} a user (at most {human(each.most_tokens_per_second, '')})"
    if not each.decode:
        user = f"{human(each.time, 's')} to the first token (at least {human(each.least_time, 's')})"
    most, waits = human(each.most_gpu_tokens_per_second, ""), each.waits
    said = f"{each.d.words}: {user}, {human(each.gpu_tokens_per_second, 'token/s')} a GPU (at most {most})"
    said += f", {price}" if (price := _price(each, priced)) else ""
    return f"{said}. {human(each.memory.gpu_memory, 'B')} a GPU; slowest: {max(waits, key=lambda part: waits[part])}."


def _price(each: Served, priced: bool) -> str:
    """Return the rent of a token; "" where there is none, or it may not be told."""
    if not priced or each.cost is None or each.cost_most is None:
        return ""
    return span(each.cost, each.cost_most, "$/token")


def ten_lines(plan: Plan) -> list[str]:
    """Return the plan in a few lines: what does not fit, the model, time, cost, what is slowest, what to ask next."""
    lines = [(name, f"does not fit: {said}.") for name, said in plan.misfit.items()]
    lines += [(name, said) for name, of in lines_of(plan).items() for said in of]
    if plan.hardware.rent and not plan.misfit:
        lines.append(("price", f"a GPU is rented for {plan.hardware.rent}."))
    asks = "--explain kv_cache (or list), --all for the tables, --out plan for a page, --search, "
    lines.append(("next", f"{asks}--vary hardware=h100,b200, --compare kimi-k2"))
    return [heading(plan), *(f"{label:10} {said}" for label, said in lines)]


# --- a plan


def planned(plan: Plan, command: str, *, whole: bool = False) -> Answer:
    """Return the plan in a line for each question, or with all tables.

    Raises: ValueError if neither training nor serving fits.
    """
    require(not plan.refused, plan.refused)
    return Answer(
        record=plan_record(plan),
        lines=ten_lines(plan),
        sections=sections(plan) if whole else [],
        page=lambda: plan_page(plan, command, []),
        status=2 if plan.misfit else 0,
    )


def plan_record(plan: Plan) -> Record:
    """Return a plan: its layout, work and deployments, what is slowest, and its figures and inputs by section."""
    found = plan.found
    return {
        "config": plan.model.source,
        "hardware": plan.hardware.name,
        "layout": plan.request.given(LAYOUT) | {"chosen": plan.inputs.sources["layout"]},
        "work": plan.request.given(("batch", "seq_len", "tokens")),
        "serving": plan.request.given((*SERVING, "acceptance")) if found else {},
        "deployments": {
            phase: {
                "points": {name: point_record(each, not plan.misfit) for name, each in of.points.items()},
                "front": [point_record(each, not plan.misfit) for each in of.front],
                "bound": {"gpus": of.most_gpus, "least_time": of.least_time, "gpu_tokens_per_second": of.most},
                "left_out": {why: n for why, n in of.rejected.items() if n},
            }
            for phase, of in found.items()
            if of.every
        },
        "fits": not plan.misfit,
        "misfit": plan.misfit,
        "unserved": plan.unserved,
        "binds": {stage: plan.longest(stage)[0] for stage in plan.waits},
        "figures": {name: figures_record(figures) for name, figures in plan.sections.items()},
    }


def point_record(each: Served, priced: bool) -> Record:
    """Return a deployment with what it gives, in base units."""
    names = ("time", "least_time", "gpu_tokens_per_second", "most_gpu_tokens_per_second")
    costs = {name: getattr(each, name) if priced else None for name in ("cost", "cost_most")}
    return plain(asdict(each.d) | {name: getattr(each, name) for name in names} | costs)


def figures_record(figures: Figures) -> Record:
    """Return figures by name: value, unit in base units, title and source."""
    return {name: plain(figure.record) for name, figure in figures.items()}


def sections(plan: Plan) -> list[Section]:
    """Return the sections of a plan: a terminal shows the first figures, a page all of them with their formulas."""
    found: list[Section] = []
    for name, (main, *lines) in lines_of(plan).items():
        of = plan.sections.get(name, {})
        shown = [key for key, f in of.items() if f.main and f]
        others = [key for key, f in of.items() if f.formula and key not in shown]
        front = next((found for phase, found in plan.found.items() if phase == name), None)
        section = Section(
            name=f"{name}_section",
            title="What is the model?" if name == "model" else f"What does {name} take?",
            finding=main,
            about=" ".join(lines),
            details={"": _details(plan, shown)} if shown else {},
            folded={plural(len(others), "other figure"): _details(plan, others)} if others else {},
            tables=[front_table(front, not plan.misfit)] if front else [],
            plots=[front_plot(front)] if front else [],
            warnings=[f"does not fit: {plan.misfit[name]}"] if name in plan.misfit else [],
        )
        found.append(section)
    return found


def front_table(found: Deployments, priced: bool) -> Table:
    """Return the deployments of the front, the fastest for a user first: the estimate, then the bound in brackets."""
    rows: list[tuple[str, ...]] = []
    for each in found.front:
        user = (each.tokens_per_second, each.most_tokens_per_second) if each.decode else (each.time, each.least_time)
        gpu = each.gpu_tokens_per_second, each.most_gpu_tokens_per_second
        unit = "token/s" if each.decode else "s"
        cells = (f"{human(a, u)} ({human(b, u)})" for (a, b), u in ((user, unit), (gpu, "token/s")))
        rows.append((each.d.words, *cells, _price(each, priced) or NOTHING, human(each.memory.gpu_memory, "B")))
    columns = ("deployment", "a user" if found.phase == "decode" else "first token", "a GPU", "price", "memory")
    rent = found.main.s.h.rent
    common = "Front: none gives both a user and a GPU more." + (f" Rent: {rent}." if rent and priced else "")
    return Table(columns=columns, rows=rows, numeric=columns[1:], common=common)


def front_plot(found: Deployments) -> Plot:
    """Return the front as a picture: tokens/s of a user and of a GPU, the estimate and the bound."""
    front, label = found.front, ("estimate", "bound of the same")
    x = [1 / each.time for each in front], [1 / each.least_time for each in front]
    y = [each.gpu_tokens_per_second for each in front], [each.most_gpu_tokens_per_second for each in front]
    series = [Series(label=label[i], x=x[i], y=y[i], kind="points", dashed=i > 0) for i in range(2)]
    of = "tokens/s of a user" if found.phase == "decode" else "first tokens a second"
    return Plot(title=f"Front of {found.phase}", x=of, y="tokens/s of a GPU", series=series, log_x=True, log_y=True)


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
    inputs = [name for name, f in figures.items() if not (f.formula or f.main)]
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


def explained(of: Plan | Figures, name: str, width: int, depth: int | None = None) -> Answer:
    """Return the explanation of a figure, or all names for "list".

    Args:
        of: plan, or figures of a model alone.
        depth: most formulas between a figure and this one.

    Raises: ValueError for an unknown figure, with the nearest known ones, and for one of what does not fit.
    """
    figures = of.figures if isinstance(of, Plan) else of
    if isinstance(of, Plan) and name not in figures:
        unfit = of.misfit.get(name.partition("_")[0])
        if unfit or any(name in every for every in of.every.values()):
            raise ValueError(f"{name} has no value: {unfit or next(iter(of.misfit.values()))}")
    if name == "list":
        lines = [f"{key:32} {figure!s:>24}  {figure.title}" for key, figure in figures.items()]
        return Answer(record=figures_record(figures), lines=[f"{len(figures)} figures and inputs", *lines])
    found = explain(figures, name, depth)
    record = {kind: [asdict(step) for step in steps] for kind, steps in found.items()}
    lines, left = [text(found, width)], len(needed(figures, name)) - sum(map(len, found.values()))
    if left:
        lines.append(f"\n{plural(left, 'figure')} and inputs more are further away; leave out --depth for all.")
    return Answer(record=record, lines=lines)


# --- comparisons


def searched(plan: Plan, command: str, on_part: OnPart = quiet) -> Answer:
    """Return the layouts that fit, fastest first, and the plan of the fastest on the page.

    Raises: ValueError if no layout fits, with what would fit.
    """
    precisions = tuple(p for p in EVERY["precision"] if p == "bf16" or "fp8" in plan.hardware.peaks)
    if plan.request.precision == "fp32":
        precisions = ("fp32",)
    options = {**EVERY, "precision": precisions, **{name: (value,) for name, value in plan.asked.given().items()}}
    search = Search(m=plan.m, hardware=plan.hardware, assumed=plan.inputs, base=plan.training.layout, options=options)
    found = search.fastest(12, on_part)
    if not found:
        raise ValueError(what_would_fit(search))
    how = "the fastest of all that fit"
    best = changed(plan, asdict(found[0][-1].layout), plan.hardware, how)
    best.inputs.sources["layout"] = how
    by_parts = replace(plan.inputs, request=replace(plan.request, utilization=None))
    records: list[Record] = []
    rows: list[tuple[str, ...]] = []
    for seconds, memory, _, t in found:
        mfu, binds = Run(t, by_parts).mfu, max(t.parts, key=lambda part: t.parts[part])
        records.append({**asdict(t.layout), "memory": memory, "step_seconds": seconds, "mfu": mfu, "binds": binds})
        cells = human(seconds, "s"), binds, human(memory, "B"), f"{mfu:.3f}", _layout(t.layout)
        rows.append((str(len(records)), *cells))
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
    """Return the plans of all values of one thing, or of all pairs of two, side by side."""
    axes = [read_axis(text) for text in texts]
    variants, names = vary(plan, axes, names, on_part)
    title = f"What changes with {', '.join(name for name, _ in axes)}?"
    finding = "The layout of training stays; deployments are searched again for each, where you left them open: "
    finding += _terms(variants)
    section = _comparison(title, finding, variants, names, plan.unserved)
    return _side(variation_record(variants, names), [heading(plan)], section, plan, command, _status(variants))


def compare(request: PlanRequest, models: Sequence[Model], command: str, on_part: OnPart = quiet) -> Answer:
    """Return the plans of several models on equally many GPUs for training, and the best deployments of each."""
    hardware = load_hardware(request.hardware)
    gpus = int(request.gpus or min(presets()["deepseek-v3"]["training"]["gpus"], hardware.most_gpus))
    request = replace(request, gpus=gpus)
    makers = [({"model": model.name}, functools.partial(make_plan, request, model, hardware)) for model in models]
    variants = side_by_side(makers, on_part)
    names = ["tokens", "seq_len", *compared(variants), "training_gpu_hours"]
    title = f"How do they compare on {hardware.title}?"
    finding = f"Training takes {plural(gpus, 'GPU')} in the layout that a plan of each chooses, and the tokens of each "
    finding += f"config, or --tokens for all. Deployments are searched for each: {_terms(variants)}"
    section = _comparison(title, finding, variants, names)
    first = next(each.plan for each in variants if each.plan is not None)
    return _side(variation_record(variants, names), [], section, first, command, _status(variants))


def _status(variants: Sequence[Variant]) -> int:
    """Return 0 where a variant fits, else 2."""
    return 0 if any(each.plan is not None and not each.plan.misfit for each in variants) else 2


def _side(record: Record, lines: Sequence[str], section: Section, plan: Plan, command: str, status: int = 0) -> Answer:
    """Return an answer that is a section next to a plan's page."""
    page = functools.partial(plan_page, plan, command, [section])
    return Answer(record=record, lines=lines, sections=[section], page=page, status=status)


def _comparison(
    title: str, finding: str, variants: Sequence[Variant], names: Sequence[str], unserved: str = ""
) -> Section:
    """Return a row for each figure and a column for each variant that has a plan, with what has none, and why.

    Args:
        unserved: reason that needs no mention.
    """
    made = [(each, each.plan) for each in variants if each.plan is not None]
    columns = [each.at.removeprefix("model=").removeprefix("deepseek-") for each, _ in made]
    rows, low = list[tuple[str, ...]](), list[str]()
    for name in names:
        of = [p.figures.get(name) for _, p in made]
        first = next((f for f in of if f is not None), None)
        if first is None:  # of nothing that fits
            continue
        cells, unit = alike(of, first.unit)
        phase = f"{name.partition('_')[0]}: " if name.startswith(PHASES) else ""
        if not (name.endswith("cost_most") and cells == low):  # a price that is no range
            unit = f" ({unit})" if unit and not re.search(rf"\b{re.escape(unit)}\b", first.title, re.IGNORECASE) else ""
            rows.append((f"{phase}{first.title}{unit}", *cells))
        low = cells
    warnings = [f"{each.at}: {each.problem}" for each in variants if each.problem]
    warnings += [
        f"{each.at}: serving is not planned: {p.unserved}" for each, p in made if p.unserved not in ("", unserved)
    ]
    warnings += [f"{each.at}: {n} does not fit: {said}" for each, p in made for n, said in p.misfit.items()]
    warnings += [f"{each.at}: {said}" for each, p in made if (said := _forced(p))]
    unpriced = sorted({p.hardware.name for _, p in made if p.hardware.price is None})
    if unpriced and any(p.hardware.price for _, p in made):
        warnings.append(f"no price of {', '.join(unpriced)} is published; --price, in dollars an hour, adds costs")
    rents = {f"{p.hardware.title} {p.hardware.rent}": 1 for _, p in made if not p.misfit and p.hardware.rent}
    common = f"Rent: {'; '.join(rents)}." if rents else ""
    table = Table(columns=("", *columns), rows=rows, numeric=columns, common=common)
    return Section(name="variation_section", title=title, finding=finding, tables=[table], warnings=warnings)


def _terms(variants: Sequence[Variant]) -> str:
    """Return the limits and lengths that the deployments of some plans are the cheapest for."""
    requests = [each.plan.request for each in variants if each.plan is not None and each.plan.service is not None]

    def ends(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return span(min(known), max(known), "")

    if not requests:
        return "none can be planned."
    tpot, ttft = ends(r.tpot or TPOT for r in requests), ends(r.ttft or TTFT for r in requests)
    lengths = f"{ends(r.context for r in requests)} tokens of context and prompts of {ends(r.prompt for r in requests)}"
    return f"the cheapest in {tpot} ms an output token and {ttft} s to the first token, with {lengths}."


def variation_record(variants: Sequence[Variant], names: Sequence[str]) -> Record:
    """Return for each variant its figures, or why there are none."""
    plans: list[Record] = []
    for each in variants:
        found: Record = {**each.values, "problem": each.problem or None}
        if each.plan is not None:
            found |= {"fits": not each.plan.misfit, "misfit": each.plan.misfit}
            found |= {name: f.plain for name in names if (f := each.plan.figures.get(name)) is not None}
        plans.append(found)
    return {"plans": plans}
