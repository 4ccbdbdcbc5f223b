"""The forecast of a step: its parts, and which limits each of them here, memory or arithmetic.

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


def section(forecast: Forecast, roofs: Roofs) -> Section:
    """Return the section on a forecast: its longest parts, the roofs, memory, and a table of all parts."""
    ridge, kinds, rows = roofs.peak_of(forecast.shape.dtype) / roofs.memory, forecast.by_class, list[list[str]]()
    for kind, seconds in kinds.items():
        parts = [part for part in forecast.parts if part.kind == kind]
        number, roof = sum(part.number for part in parts), sum(part.roof for part in parts)
        rows.append([kind, f"{number:,}", digits(1e3 * seconds), digits(1e3 * roof) if roof else ""])
    calls = [part for part in forecast.parts if part.kind != BETWEEN]
    below = sum(part.seconds for part in calls if part.flops < ridge * part.moved) / sum(part.seconds for part in calls)
    longest = ", ".join(f"{kind} {percent(s / forecast.seconds)}" for kind, s in list(kinds.items())[:3])
    bars = Series(label="forecast", x=(), y=[1e3 * s for s in kinds.values()], kind="bars", dashed=True)
    columns = ("part", "calls", "ms", "roof ms")
    return Section(
        name="step",
        title="What does a step consist of, and what limits its parts?",
        finding=f"Forecast before a step ran: {human(forecast.seconds, 's')}, the longest parts {longest}. At this "
        f"machine's peak and bandwidth alone it would take {human(sum(part.roof for part in forecast.parts), 's')}. "
        f"{percent(below)} of the time of operations lies below {ridge:.0f} FLOPs a byte, where memory or a cache is "
        f"the limit. A step takes {human(forecast.flops, 'FLOP')} in products, and at most "
        f"{human(forecast.peak, 'B')} of memory in tensors.",
        plots=[Plot(title="Parts of a step", x="class of operations", y="ms", series=[bars], labels=list(kinds))],
        tables=[Table(columns=columns, rows=rows, numeric=columns[1:])],
        about="Each call was timed alone. Calls are what Python and torch spend around each operation.",
    )
