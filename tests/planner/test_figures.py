"""Figures of plans as they are printed, or derived by hand: the table is figures.txt."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.plans import hardware_of, numbers, values_of


def hit(experts: int, chosen: int, places: int) -> float:
    """Return the places that different experts are on: one is missed if all chosen experts are among the others."""
    return places * (1 - math.comb(experts - experts // places, chosen) / math.comb(experts, chosen))


def rows() -> Iterator[tuple[str, str, str, float, str]]:
    """Yield what is planned, a figure, its value, the tolerance and the source of each line."""
    names: dict[str, str] = {}
    words = ""
    for line in (Path(__file__).parent / "figures.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line:
            continue
        if " := " in line:
            name, _, text = line.partition(" := ")
            names[name] = text.format(**names)
        elif line.startswith("["):
            words = line[1:-1].format(**names)
        else:
            figure, value, within, source = line.split(" | ")
            yield words, figure.format(**names), value.format(**names), float(within), source


@pytest.mark.parametrize(
    ("words", "figure", "value", "within", "source"),
    [pytest.param(*row, id=f"{row[0]}: {row[1]}"[:120]) for row in rows()],
)
def test_figure_is_as_printed(words: str, figure: str, value: str, within: float, source: str) -> None:
    if words.startswith("@"):
        values = {name: number.value for name, number in numbers(hardware_of(words[1:])).items()}
    else:
        values = values_of(words)
    found = eval(figure, {"__builtins__": {}}, values)
    wanted = eval(value, {"__builtins__": {}, "hit": hit, "sqrt": math.sqrt})
    assert found == (pytest.approx(wanted, rel=within, abs=0 if wanted else within) if within else wanted), source
