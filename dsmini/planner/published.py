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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dsmini.accounting.kv_cache import kv_bytes_per_token
from dsmini.planner.display import in_unit, in_words
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import load_hardware
from dsmini.planner.layout import Schedule
from dsmini.planner.model import cache_figures, model_figures
from dsmini.planner.plan import plan
from dsmini.planner.reliability import FAILURES, failure_rate, first_order_share
from dsmini.planner.request import PlanRequest
from dsmini.planner.serving import accepted_tokens
from dsmini.planner.setup import Model, reference, setup
from dsmini.planner.training import Chunks, bubble_seconds, speed_figures
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
LARGE = 1e6
"""Count from which on a terminal shows words, such as 671 billion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFigure:
    """A printed figure, and ours."""

    name: str
    what: str
    printed: float
    unit: str
    source: str
    within: float
    """Relative error to hold."""
    bound: bool
    """The printed figure is one that ours must not exceed."""
    expected: Status
    note: str
    ours: float | None
    """None if nothing computes it."""

    @property
    def residual(self) -> float | None:
        """Ours over printed, less one."""
        return None if self.ours is None else self.ours / self.printed - 1

    @property
    def status(self) -> Status:
        """Status by the residual; a contradiction of the source keeps its name."""
        residual = self.residual
        if residual is None:
            return "not attempted"
        slack = 1e-9 * (self.within > 0)  # of printed decimals, which no float holds
        if residual <= 0 if self.bound else abs(residual) <= self.within + slack:
            return self.expected if self.expected in KEPT else "reproduced"
        return "misprint" if self.expected == "misprint" else "missed"


class Sheets:
    """Sheets of the plans that published figures are taken from, each made once."""

    def of(self, name: str) -> Sheet:
        """Return a sheet: of a model, of V3's run, of its printed step, or of V3 at a context."""
        known: dict[str, Callable[[], Sheet]] = {
            "run": lambda: self.run,
            "printed step": lambda: self.printed_step,
            "1M tokens": lambda: self.at(1 << 20),
            "128K tokens": lambda: self.at(1 << 17),
        }
        return known[name]() if name in known else self.model(name)

    def model(self, name: str, seq_len: int = 4096) -> Sheet:
        """Return the parameters, the operations and the cache of a model."""
        s, config = Sheet(explained=False), reference(name)
        s.put("seq_len", seq_len, "")
        model_figures(s, config)
        cache_figures(s, config, "bfloat16")
        return s

    @cached_property
    def run(self) -> Sheet:
        """V3's training and serving as a plan predicts them."""
        return self.at(4096)

    def at(self, context: int) -> Sheet:
        """Return V3's plan at a context."""
        config = replace(reference("deepseek-v3"), max_seq_len=max(context, 163840))
        model = Model(config=config, source="deepseek-v3")
        return plan(setup(PlanRequest(context=context), model, load_hardware("h800"))).sheet

    @cached_property
    def printed_step(self) -> Sheet:
        """V3's training from the printed time of a step."""
        names = ("gpus", "tokens", "step_tokens", "training_flops", "training_flops_full_square", "gpu_price")
        s = Sheet(found={name: self.run.get(name) for name in names})
        speed_figures(s, Figure(STEP))
        return s

    def failures(self, gpus: int) -> Sheet:
        """Return the failures of a run on this many GPUs."""
        s = Sheet(explained=False)
        s.put("gpus", gpus, "")
        for name, (value, source) in FAILURES.items():
            s.put(name, value, source)
        failure_rate(s)
        return s

    def link_limit(self, link: float, width: float = 7000) -> float:
        """Return the time of dispatch and combine of 32 tokens of V3 in a layer by links alone, as INS counts it.

        FP8 out and BF16 back, to 9 experts; INS rounds the width of 7168 to 7000.
        """
        return (1 + 2) * 32 * 9 * width / link

    @cached_property
    def bubble(self) -> float:
        """DualPipe's bubble of V3's step from the printed times of its 16 stages and 120 micro-batches."""
        alone = 3 * 16 / 2 - 1
        times = Chunks(
            forward=0,
            backward=(TIMES["backward"] + TIMES["weights"]) / alone,
            weights=TIMES["weights"] / (16 - 1),
            both=TIMES["pairs"] / (120 - alone),
        )
        return bubble_seconds("dualpipe", 16, times)

    @cached_property
    def extension(self) -> float:
        """GPU-hours of V3's context extension, two phases of 1000 steps, at the utilization of pre-training."""
        rate = float(self.printed_step.flops_per_gpu)
        phases = ((32768, 1920), (131072, 480))
        work = sum(self.model("deepseek-v3", n).training_flops * 1000 * rows * n for n, rows in phases)
        return work / rate / 3600


H800_LINK, GB200_LINK = 50e9, 900e9
"""Links as on data sheets, which INS computes with."""
CHECK = Chunks(forward=1, backward=2, weights=1, both=3)


def _bubble(schedule: Schedule) -> Callable[[Sheets], float]:
    return lambda s: bubble_seconds(schedule, 16, CHECK)


def _share(s: Sheets) -> float:
    found = s.failures(12_000)
    mean, halt = found.mean_time_to_failure, found.checkpoint_halt
    return first_order_share(mean, np.sqrt(2 * halt * mean), found.restart_time, halt)


def _v2_saving(s: Sheets) -> float:
    numbers = kv_bytes_per_token(reference("deepseek-v2"), bytes_per_number=1)
    return 1 - numbers * V2_BITS / 8 / s.model("deepseek-67b").kv_cache


COMPUTED: Mapping[str, Callable[[Sheets], Any]] = {
    "v3_mfu": lambda s: s.printed_step.flops_per_gpu / s.run.peak_bfloat16,
    "v3_mfu_full": lambda s: s.printed_step.flops_per_gpu_full_square / s.run.peak_bfloat16,
    "llama_cache_ratio": lambda s: s.model("llama-3.1-405b").kv_cache / s.model("deepseek-v3").kv_cache,
    "v2_cache_saving": _v2_saving,
    "h800_block_exchange": lambda s: s.link_limit(H800_LINK),
    "h800_token_exchange": lambda s: 2 * 61 * s.link_limit(H800_LINK),
    "h800_exchange_rate": lambda s: 1 / (2 * 61 * s.link_limit(H800_LINK)),
    "h800_token_exchange_7168": lambda s: 2 * 61 * s.link_limit(H800_LINK, 7168),
    "gb200_block_exchange": lambda s: s.link_limit(GB200_LINK),
    "gb200_token_exchange": lambda s: 2 * 61 * s.link_limit(GB200_LINK),
    "gb200_exchange_rate": lambda s: 1 / (2 * 61 * s.link_limit(GB200_LINK)),
    "bubble_1f1b": _bubble("1f1b"),
    "bubble_zb1p": _bubble("zb1p"),
    "bubble_dualpipe": _bubble("dualpipe"),
    "v3_bubble": lambda s: s.bubble,
    "v3_link_share": lambda s: s.run.slow_link_share_unlimited * s.run.step_seconds / s.run.computing_seconds,
    "v3_speculation": lambda s: accepted_tokens(0.85, 1),
    "llama_training": lambda s: 6 * s.model("llama-3.1-405b").parameters_main * LLAMA_TOKENS,
    "failure_16k": lambda s: s.failures(16_384).mean_time_to_failure,
    "failure_131k": lambda s: s.failures(131_072).mean_time_to_failure,
    "failure_1k": lambda s: s.failures(1_024).mean_time_to_failure,
    "effective_share_12k": _share,
    "v3_extension_hours": lambda s: s.extension,
    "v4_pro_cache_share": lambda s: 1 / s.of("1M tokens").pro_cache_ratio,
    "v4_flash_cache_share": lambda s: 1 / s.of("1M tokens").flash_cache_ratio,
    "v4_pro_flops_share": lambda s: 1 / s.of("1M tokens").pro_rounded_ratio,
    "v4_flash_flops_share": lambda s: 1 / s.of("1M tokens").flash_rounded_ratio,
    "v41_cache_ratio": lambda s: s.of("1M tokens").flash_kv_cache / s.of("1M tokens").v41_kv_cache,
}
"""Our value of the figures that no plan has as they are printed."""


def published_figures() -> Sequence[PublishedFigure]:
    """Return all figures of published.toml, in its order."""
    raw, sheets = read_toml(Path(__file__).parent / "published.toml"), Sheets()
    found: list[PublishedFigure] = []
    for name, (what, printed, of, source, *rest) in raw["figures"].items():
        options: dict[str, Any] = rest[0] if rest else {}
        number, _, unit = printed.partition(" ")
        where, _, figure = of.partition(": ")
        ours = getattr(sheets.of(where), figure) if of else COMPUTED[name](sheets) if name in COMPUTED else None
        found.append(
            PublishedFigure(
                name=name,
                what=what,
                printed=float(number),
                unit=unit,
                source=source,
                within=options.get("within", rounding(number)),
                bound=options.get("bound", False),
                expected=options.get("expected", "reproduced"),
                note=raw["notes"].get(name, ""),
                ours=None if ours is None else float(ours),
            )
        )
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
    text = in_unit(value, unit, given=True)
    for word, letter in ((" trillion ", "T "), (" billion ", "B "), (" million ", "M ")):
        text = text.replace(word, letter)
    return text


def published_record(figures: Sequence[PublishedFigure]) -> list[dict[str, Any]]:
    """Return published figures as JSON: printed, ours, residual and status."""
    names = ("name", "what", "printed", "ours", "unit", "residual", "within", "status", "source", "note")
    return [{name: getattr(f, name) for name in names} for f in figures]
