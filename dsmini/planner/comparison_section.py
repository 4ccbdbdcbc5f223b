"""Sections that compare plans: a variation over one axis as table and plots, over two as heat maps, and a search."""

from collections.abc import Iterator, Sequence

from dsmini.planner.explanation import shown
from dsmini.planner.quantity import Anything
from dsmini.planner.search import Candidate
from dsmini.planner.vary import VariedAxis, Variation
from dsmini.report import HeatMap, Plot, Section, Series, Table

MOST_PLOTS, MOST_HEAT_MAPS = 8, 8
"""Most figures of a variation that are drawn; the table has all."""
WIDE = 20.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""


def variation_section(variation: Variation) -> Section:
    """Return the section of a variation."""
    axes = variation.axes
    one = len(axes) == 1
    return Section(
        name="variation_section",
        title=f"What changes with {' and '.join(axis.name for axis in axes)}?",
        finding=_finding(variation),
        plots=list(_plots(variation)) if one else (),
        heat_maps=() if one else list(_heat_maps(variation)),
        tables=[_table(variation)] if one else (),
        warnings=[f"{_at(axes, place)}: {reason}" for place, reason in variation.problems.items()],
        about="All else is as in the plan: layout, deployments, sequences and context stay.",
    )


def search_section(candidates: Sequence[Candidate]) -> Section:
    """Return the section of a search: layouts that fit, fastest first."""
    columns = ("pipeline", "expert", "tensor", "ZeRO", "recompute", "precision", "micro-batch", "schedule")
    rows = [
        (
            str(number),
            *(str(value) for value in _choices(found)),
            shown(found.plan.memory_needed),
            shown(found.plan.step.roof_step),
            shown(found.plan.step.roof_utilization),
            found.binds,
        )
        for number, found in enumerate(candidates, 1)
    ]
    best = candidates[0]
    return Section(
        name="search_section",
        title=f"Which layouts fit {best.layout.gpus:,} GPUs?",
        finding=(
            f"The fastest takes {shown(best.plan.step.roof_step)} a step with {shown(best.plan.memory_needed)} on the "
            f"fullest GPU; {best.binds} binds it."
        ),
        tables=[
            Table(
                columns=("", *columns, "memory", "step", "MFU", "binds"),
                rows=rows,
                numeric=("", "pipeline", "expert", "tensor", "ZeRO", "micro-batch", "memory", "step", "MFU"),
            )
        ],
        about="One layout for each sizes of parallelism, with its fastest choices that fit. Memory is a lower bound.",
    )


def _choices(found: Candidate) -> tuple[object, ...]:
    layout = found.layout
    sizes = (layout.pipeline, layout.expert, layout.tensor, layout.zero)
    return (*sizes, layout.recompute, layout.precision, layout.micro_batch, layout.schedule)


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
