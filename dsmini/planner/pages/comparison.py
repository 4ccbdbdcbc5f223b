"""Sections that compare plans: a variation over one axis as table and plots, over two as heat maps, and a search."""

from collections.abc import Iterator, Sequence

from dsmini.planner.quantities.display import short
from dsmini.planner.quantities.explanation import shown
from dsmini.planner.quantities.quantity import Anything
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.search import Candidate
from dsmini.planner.varied_axis import VariedAxis
from dsmini.planner.vary import Variation
from dsmini.report import HeatMap, Plot, Section, Series, Table

MOST_PLOTS, MOST_HEAT_MAPS = 8, 8
"""Most figures of a variation that are drawn; the table has all."""
BAR = 12
"""Length of the longest bar of a terminal, in characters."""
WIDE = 20.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""


def variation_section(variation: Variation, *, full: bool) -> Section:
    """Return the section of a variation.

    Args:
        full: for a page, with plots and a wide table; else for a terminal, with a line and a bar for each value.
    """
    axes = variation.axes
    one = len(axes) == 1
    return Section(
        name="variation_section",
        title=f"What changes with {' and '.join(axis.name for axis in axes)}?",
        finding=_finding(variation),
        plots=list(_plots(variation)) if one and full else (),
        heat_maps=() if one else list(_heat_maps(variation)),
        tables=[_table(variation) if full else _bars(variation)] if one else (),
        warnings=[f"{_at(axes, place)}: {reason}" for place, reason in variation.problems.items()],
        about="All else is as in the plan: layout, deployments, sequences and context stay.",
    )


def search_section(candidates: Sequence[Candidate], *, full: bool) -> Section:
    """Return the section of a search: layouts that fit, fastest first.

    Args:
        full: for a page, with a column for each choice; else for a terminal, with the layout in one.
    """
    best = candidates[0]
    names = ("pipeline", "expert", "tensor", "zero", "recompute", "precision", "micro_batch", "schedule")
    layouts = [[str(getattr(found.layout, name)) for name in names] for found in candidates]
    if not full:
        layouts = [[_in_short(found.layout)] for found in candidates]
    results = [
        (shown(c.plan.step.roof_step), c.binds, shown(c.plan.memory_needed), shown(c.plan.step.roof_utilization))
        for c in candidates
    ]
    rows = [(str(i + 1), *found, *layout) for i, (layout, found) in enumerate(zip(layouts, results, strict=True))]
    columns = ("", "step", "binds", "memory", "MFU", *(names if full else ("layout",)))
    numeric = ("", "pipeline", "expert", "tensor", "zero", "micro_batch", "memory", "step", "MFU")
    return Section(
        name="search_section",
        title=f"Which layouts fit {best.layout.gpus:,} GPUs?",
        finding=(
            f"The fastest takes {shown(best.plan.step.roof_step)} a step with {shown(best.plan.memory_needed)} on the "
            f"fullest GPU; it is bound by {best.binds}."
        ),
        tables=[Table(columns=columns, rows=rows, numeric=numeric)],
        about="One layout for each sizes of parallelism, with its fastest choices that fit. Memory is a lower bound.",
    )


def _in_short(layout: Layout) -> str:
    """Return a layout as the options that ask for it."""
    sizes = f"pipeline {layout.pipeline}, expert {layout.expert}, tensor {layout.tensor}, zero {layout.zero}"
    return f"{sizes}, micro-batch {layout.micro_batch}, {layout.schedule}, {layout.recompute}, {layout.precision}"


def _finding(variation: Variation) -> str:
    """Tell between which values the first figure lies."""
    name = variation.names[0]
    found = [(place, figure) for place in variation.plans if (figure := variation.figure(name, place)) is not None]
    low, high = min(found, key=lambda pair: pair[1].value), max(found, key=lambda pair: pair[1].value)
    if low[1].value == high[1].value:
        return f"{low[1].title}: {shown(low[1])} everywhere."
    return (
        f"{low[1].title}: from {shown(low[1])} at {_at(variation.axes, low[0])} to {shown(high[1])} at "
        f"{_at(variation.axes, high[0])}."
    )


def _at(axes: Sequence[VariedAxis], place: tuple[int, ...]) -> str:
    return ", ".join(f"{axis.name}={axis.labels[i]}" for axis, i in zip(axes, place, strict=True))


def _any(variation: Variation, name: str) -> Anything:
    return next(figure for place in variation.plans if (figure := variation.figure(name, place)) is not None)


def _table(variation: Variation) -> Table:
    (axis,) = variation.axes
    rows = [
        (_any(variation, name).title, *(variation.cell(name, (i,)) for i in range(len(axis.values))))
        for name in variation.names
    ]
    return Table(columns=(axis.name, *axis.labels), rows=rows, numeric=axis.labels)


def _bars(variation: Variation) -> Table:
    """Return a line for each figure and value, with a bar."""
    (axis,) = variation.axes
    rows: list[tuple[str, ...]] = []
    for name in variation.names:
        found = [variation.figure(name, (i,)) for i in range(len(axis.values))]
        largest = max((abs(figure.value) for figure in found if figure is not None), default=0.0) or 1.0
        title = _any(variation, name).title
        for i, figure in enumerate(found):
            if figure is not None:
                rows.append((title, axis.labels[i], short(figure), "█" * round(BAR * abs(figure.value) / largest)))
                title = ""
    return Table(columns=("figure", axis.name, "value", ""), rows=rows, numeric=(axis.name, "value"))


def _plots(variation: Variation) -> Iterator[Plot]:
    """Yield a plot for each figure: a line over numbers, bars over names."""
    (axis,) = variation.axes
    for name in variation.names[:MOST_PLOTS]:
        pairs = [(i, f) for i in range(len(axis.values)) if (f := variation.figure(name, (i,))) is not None]
        title, unit, y = pairs[0][1].title, pairs[0][1].units, [figure.value for _, figure in pairs]
        if axis.numeric:
            x = [float(axis.values[i]) for i, _ in pairs]
            order = sorted(range(len(x)), key=x.__getitem__)
            series = [Series(label="", x=[x[i] for i in order], y=[y[i] for i in order])]
            yield Plot(title=title, x=axis.name, y=unit, series=series, log_x=_is_wide(x), log_y=_is_wide(y))
        else:
            series = [Series(label="", x=[float(i) for i, _ in pairs], y=y, kind="bars")]
            yield Plot(title=title, x="", y=unit, series=series, labels=axis.labels)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > WIDE * min(values)


def _heat_maps(variation: Variation) -> Iterator[HeatMap]:
    down, across = variation.axes
    for name in variation.names[:MOST_HEAT_MAPS]:
        places = [[(i, j) for j in range(len(across.values))] for i in range(len(down.values))]
        figures = [[variation.figure(name, place) for place in row] for row in places]
        yield HeatMap(
            title=_any(variation, name).title,
            x=across.name,
            y=down.name,
            columns=across.labels,
            rows=down.labels,
            values=[[None if figure is None else figure.value for figure in row] for row in figures],
            cells=[[variation.cell(name, place) for place in row] for row in places],
        )
