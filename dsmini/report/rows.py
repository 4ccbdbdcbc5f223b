"""Figures as tables of words, the same for terminal and page."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from dsmini.report import units
from dsmini.report.figures import Figure, Table, Toned, Value

NEAR, FAR = 1.1, 1.5
"""Factors between measurement and prediction: near below the first, far above the second."""
WIDEST = 4.0
"""Ratio at one end of its bar; the other end is the inverse."""
MEASURED = ("predicted", "measured", "95 % interval", "measured / predicted")


def interval(figure: Figure) -> str:
    """Return the ends of the 95 % interval; "" without one."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = (units.human(end, figure.unit) for end in (figure.low, figure.high))
    same_unit = low.partition(" ")[2] == high.partition(" ")[2]
    return f"{low.partition(' ')[0] if same_unit else low} to {high}"


def ratio(figure: Figure) -> Toned:
    """Return measured over predicted, such as 0.87, or = or ≠ for an exact count; how far off it is, and its bar."""
    found, equal = figure.ratio, figure.equal
    if equal is not None:
        return Toned("=", "equal") if equal else Toned("≠", "unequal")
    if found is None:
        return Toned("", "none")
    words = f"{found:.2f}" if 0.1 <= found < 100 else units.digits(found)
    if found <= 0:
        return Toned(words, "none")
    off = max(found, 1 / found)
    tone = "near" if off <= NEAR else "off" if off <= FAR else "far"
    share = 50 * max(-1.0, min(1.0, math.log(found) / math.log(WIDEST)))
    # a limit may be far away
    return Toned(words, "bound" if figure.bound else tone, (round(50 + min(0.0, share), 2), round(abs(share), 2)))


def case_words(figure: Figure, without: Collection[str] = ()) -> str:
    """Return a case in one line, without these keys."""
    return ", ".join(f"{units.words(k)} {units.shown(v)}" for k, v in figure.case.items() if k not in without)


def shared(figures: Sequence[Figure]) -> dict[str, Value]:
    """Return the keys and values that the cases of all figures have in common."""
    if len(figures) < 2:
        return {}
    return {k: v for k, v in figures[0].case.items() if all(str(f.case.get(k)) == str(v) for f in figures)}


def tables(figures: Sequence[Figure], notes: Sequence[str] = ()) -> list[Table]:
    """Return figures as tables, one for all whose cases have the same keys.

    Args:
        notes: sentences of which a measured value has the number.
    """
    by_keys: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        by_keys.setdefault(tuple(figure.case), []).append(figure)
    return [_table(found, notes) for found in by_keys.values()]


def _table(figures: Sequence[Figure], notes: Sequence[str]) -> Table:
    common = shared(figures)
    keys = [key for key in figures[0].case if key not in common]
    rows: list[list[str]] = []
    for f in figures:
        number = f" ({notes.index(f.note) + 1})" if f.note in notes else ""
        said, got = (units.human(value, f.unit, f.exact) for value in (f.predicted, f.measured))
        case = [units.shown(f.case[key]) for key in keys]
        rows.append([*case, units.words(f.metric), said, f"{got}{number}", interval(f), ratio(f)])
    numbers = [units.words(key) for key in keys if all(type(f.case[key]) in (int, float) for f in figures)]
    table = Table(
        columns=[*map(units.words, keys), "metric", *MEASURED],
        rows=rows,
        numeric=(*numbers, *MEASURED[:-1]),
        common=case_words(replace(figures[0], case=common)),
    )
    filled = [i for i, name in enumerate(table.columns) if name not in MEASURED or _any_in(rows, i)]
    return replace(
        table, columns=[table.columns[i] for i in filled], rows=[[row[i] for i in filled] for row in table.rows]
    )


def _any_in(rows: Sequence[Sequence[str]], column: int) -> bool:
    return any(row[column] not in ("", units.NOTHING) for row in rows)
