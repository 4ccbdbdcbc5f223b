"""Published figures next to what the planner gives, each with its residual: ours over printed, less one.

    reproduced       within the error to hold: what published.toml says, or half a unit of the last printed digit
    follows          the same, but by one sum, ratio or formula of other printed figures
    fitted           the same, by a constant that was chosen so that it agrees
    missed           not, and nobody knows why or a formula of sizes cannot: the residual is shown
    misprint         not, since the source contradicts itself
    not attempted    nothing here computes it
    worked out       no report prints it: it was worked out by hand from sizes that one prints, and ours agrees

Worked example: 250 GFLOP a token are printed to a whole GFLOP, so up to 0.5 may be rounding. Ours are 250.45, which is
reproduced.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dsmini.accounting.kv_cache import kv_bytes_per_token
from dsmini.planner.display import in_unit, in_words, narrow
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import load_hardware
from dsmini.planner.model import cache_figures, model_figures
from dsmini.planner.plan import plan
from dsmini.planner.reliability import FAILURES, failure_rate, first_order_share
from dsmini.planner.request import PlanRequest
from dsmini.planner.serving import accepted_tokens
from dsmini.planner.setup import Model, reference, setup
from dsmini.planner.training import bubble_seconds, speed_figures
from dsmini.reading import read_toml
from dsmini.report import Section, Table

Status = Literal["reproduced", "follows", "fitted", "missed", "misprint", "not attempted", "worked out"]
KEPT: tuple[Status, ...] = ("follows", "fitted", "worked out")
"""Statuses that a figure keeps which is within its error."""
STEP = 19.926
"""Printed seconds of a step of V3's training. Source: INS, table 4."""
TIMES = {"pairs": 13.95, "backward": 1.99, "weights": 0.48}
"""Printed seconds of a step in forwards with backwards, in backwards alone, and in gradients of weights alone."""
V2_BITS, LLAMA_TOKENS = 6, 15.6e12
"""Bits of a number of V2's cache (V2, section 3.2.2); tokens of LLaMA-3.1's training (LL3, section 3.4.1)."""
H800_LINK, GB200_LINK = 50e9, 900e9
"""Links as on data sheets, which INS computes with."""
LARGE = 1e6
"""Count from which on a terminal shows words, such as 671 billion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFigure:
    """A printed figure, and ours."""

    name: str
    what: str
    printed: float
    ours: float | None
    """None if nothing computes it."""
    unit: str
    within: float
    """Relative error to hold."""
    source: str
    note: str
    expected: Status = "reproduced"
    bound: bool = False
    """The printed figure is one that ours must not exceed."""

    @property
    def residual(self) -> float | None:
        """Ours over printed, less one."""
        return None if self.ours is None else self.ours / self.printed - 1

    @property
    def status(self) -> Status:
        """Status by the residual; a contradiction of the source keeps its name."""
        if self.residual is None:
            return "not attempted"
        slack = 1e-9 * (self.within > 0)  # of printed decimals, which no float holds
        if self.residual <= 0 if self.bound else abs(self.residual) <= self.within + slack:
            return self.expected if self.expected in KEPT else "reproduced"
        return "misprint" if self.expected == "misprint" else "missed"


# --- ours


@functools.cache
def model_sheet(name: str, seq_len: int = 4096) -> Sheet:
    """Return the parameters, the operations and the cache of a model."""
    s, config = Sheet(explained=False), reference(name)
    s.put("seq_len", seq_len, "")
    model_figures(s, config)
    cache_figures(s, config, "bfloat16")
    return s


@functools.cache
def v3_at(context: int) -> Sheet:
    """Return V3's plan at a context."""
    config = replace(reference("deepseek-v3"), max_seq_len=max(context, 163840))
    model = Model(config=config, source="deepseek-v3")
    return plan(setup(PlanRequest(context=context), model, load_hardware("h800"))).sheet


@functools.cache
def printed_step() -> Sheet:
    """Return V3's training from the printed time of a step."""
    names = ("gpus", "tokens", "step_tokens", "training_flops", "training_flops_full_square", "gpu_price")
    s = Sheet(found={name: v3_at(4096).get(name) for name in names})
    speed_figures(s, Figure(STEP))
    return s


def failures(gpus: int) -> Sheet:
    """Return the failures of a run on this many GPUs."""
    s = Sheet(explained=False)
    s.put("gpus", gpus, "")
    for name, (value, source) in FAILURES.items():
        s.put(name, value, source)
    failure_rate(s)
    return s


def sheet_of(where: str) -> Sheet:
    """Return the sheet that published.toml names."""
    number, _, word = where.partition(" ")
    if word == "GPUs":
        return failures(int(number))
    known = {"run": 4096, "1M tokens": 1 << 20, "128K tokens": 1 << 17}
    if where in known:
        return v3_at(known[where])
    return printed_step() if where == "printed step" else model_sheet(where)


def exchange(link: float, width: float = 7000) -> float:
    """Return the time of dispatch and combine of 32 tokens of V3 in a layer by links alone, as INS counts it.

    FP8 out and BF16 back, to 9 experts; INS rounds the width of 7168 to 7000.
    """
    return (1 + 2) * 32 * 9 * width / link


def token_exchange(link: float, width: float = 7000) -> float:
    """Return the same for two micro-batches in 61 layers."""
    return 2 * 61 * exchange(link, width)


def bubble(schedule: Any) -> float:
    """Return the bubble of 16 stages and times of 1, 2, 1 and 3."""
    return bubble_seconds(schedule, 16, forward=1, backward=2, weights=1, both=3)


def v3_bubble() -> float:
    """Return DualPipe's bubble of V3's step from the printed times of its 16 stages and 120 micro-batches."""
    alone = 3 * 16 / 2 - 1
    backward, weights = (TIMES["backward"] + TIMES["weights"]) / alone, TIMES["weights"] / (16 - 1)
    both = TIMES["pairs"] / (120 - alone)
    return bubble_seconds("dualpipe", 16, forward=0, backward=backward, weights=weights, both=both)


def v3_link_share() -> float:
    """Return the time of rows without a limit on nodes over that of computing."""
    s = v3_at(4096)
    return s.slow_link_share_unlimited * s.step_seconds / s.computing_seconds


def v3_extension() -> float:
    """Return the GPU-hours of V3's context extension, two phases of 1000 steps, at pre-training's utilization."""
    phases = ((32768, 1920), (131072, 480))
    work = sum(model_sheet("deepseek-v3", n).training_flops * 1000 * rows * n for n, rows in phases)
    return work / printed_step().flops_per_gpu / 3600


def v2_saving() -> float:
    """Return the share of DeepSeek 67B's cache that V2 saves."""
    numbers = kv_bytes_per_token(reference("deepseek-v2"), bytes_per_number=1)
    return 1 - numbers * V2_BITS / 8 / model_sheet("deepseek-67b").kv_cache


def effective_share() -> float:
    """Return the share of the time that trains on 12,000 GPUs."""
    s = failures(12_000)
    interval = np.sqrt(2 * s.checkpoint_halt * s.mean_time_to_failure)
    return first_order_share(s.mean_time_to_failure, interval, s.restart_time, s.checkpoint_halt)


COMPUTED: Mapping[str, Callable[[], Any]] = {
    "v3_mfu": lambda: printed_step().flops_per_gpu / v3_at(4096).peak_bfloat16,
    "v3_mfu_full": lambda: printed_step().flops_per_gpu_full_square / v3_at(4096).peak_bfloat16,
    "llama_cache_ratio": lambda: model_sheet("llama-3.1-405b").kv_cache / model_sheet("deepseek-v3").kv_cache,
    "v2_cache_saving": v2_saving,
    "h800_block_exchange": lambda: exchange(H800_LINK),
    "h800_token_exchange": lambda: token_exchange(H800_LINK),
    "h800_exchange_rate": lambda: 1 / token_exchange(H800_LINK),
    "h800_token_exchange_7168": lambda: token_exchange(H800_LINK, 7168),
    "gb200_block_exchange": lambda: exchange(GB200_LINK),
    "gb200_token_exchange": lambda: token_exchange(GB200_LINK),
    "gb200_exchange_rate": lambda: 1 / token_exchange(GB200_LINK),
    "bubble_1f1b": lambda: bubble("1f1b"),
    "bubble_zb1p": lambda: bubble("zb1p"),
    "bubble_dualpipe": lambda: bubble("dualpipe"),
    "v3_bubble": v3_bubble,
    "v3_link_share": v3_link_share,
    "v3_speculation": lambda: accepted_tokens(0.85, 1),
    "llama_training": lambda: 6 * model_sheet("llama-3.1-405b").parameters_main * LLAMA_TOKENS,
    "effective_share_12k": effective_share,
    "v3_extension_hours": v3_extension,
    "v4_pro_cache_share": lambda: 1 / v3_at(1 << 20).pro_cache_ratio,
    "v4_flash_cache_share": lambda: 1 / v3_at(1 << 20).flash_cache_ratio,
    "v4_pro_flops_share": lambda: 1 / v3_at(1 << 20).pro_rounded_ratio,
    "v4_flash_flops_share": lambda: 1 / v3_at(1 << 20).flash_rounded_ratio,
    "v41_cache_ratio": lambda: v3_at(1 << 20).flash_kv_cache / v3_at(1 << 20).v41_kv_cache,
}
"""Our value of the figures that no plan has as they are printed."""


def published_figures() -> Sequence[PublishedFigure]:
    """Return all figures of published.toml, in its order."""
    raw = read_toml(Path(__file__).parent / "published.toml")
    found: list[PublishedFigure] = []
    for name, (what, printed, of, source, *rest) in raw["figures"].items():
        number, _, unit = printed.partition(" ")
        where, _, figure = of.partition(": ")
        ours = getattr(sheet_of(where), figure) if of else COMPUTED[name]() if name in COMPUTED else None
        words: dict[str, Any] = {"name": name, "what": what, "unit": unit, "source": source}
        words |= {"note": raw["notes"].get(name, ""), "within": rounding(number), **(rest[0] if rest else {})}
        found.append(PublishedFigure(printed=float(number), ours=None if ours is None else float(ours), **words))
    return found


def rounding(printed: str) -> float:
    """Return the largest relative error that rounding to the printed digits makes: of "250e9" it is 0.5 / 250."""
    digits = printed.partition("e")[0]
    decimals = len(digits.partition(".")[2])
    return 0.5 * 10.0**-decimals / float(digits)


# --- in words


def published_section(figures: Sequence[PublishedFigure], *, full: bool) -> Section:
    """Return the published figures next to ours.

    Args:
        full: with sources and notes, which a terminal has no room for.
    """
    of = {status: sum(f.status == status for f in figures) for status in get_args(Status)}
    return Section(
        name="published_section",
        title="How far can it be trusted?",
        finding=(
            f"{len(figures) - of['worked out']} published figures: {of['reproduced']} are reproduced from sizes of "
            f"models and machines, {of['follows']} follow from other printed figures, {of['fitted']} is fitted by one "
            f"constant, {of['missed']} are missed, {of['misprint']} contradict their own source, and "
            f"{of['not attempted']} is not attempted. {of['worked out']} more, worked out by hand from published sizes "
            "and formulas, agree."
        ),
        tables=[_table(figures, full)],
        about=(
            "Errors are of unrounded values, next to the error to hold: half a unit of the last printed digit, where "
            "no note says otherwise. bf16_efficiency and fp8_efficiency are constants from printed runs; no others are."
        ),
    )


def _table(figures: Sequence[PublishedFigure], full: bool) -> Table:
    rows: list[tuple[str, ...]] = []
    for f in figures:
        printed = _short(f.printed, f.unit)
        ours, _, unit = ("" if f.ours is None else _short(f.ours, f.unit)).partition(" ")
        ours = f"{float(ours):.4g}" if ours.replace(".", "").isdigit() else ours
        ours = ours if unit == printed.partition(" ")[2] else f"{ours} {unit}"
        error = "" if f.residual is None else f"{100 * f.residual:+.2f}"
        within = "" if f.ours is None else "below" if f.bound else f"{100 * f.within:.2g}"
        more = (f.source, f.note) if full else ()
        verdict = f.status if full or f.status != "not attempted" else "untried"
        rows.append((f.what, f"at most {printed}" if f.bound else printed, ours, error, within, verdict, *more))
    columns = ("figure", "published", "ours", "error, %", "within", "verdict", *(("source", "note") if full else ()))
    return Table(columns=columns, rows=rows, numeric=("published", "ours", "error, %", "within"))


def _short(value: float, unit: str) -> str:
    if not unit and value >= LARGE:
        return in_words(value, True)
    return narrow(in_unit(value, unit, given=True))


def published_record(figures: Sequence[PublishedFigure]) -> list[dict[str, Any]]:
    """Return published figures as JSON: printed, ours, residual and status."""
    names = ("name", "what", "printed", "ours", "unit", "residual", "within", "status", "source", "note")
    return [{name: getattr(f, name) for name in names} for f in figures]
