"""Published figures next to what the planner gives: coverage next to error.

Each figure of published.toml has a printed value and a source. values.py computes the same figure by the
functions that every plan uses, from configs and hardware files. The two make a residual, ours over printed less one.

    reproduced       within the error to hold: what the file says, or half a unit of the last printed digit
    follows          the same, but by one sum, ratio or formula of other printed figures, or read back from a file
    misses           not, and nobody knows why or a formula of sizes cannot: the residual is shown, never fitted away
    misprint         not, since the source contradicts itself
    not attempted    nothing here computes it
    worked out       no report prints it: it was worked out by hand from sizes that one prints, and ours agrees

Worked example: 250 GFLOP a token are printed to a whole GFLOP, so up to 0.5 may be rounding. Ours are 250.45, which is
reproduced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsmini.config.fields import refuse_unknown
from dsmini.planner.published.values import COMPUTED, Sources
from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    BYTES_PER_TOKEN,
    COUNT,
    DOLLARS,
    FLOPS,
    FLOPS_PER_SECOND,
    FLOPS_PER_TOKEN,
    SECONDS,
    TOKENS,
    TOKENS_PER_SECOND,
    WATTS,
    Anything,
    Unit,
)
from dsmini.reading import read_toml

FILE = Path(__file__).parent / "published.toml"
Status = Literal["reproduced", "follows", "misses", "misprint", "not attempted", "worked out"]
UNITS: Mapping[str, Unit[Any, Any]] = {
    "": COUNT,
    "B": BYTES,
    "s": SECONDS,
    "$": DOLLARS,
    "token": TOKENS,
    "FLOP": FLOPS,
    "J/s": WATTS,
    "B/s": BYTES_PER_SECOND,
    "B/token": BYTES_PER_TOKEN,
    "FLOP/s": FLOPS_PER_SECOND,
    "FLOP/token": FLOPS_PER_TOKEN,
    "token/s": TOKENS_PER_SECOND,
}
KEYS = ["row", "name", "what", "printed", "unit", "source", "within", "bound", "expected", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFigure:
    """A printed figure, and ours."""

    row: int
    """Number of the fact that it is part of."""
    name: str
    what: str
    printed: Anything
    source: str
    within: float
    """Relative error to hold."""
    bound: bool
    """The printed figure is a most, which ours must not exceed."""
    expected: Status
    note: str
    ours: Anything | None
    """None if nothing computes it."""

    @property
    def residual(self) -> float | None:
        """Ours over printed, less one."""
        return None if self.ours is None else self.ours.value / self.printed.value - 1

    @property
    def status(self) -> Status:
        """Status by the residual; a contradiction of the source keeps its name."""
        residual = self.residual
        if residual is None:
            return "not attempted"
        slack = 1e-9 * (self.within > 0)  # of printed decimals, which no float holds
        if residual <= 0 if self.bound else abs(residual) <= self.within + slack:
            return self.expected if self.expected in ("follows", "worked out") else "reproduced"
        return "misprint" if self.expected == "misprint" else "misses"


def published_figures() -> Sequence[PublishedFigure]:
    """Return all figures of the file, in its order."""
    raw = read_toml(FILE)
    refuse_unknown(raw, ["inputs", "figures"], FILE.name, "")
    entries = raw["figures"]
    odd = {entry["name"] for entry in entries if entry.get("expected") != "not attempted"} ^ COMPUTED.keys()
    assert not odd, f"{', '.join(sorted(odd))}: in only one of {FILE.name} and values.py"
    sources = Sources(given=_inputs(raw["inputs"]))
    return [_figure(entry, sources) for entry in entries]


def _inputs(raw: dict[str, Any]) -> dict[str, Anything]:
    return {
        name: UNITS[entry["unit"]](entry["value"], name, entry["title"], entry["source"]) for name, entry in raw.items()
    }


def _figure(entry: dict[str, Any], sources: Sources) -> PublishedFigure:
    refuse_unknown(entry, KEYS, FILE.name, "figures.")
    name, printed = entry["name"], entry["printed"]
    unit = UNITS[entry.get("unit", "")]
    compute = COMPUTED.get(name)
    ours: Anything | None = compute(sources) if compute else None
    assert ours is None or ours.unit == unit.exponents, f"{name} is printed in {entry.get('unit')}, ours is {ours!r}"
    return PublishedFigure(
        row=entry["row"],
        name=name,
        what=entry["what"],
        printed=unit(float(printed), f"printed_{name}", entry["what"], entry["source"]),
        source=entry["source"],
        within=entry.get("within", rounding(printed)),
        bound=entry.get("bound", False),
        expected=entry.get("expected", "reproduced"),
        note=entry.get("note", ""),
        ours=ours,
    )


def rounding(printed: str) -> float:
    """Return the largest relative error that rounding to the printed digits makes: of "250e9" it is 0.5 / 250."""
    digits = printed.partition("e")[0]
    decimals = len(digits.partition(".")[2])
    return 0.5 * 10.0**-decimals / float(digits)
