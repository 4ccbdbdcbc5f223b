"""Plan as JSON: what was planned, and every figure in base units, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsmini.planner.published.published import PublishedFigure
from dsmini.planner.quantities.explanation import Explanation
from dsmini.planner.quantities.quantity import Anything
from dsmini.planner.training.search import Candidate
from dsmini.planner.vary import Variation
from dsmini.planner.whole import Plan
from dsmini.report.figures import plain

Record = dict[str, Any]


def plan_record(plan: Plan) -> Record:
    """Return a plan: its setup, what binds, and its figures by section and name."""
    s = plan.setup
    bindings = {"training": plan.training_binding}
    if plan.serving is not None:
        bindings |= {"decode": plan.serving.decode.times.binding, "prefill": plan.serving.prefill.times.binding}
    return {
        "config": s.model.source,
        "hardware": s.hardware.name,
        "layout": layout_record(plan.training.layout) | {"chosen": s.layout.how},
        "fits": plan.training.fits,
        "unserved": s.unserved,
        "binds": {stage: found.first.resource.value for stage, found in bindings.items()},
        "figures": {name: figures_record(figures) for name, figures in plan.sections.items()},
    }


def figures_record(figures: Mapping[str, Anything]) -> Record:
    """Return figures by name: value, unit in base units, title and source."""
    return {
        name: {"value": plain(f.value), "unit": f.units, "title": f.title, "source": f.source}
        for name, f in figures.items()
    }


def layout_record(layout: Any) -> Record:
    """Return the fields of a layout."""
    return {name: getattr(layout, name) for name in type(layout).__dataclass_fields__}


def search_record(candidates: Sequence[Candidate]) -> list[Record]:
    """Return the layouts of a search, fastest first."""
    return [
        layout_record(found.layout)
        | {
            "memory": found.plan.memory_needed.value,
            "step_seconds": found.plan.step.roof_step.value,
            "utilization": found.plan.step.roof_utilization.value,
            "binds": found.binds,
        }
        for found in candidates
    ]


def variation_record(variation: Variation) -> Record:
    """Return a variation: the axes, and for each place its figures or why there are none."""
    places = sorted({*variation.plans, *variation.problems})
    return {
        "axes": {axis.name: list(axis.values) for axis in variation.axes},
        "plans": [
            {axis.name: axis.values[i] for axis, i in zip(variation.axes, place, strict=True)}
            | {"problem": variation.problems.get(place)}
            | ({"fits": variation.plans[place].training.fits} if place in variation.plans else {})
            | {n: f.value for n in variation.names if (f := variation.figure(n, place)) is not None}
            for place in places
        ],
    }


def explanation_record(explanation: Explanation) -> Record:
    """Return the steps and the inputs of a figure."""
    steps = [{name: getattr(step, name) for name in type(step).__dataclass_fields__} for step in explanation.steps]
    lines = [{name: getattr(line, name) for name in type(line).__dataclass_fields__} for line in explanation.inputs]
    return {"steps": steps, "inputs": lines}


def published_record(figures: Sequence[PublishedFigure]) -> list[Record]:
    """Return published figures: printed, ours, residual and status."""
    return [
        {
            "fact": f.row,
            "name": f.name,
            "what": f.what,
            "printed": f.printed.value,
            "ours": None if f.ours is None else f.ours.value,
            "unit": f.printed.units,
            "residual": f.residual,
            "within": f.within,
            "status": f.status,
            "source": f.source,
            "note": f.note,
        }
        for f in figures
    ]
