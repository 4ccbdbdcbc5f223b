"""The parts of a step by its forecast, and which limits each of them here, memory or arithmetic.

Each distinct call of a step was timed alone (measure/price.py). A call with F FLOPs that must move b bytes cannot be
faster than

    rate <= min(peak, F / b * bandwidth)

Where F / b is below the ridge, peak / bandwidth, memory is its limit. Decoding one sequence does two FLOPs with each
weight that it reads, far below the ridge.
"""

from dsmini.diagnosis.arms import percent
from dsmini.measure.price import BETWEEN, Forecast
from dsmini.measure.roofs import Roofs
from dsmini.report import Plot, Section, Series, Table
from dsmini.report.units import digits, human

LEAST_SHARE = 0.005
"""Share of a step below which a call is not drawn."""
MOST_KINDS = 4
"""Number of kinds that the plot names, by their time."""


def section(forecast: Forecast, roofs: Roofs) -> Section:
    """Return the section of a page: parts of a step by their time, and calls with products under the roof."""
    peak = roofs.peak_of(forecast.shape.dtype)
    ridge, kinds, rows = peak / roofs.memory, forecast.by_class, list[list[str]]()
    for kind, seconds in kinds.items():
        parts = [part for part in forecast.parts if part.kind == kind]
        number, roof = sum(part.number for part in parts), sum(part.roof for part in parts)
        rows.append([kind, f"{number:,}", digits(1e3 * seconds), digits(1e3 * roof) if roof else ""])
    calls = [part for part in forecast.parts if part.kind != BETWEEN]
    below = sum(part.seconds for part in calls if part.flops < ridge * part.moved) / sum(part.seconds for part in calls)
    largest = next(iter(kinds))
    bars = Series(label="forecast", x=(), y=[1e3 * s for s in kinds.values()], kind="bars", dashed=True)
    columns = ("part", "calls", "ms", "roof ms")
    return Section(
        name="step",
        title="What does a step consist of, and what limits its parts?",
        finding=f"By the forecast of this machine's rates {percent(kinds[largest] / forecast.seconds)} of a step is "
        f"{largest}. {percent(below)} of the time of operations lies below {ridge:.0f} FLOPs a byte, where memory or a "
        f"cache is the limit. Products take {human(forecast.flops, 'FLOP')} a step.",
        plots=[
            Plot(title="Parts of a step", x="class of operations", y="ms", series=[bars], labels=list(kinds)),
            _under_the_roof(forecast, roofs.memory, peak),
        ],
        tables=[Table(columns=columns, rows=rows, numeric=columns[1:])],
        about="Each call was timed alone. Above the sloping roof its bytes come from a cache.",
    )


def _under_the_roof(forecast: Forecast, bandwidth: float, peak: float) -> Plot:
    """Return the calls with products under the roof of bandwidth and peak."""
    calls = [part for part in forecast.parts if part.flops and part.seconds >= LEAST_SHARE * forecast.seconds]
    ridge, at = peak / bandwidth, [part.flops / part.moved for part in calls]
    low, high = min([*at, ridge]) / 2, max([4 * ridge, *(2 * each for each in at)])
    series = [Series(label="roof", x=[low, ridge, high], y=[low * bandwidth, peak, peak], dashed=True)]
    named = list(dict.fromkeys(part.kind for part in calls))[:MOST_KINDS]
    for label in (*named, "others"):
        some = [part for part in calls if (part.kind if part.kind in named else "others") == label]
        x, y = [part.flops / part.moved for part in some], [part.flops / part.seconds for part in some]
        series += [Series(label=label, kind="points", x=x, y=y)] if some else []
    return Plot(title="Calls of a step", x="FLOPs a byte", y="FLOP/s", series=series, log_x=True, log_y=True)
