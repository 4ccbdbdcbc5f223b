"""Page of a plan: the sections of a Report, each number with its formula behind a click, and the chain of reasons.

A terminal gets the figures that a section shows first. The page has all of them, all inputs with their sources, why the
architecture is as it is, and the published figures with their residuals.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from dsmini.planner.binding import Binding, Vocabulary
from dsmini.planner.pages.coverage import coverage
from dsmini.planner.pages.sections import SectionOfPlan, sections
from dsmini.planner.pages.why import why
from dsmini.planner.quantities.display import short
from dsmini.planner.quantities.explanation import Explanation, Step, explain, named, shown
from dsmini.planner.quantities.quantity import Anything
from dsmini.planner.whole import Plan
from dsmini.report import Detail, Report, Section, Table
from dsmini.report.units import plural

LEAD = "Predicted from sizes and data sheets. Nothing was measured. Each number opens its formula."
LEAD_HERE = "Predicted from sizes, and from rates that were measured on this machine. Each number opens its formula."


def plan_report(plan: Plan, *, full: bool, more: Sequence[Section] = (), command: str = "") -> Report:
    """Return a plan as a report.

    Args:
        full: all figures with their formulas, reasons, published figures and inputs, for a page; else what a terminal
            shows.
        more: sections to add, such as a search or a variation.
    """
    found = list(sections(plan))
    known = _steps(plan) if full else {}
    made = [_section(section, known, full) for section in found]
    made.append(_binds(plan))
    made += more
    if full:
        made += [_why(plan), coverage(), *_rest(plan, found, known)]
    return Report(
        title=f"{plan.setup.model.name} on {plan.setup.hardware.title}",
        lead=(LEAD_HERE if plan.setup.hardware.name == "this" else LEAD) if full else "",
        sections=made,
        highlights=list(_highlights(plan)),
        facts_title="What is planned",
        facts=facts(plan),
        command=command,
    )


def _section(section: SectionOfPlan, known: dict[str, Step], full: bool) -> Section:
    first = [_detail(f, known) for f in section.headlines.values()]
    if not full:
        first = [Detail(name=f.name, title=f.title, value=short(f)) for f in section.headlines.values()]
    others = [_detail(f, known) for f in section.others.values()] if full else []
    return Section(
        name=f"{section.name}_section",
        title=section.title,
        finding=section.finding,
        details={"" if full else section.title: first} if first else {},
        folded={f"{plural(len(others), 'other figure')}": others} if others else {},
        warnings=section.warnings,
    )


def _steps(plan: Plan) -> dict[str, Step]:
    """Return the step of every figure that the plan's figures need."""
    found: dict[str, Step] = {}
    for name, figure in plan.all.items():
        if name not in found and figure.op != "input":
            made: Explanation = explain(figure)
            found |= {step.name: step for step in made.steps}
    return found


def _detail(figure: Anything, known: dict[str, Step]) -> Detail:
    step = known.get(figure.name)
    if step is None:
        note = f"Source: {figure.source}" if figure.source else ""
        return Detail(name=figure.name, title=figure.title, value=shown(figure), note=note)
    exact = [] if step.exact == step.value else [f"= {step.exact}"]
    return Detail(
        name=step.name,
        title=step.title,
        value=step.value,
        lines=[*(f"= {line}" for line in dict.fromkeys((step.formula, step.numbers))), *exact, *step.choices],
        note=f"Source: {step.source}" if step.source else "",
        needs=step.needs,
    )


def _rest(plan: Plan, found: Iterable[SectionOfPlan], known: dict[str, Step]) -> Iterator[Section]:
    """Yield a section of steps that are in no other one, and one of all inputs."""
    shown_there = {name for section in found for name in (*section.headlines, *section.others)}
    every = named(plan.all.values())
    steps = [_detail(f, known) for name, f in every.items() if name not in shown_there and f.op != "input"]
    inputs = [_detail(f, known) for f in every.values() if f.op == "input"]
    yield Section(
        name="inputs_section",
        title="What is it computed from?",
        finding=f"{len(inputs)} inputs, each with its source, give {len(every) - len(inputs)} figures.",
        folded={plural(len(inputs), "input"): inputs}
        | ({plural(len(steps), "step") + " between": steps} if steps else {}),
    )


def _binds(plan: Plan) -> Section:
    """Return what binds training, decode and prefill."""
    stages: dict[str, Binding] = {"training": plan.training_binding}
    if plan.serving is not None:
        stages |= {"decode": plan.serving.decode.times.binding, "prefill": plan.serving.prefill.times.binding}
    rows = [
        (
            stage,
            found.first.resource.value,
            "" if found.ratio is None else f"{found.ratio.value:.3g}",
            "" if found.second is None else found.second.resource.value,
            *(found.axis(vocabulary).value for vocabulary in Vocabulary),
        )
        for stage, found in stages.items()
    ]
    columns = ("step", "binds", "times", "next", "article's word", "textbook's word")
    return Section(
        name="binding_section",
        title="What binds?",
        finding=" ".join(f"{stage.capitalize()}: {found.first.resource.value}." for stage, found in stages.items()),
        tables=[Table(columns=columns, rows=rows, numeric=("times",))],
        about=(
            "Making what binds faster gains at most this many times. The parts of serving overlap, so there the next "
            "binds then. Those of a training step run one after the other, and hide each other: the step is computed "
            "again as if what binds took no time; next is what gains second most. Two vocabularies name a resource: by "
            "who owns the limit, or by the largest term of time = bytes / bandwidth + operations / (peak * "
            "utilisation) + latency."
        ),
    )


def _why(plan: Plan) -> Section:
    return Section(
        name="why_section",
        title="Why this architecture?",
        finding="The machine shapes the algorithm, and both shape the data.",
        prose=list(why(plan)),
    )


def _highlights(plan: Plan) -> Iterator[tuple[str, str]]:
    yield shown(plan.cache.per_token).partition("/")[0], "of cache a token"
    yield shown(plan.training.memory_needed), "of memory on the fullest GPU in training"
    cost = plan.training.time.cost
    if plan.training.fits:
        running = (shown(plan.reliability.running), "of training")
        yield running if cost is None else (shown(cost), "rent of the training")
    if plan.serving is not None:
        yield shown(plan.serving.decode.tokens_per_second), "for each decoding sequence"


def facts(plan: Plan) -> dict[str, dict[str, str]]:
    """Return what is planned, in cards: model, hardware, training, serving."""
    s, config, hardware = plan.setup, plan.setup.m.config, plan.setup.hardware
    layout = plan.training.layout
    moe = config.n_dense_layers < config.n_layers
    model = {
        "file": s.model.source,
        "layers": f"{config.n_layers}, {min(config.n_dense_layers, config.n_layers)} dense",
        "width": f"{config.dim:,}",
        "attention": f"{config.attention.upper()}, {config.n_heads} heads",
        "routed experts": f"{config.n_activated_experts} of {config.n_routed_experts}" if moe else "",
        "MTP depths": str(config.n_mtp_layers),
    }
    links = {"within a node": hardware.fast_link, "between nodes": hardware.slow_link, "rent": hardware.price}
    machine = {
        "device": hardware.title,
        **{f"peak, {dtype}": shown(peak) for dtype, peak in hardware.peaks.items()},
        "memory": f"{shown(1 * hardware.memory)} at {shown(hardware.memory_bandwidth)}",
        **{name: shown(link) for name, link in links.items() if link is not None},
    }
    chosen = dataclasses.asdict(layout)
    training = {
        "layout": s.layout.how,
        **{name.replace("_", " "): str(value) for name, value in chosen.items()},
        "sequences a step": f"{s.workload.batch.value:,.0f} of {shown(s.workload.seq_len)}",
        "tokens": shown(s.workload.tokens),
    }
    cards = {"Model": model, "Hardware": machine, "Training": training}
    if s.serving is not None:
        w = s.serving.workload
        cards["Serving"] = {
            **{
                stage: f"{plural(round(made.deployment.expert_parallel.value), 'GPU')}, {made.how}"
                for stage, made in (("decode", s.serving.decode), ("prefill", s.serving.prefill))
            },
            "weights": s.serving.decode.deployment.weight_dtype,
            "cache": s.serving.decode.deployment.cache_dtype,
            "sequences of a GPU": f"{w.sequences.value * s.serving.decode.deployment.micro_batches.value:,.0f}",
            "context": shown(w.context),
            "prompt": shown(w.prompt),
        }
    return {title: {name: value for name, value in card.items() if value} for title, card in cards.items()}
