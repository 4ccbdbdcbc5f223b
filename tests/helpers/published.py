"""Published figures next to what the planner gives, each with its residual: ours over printed, less one.

python -m tests.helpers.published writes docs/published.md.

    reproduced       within the error to hold: what a figure says, or half a unit of its last printed digit
    follows          the same, but by one sum, ratio or formula of other printed figures
    fitted           the same, by a constant that was chosen so that it agrees
    missed           not, and nobody knows why or a formula of sizes cannot: the residual is shown
    misprint         not, since the source contradicts itself

Worked example: 250 GFLOP a token are printed to a whole GFLOP, so up to 0.5 may be rounding. Ours are 250.45, which is
reproduced.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dsmini.accounting import decode_flops_per_token, kv_bytes_per_token, parameters
from dsmini.accounting.flops import flops_per_token
from dsmini.accounting.tensors import MTP, OVER, SCORES
from dsmini.config import ModelConfig
from dsmini.config.fields import build
from dsmini.planner.exchange import Exchange
from dsmini.planner.figure import Figure, Figures, figures_of
from dsmini.planner.hardware import load_hardware
from dsmini.planner.model import CacheFigures, ModelFigures
from dsmini.planner.plan import Plan, make_plan
from dsmini.planner.request import Model, PlanRequest
from dsmini.reading import find_config, read_toml
from dsmini.report.units import human, in_words
from tests.helpers.plans import run_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "published.md"
Status = Literal["reproduced", "follows", "fitted", "missed", "misprint"]
V2_BITS = 6
"""Bits of a number of V2's cache (V2, section 3.2.2)."""
DENSE = ROOT / "tests" / "planner" / "dense_models.toml"
EXTENSION = ((32768, 1920), (131072, 480))
"""Tokens and sequences of the steps in V3's two phases of context extension, 1000 each (V3, section 4.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A printed figure, and ours."""

    name: str
    what: str
    printed: str
    """Number in base units as printed; its last digit says how exact it is."""
    unit: str = ""
    ours: float
    source: str
    hold: float | None = None
    """Relative error to hold, in place of half a unit of the last printed digit."""
    note: str = ""
    """Reason of any but "reproduced" and "follows", and of an error to hold above 5 %."""
    expected: Status = "reproduced"

    @property
    def within(self) -> float:
        """Relative error to hold."""
        return rounding(self.printed) if self.hold is None else self.hold

    @property
    def residual(self) -> float:
        """Ours over printed, less one."""
        return self.ours / float(self.printed) - 1

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
        computed = {"printed": float(self.printed), "within": self.within, "residual": self.residual}
        return {**asdict(self), **computed, "status": self.status}


def rounding(printed: str) -> float:
    """Return the largest relative error that rounding to the printed digits makes: of "250e9" it is 0.5 / 250."""
    digits = printed.partition("e")[0]
    decimals = len(digits.partition(".")[2])
    return 0.5 * 10.0**-decimals / float(digits)


# --- ours


@functools.cache
def reference(name: str) -> ModelConfig:
    """Return a model by name: of configs/, or a dense one of dense_models.toml."""
    dense = read_toml(DENSE)
    if name in dense:
        return build(ModelConfig, dense[name], DENSE.name, f"{name}.")
    return ModelConfig.from_file(find_config(Path(name)))


@functools.cache
def v3(**choices: Any) -> Plan:
    """Return a plan of DeepSeek-V3 on H800."""
    model = Model(config=reference("deepseek-v3"), source="deepseek-v3")
    return make_plan(PlanRequest(**choices), model, load_hardware("h800"))


def figures_of_row(model: str = "", gpus: int = 0) -> Figures:
    """Return the figures that a row may name: of a model alone, of failures of GPUs, or of DeepSeek-V3's plan."""
    if gpus:
        return figures_of(run_of(v3(), gpus), {})
    if not model:
        return v3().figures
    counts = ModelFigures(reference(model), Figure("seq_len", 4096, "token", "", ""), model)
    return figures_of(counts, {}) | figures_of(CacheFigures(reference(model), "bfloat16"), {})


def v3_mtp(active: bool = False) -> float:
    """Return the parameters of V3's multi-token prediction as printed: without the projection; active with the ends."""
    counted = parameters(reference("deepseek-v3"))
    of = counted.active_by_module if active else counted.by_module
    own = sum(n for module, n in of.items() if module.startswith(MTP)) - of["mtp projection"]
    return own + counted.by_module["embedding"] if active else own


def extension_hours() -> float:
    """Return the GPU-hours of V3's context extension, at the utilization of its pre-training."""
    plan, extended = v3(), replace(reference("deepseek-v3"), max_seq_len=163840)
    work = sum(flops_per_token(extended, n, training=True, mtp=False).total * 1000 * rows * n for n, rows in EXTENSION)
    return work / (plan.m.training_flops * plan.inputs["tokens"]) * plan.run.training_gpu_hours


def v2_cache_saving() -> float:
    """Return the share of DeepSeek 67B's cache that V2 saves."""
    v2 = kv_bytes_per_token(reference("deepseek-v2")) * V2_BITS / 16
    return 1 - v2 / kv_bytes_per_token(reference("deepseek-67b"))


def fp8_cache(name: str) -> float:
    """Return the FP8 cache of a token."""
    return kv_bytes_per_token(reference(name), dtype="fp8")


def fp8_work(name: str) -> float:
    """Return the work of a token after a million, in FLOPs at the rate of FP8."""
    c = replace(reference(name), max_seq_len=2**20)
    slower = {OVER: 2, SCORES: 0.5 if c.compress_ratios else 1}
    work = decode_flops_per_token(c, context=2**20).by_module
    return sum(flops * slower.get(module, 1) for module, flops in work.items())


def rows_of_experts(in_node: int) -> Exchange:
    """Return the rows of nine experts of a token on 320 GPUs, each one's own, as V3 decodes (report, section 3.4)."""
    return Exchange(reference("deepseek-v3"), 320, in_node, "fp8", one_hop=9)


def link_seconds() -> float:
    """Return the time of an output token that InfiniBand's peak allows, with two micro-batches of 32 a GPU."""
    return 58 * 2 * 32 * rows_of_experts(8).slow_row_bytes / load_hardware("h100").slow_link


def nvlink_seconds() -> float:
    """Return the same where NVLink connects all GPUs."""
    return 58 * 2 * 32 * rows_of_experts(320).fast_row_bytes / load_hardware("gb200-nvl72").fast_link


COMPUTED: Mapping[str, Callable[[], float]] = {
    "v3_active_with_embedding": lambda: v3().m.parameters_active + v3().m.numbers("embedding"),
    "v3_mtp": v3_mtp,
    "v3_mtp_active": lambda: v3_mtp(active=True),
    "v4_flash_cache": lambda: fp8_cache("deepseek-v4-flash") / fp8_cache("deepseek-v3.2"),
    "v4_pro_cache": lambda: fp8_cache("deepseek-v4-pro") / fp8_cache("deepseek-v3.2"),
    "v4_flash_work": lambda: fp8_work("deepseek-v4-flash") / fp8_work("deepseek-v3.2"),
    "v4_pro_work": lambda: fp8_work("deepseek-v4-pro") / fp8_work("deepseek-v3.2"),
    "v3_extension_hours": extension_hours,
    "v3_speculation": lambda: v3(drafts=1).figures["decode_tokens_per_step"],
    "v2_cache_saving": v2_cache_saving,
    "v3_link_time": link_seconds,
    "v3_link_rate": lambda: 1 / link_seconds(),
    "v3_nvlink_time": nvlink_seconds,
    "v3_nvlink_rate": lambda: 1 / nvlink_seconds(),
}
"""Our value of each row of published.toml that names no figure."""


def published_figures() -> list[Published]:
    """Return all figures of published.toml, in its order."""
    found: list[Published] = []
    for name, row in read_toml(ROOT / "tests" / "planner" / "published.toml").items():
        of = {key: row.pop(key) for key in ("model", "gpus") if key in row}
        figure = row.pop("figure", None)
        ours = COMPUTED[name]() if figure is None else figures_of_row(**of)[figure]
        found.append(Published(name=name, ours=float(ours), **row))
    return found


def page() -> str:
    """Return docs/published.md: each figure next to ours."""
    figures = published_figures()
    n = Counter(figure.status for figure in figures)
    n["all"] = n.total()
    lines = Path(__file__).with_suffix(".md").read_text().format_map(n).splitlines()
    for before, f in zip([None, *figures], figures, strict=False):
        note = "as above" if before and f.note and f.note == before.note else f.note
        printed, ours = (
            in_words(value, True) if not f.unit and value >= 1e6 else human(value, f.unit, given=True)
            for value in (float(f.printed), float(f"{f.ours:.4g}"))
        )
        cells = (f.what, printed, ours, f"{100 * f.residual:+.2f}", f"{100 * f.within:.2g}", f.status, f.source, note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
