"""Published figures next to what the planner gives, each with its residual: ours over printed, less one.

    reproduced       within the error to hold: what published.toml says, or half a unit of the last printed digit
    follows          the same, but by one sum, ratio or formula of other printed figures
    fitted           the same, by a constant that was chosen so that it agrees
    missed           not, and nobody knows why or a formula of sizes cannot: the residual is shown
    misprint         not, since the source contradicts itself

Worked example: 250 GFLOP a token are printed to a whole GFLOP, so up to 0.5 may be rounding. Ours are 250.45, which is
reproduced.
"""

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dsmini.accounting.flops import flops_per_token
from dsmini.accounting.memory import kv_bytes_per_token
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import load_hardware
from dsmini.planner.model import cache_figures, model_figures
from dsmini.planner.plan import plan
from dsmini.planner.request import Model, PlanRequest, reference
from dsmini.planner.setup import setup
from dsmini.planner.training import failure_figures
from dsmini.reading import read_toml

Status = Literal["reproduced", "follows", "fitted", "missed", "misprint"]
V2_BITS = 6
"""Bits of a number of V2's cache (V2, section 3.2.2)."""
EXTENSION = ((32768, 1920), (131072, 480))
"""Tokens and sequences of the steps in V3's two phases of context extension, 1000 each (V3, section 4.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFigure:
    """A printed figure, and ours."""

    name: str
    what: str
    printed: float
    ours: float
    unit: str
    within: float
    """Relative error to hold."""
    source: str
    note: str
    expected: Status = "reproduced"

    @property
    def residual(self) -> float:
        """Ours over printed, less one."""
        return self.ours / self.printed - 1

    @property
    def status(self) -> Status:
        """Status by the residual; a contradiction of the source keeps its name."""
        slack = 1e-9 * (self.within > 0)  # of printed decimals, which no float holds
        if abs(self.residual) <= self.within + slack:
            return self.expected if self.expected in ("follows", "fitted") else "reproduced"
        return "misprint" if self.expected == "misprint" else "missed"

    @property
    def record(self) -> dict[str, Any]:
        """Figure as JSON."""
        return asdict(self) | {"residual": self.residual, "status": self.status}


@functools.cache
def sheet_of(name: str) -> Sheet:
    """Return V3's plan for "run", the failures of "1024 GPUs", or the counts of a model by its name."""
    if name == "run":
        model = Model(config=reference("deepseek-v3"), source="deepseek-v3")
        return plan(setup(PlanRequest(), model, load_hardware("h800"))).sheet
    s, (number, _, word) = Sheet(explained=False), name.partition(" ")
    if word == "GPUs":
        s.put("gpus", int(number), "")
        failure_figures(s)
        return s
    s.put("seq_len", 4096, "")
    model_figures(s, reference(name))
    cache_figures(s, reference(name), "bfloat16")
    return s


def computed() -> dict[str, float]:
    """Return our value of the figures that no sheet has as they are printed."""
    v3, mtp = sheet_of("deepseek-v3"), reference("deepseek-v3").n_mtp_layers
    run, extended = sheet_of("run"), replace(reference("deepseek-v3"), max_seq_len=163840)
    work = sum(flops_per_token(extended, n, training=True, mtp=False).total * 1000 * rows * n for n, rows in EXTENSION)
    v2_cache = kv_bytes_per_token(reference("deepseek-v2"), bytes_per_number=1) * V2_BITS / 8
    return {
        "v3_active_with_embedding": v3.parameters_active + v3.vocabulary_parameters,
        "v3_mtp": v3.mtp_parameters - mtp * v3.mtp_projection_layer,
        "v3_mtp_active": v3.mtp_active + mtp * (v3.vocabulary_parameters - v3.mtp_projection_layer),
        "v3_extension_hours": work / (run.training_flops * run.tokens) * run.training_gpu_hours,
        "v2_cache_saving": 1 - v2_cache / sheet_of("deepseek-67b").kv_cache,
    }


def published_figures() -> list[PublishedFigure]:
    """Return all figures of published.toml, in its order."""
    raw, ours = read_toml(Path(__file__).parent / "published.toml"), computed()
    found: list[PublishedFigure] = []
    for name, (what, printed, of, source, *rest) in raw["figures"].items():
        number, _, unit = printed.partition(" ")
        where, _, figure = of.partition(": ")
        how: dict[str, Any] = {"within": rounding(number), "note": "", **(rest[0] if rest else {})}
        value = float(getattr(sheet_of(where), figure) if of else ours[name])
        words = {"name": name, "what": what, "unit": unit, "source": source}
        found.append(PublishedFigure(printed=float(number), ours=value, **words, **how))
    return found


def rounding(printed: str) -> float:
    """Return the largest relative error that rounding to the printed digits makes: of "250e9" it is 0.5 / 250."""
    digits = printed.partition("e")[0]
    decimals = len(digits.partition(".")[2])
    return 0.5 * 10.0**-decimals / float(digits)
