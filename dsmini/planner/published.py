"""Published figures next to what the planner gives, each with its residual: ours over printed, less one.

    reproduced       within the error to hold: what published.toml says, or half a unit of the last printed digit
    follows          the same, but by one sum, ratio or formula of other printed figures
    fitted           the same, by a constant that was chosen so that it agrees
    missed           not, and nobody knows why or a formula of sizes cannot: the residual is shown
    misprint         not, since the source contradicts itself
    worked out       no report prints it: it was worked out by hand from sizes that one prints, and ours agrees

Worked example: 250 GFLOP a token are printed to a whole GFLOP, so up to 0.5 may be rounding. Ours are 250.45, which is
reproduced.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dsmini.accounting.kv_cache import kv_bytes_per_token
from dsmini.planner.display import in_unit, in_words, narrow
from dsmini.planner.figure import Figure, Sheet
from dsmini.planner.hardware import load_hardware
from dsmini.planner.model import cache_figures, model_figures
from dsmini.planner.plan import plan
from dsmini.planner.reliability import failure_rate, first_order_share
from dsmini.planner.request import Model, PlanRequest, Schedule, reference
from dsmini.planner.serving import accepted_tokens
from dsmini.planner.setup import setup
from dsmini.planner.training import bubble_seconds, speed_figures
from dsmini.reading import read_toml
from dsmini.report import Section, Table

Status = Literal["reproduced", "follows", "fitted", "missed", "misprint", "worked out"]
KEPT: tuple[Status, ...] = ("follows", "fitted", "worked out")
"""Statuses that a figure keeps which is within its error."""
STEP = 19.926
"""Printed seconds of a step of V3's training. Source: INS, table 4."""
PAIRS, BACKWARD, WEIGHTS = 13.95, 1.99, 0.48
"""Of them in forwards with backwards, in backwards alone, and in gradients of weights alone."""
V2_BITS, LLAMA_TOKENS = 6, 15.6e12
"""Bits of a number of V2's cache (V2, section 3.2.2); tokens of LLaMA-3.1's training (LL3, section 3.4.1)."""
LINKS = {"h800": 50e9, "gb200": 900e9}
"""Links as on data sheets, which INS computes with."""
WIDTH = 7000
"""Width of V3's rows as INS rounds it."""
EXAMPLE = {"forward": 1, "backward": 2, "weights": 1, "both": 3}
"""Times by which the bubbles of V3's table 2 are worked out."""
EXTENSION = ((32768, 1920), (131072, 480))
"""Tokens and sequences of the steps in V3's two phases of context extension, 1000 each (V3, section 4.3)."""
LARGE = 1e6
"""Count from which on a terminal shows words, such as 671 billion."""


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
    bound: bool = False
    """The printed figure is one that ours must not exceed."""

    @property
    def residual(self) -> float:
        """Ours over printed, less one."""
        return self.ours / self.printed - 1

    @property
    def status(self) -> Status:
        """Status by the residual; a contradiction of the source keeps its name."""
        slack = 1e-9 * (self.within > 0)  # of printed decimals, which no float holds
        if self.residual <= 0 if self.bound else abs(self.residual) <= self.within + slack:
            return self.expected if self.expected in KEPT else "reproduced"
        return "misprint" if self.expected == "misprint" else "missed"

    @property
    def record(self) -> dict[str, Any]:
        """Figure as JSON."""
        names = (field.name for field in fields(self) if field.name not in ("expected", "bound"))
        return {name: getattr(self, name) for name in names} | {"residual": self.residual, "status": self.status}


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
def sheet_of(where: str) -> Sheet:
    """Return the sheet that published.toml names."""
    number, _, word = where.partition(" ")
    if word == "GPUs":
        s = Sheet(explained=False)
        s.put("gpus", int(number), "")
        failure_rate(s)
        return s
    if where == "printed step":
        names = ("gpus", "tokens", "step_tokens", "training_flops", "training_flops_full_square", "gpu_price")
        s = Sheet(found={name: v3_at(4096).get(name) for name in names})
        speed_figures(s, Figure(STEP))
        return s
    contexts = {"run": 4096, "1M tokens": 1 << 20, "128K tokens": 1 << 17}
    return v3_at(contexts[where]) if where in contexts else model_sheet(where)


def computed() -> dict[str, Any]:
    """Return our value of the figures that no sheet has as they are printed."""
    v3, failing, llama = v3_at(4096), sheet_of("12000 GPUs"), model_sheet("llama-3.1-405b")
    # INS: 32 tokens in FP8 out and in BF16 back, to 9 experts by links alone; two micro-batches in 61 layers
    blocks = {name: (1 + 2) * 32 * 9 * WIDTH / link for name, link in LINKS.items()}
    # V3's 16 stages and 120 micro-batches, of which 23 are not in pairs
    alone = 3 * 16 / 2 - 1
    chunks = {"backward": (BACKWARD + WEIGHTS) / alone, "weights": WEIGHTS / (16 - 1), "both": PAIRS / (120 - alone)}
    work = sum(model_sheet("deepseek-v3", n).training_flops * 1000 * rows * n for n, rows in EXTENSION)
    v2_cache = kv_bytes_per_token(reference("deepseek-v2"), bytes_per_number=1) * V2_BITS / 8
    mean, halt = failing.mean_time_to_failure, failing.checkpoint_halt
    return {
        **{f"{name}_block_exchange": seconds for name, seconds in blocks.items()},
        **{f"{name}_token_exchange": 2 * 61 * seconds for name, seconds in blocks.items()},
        **{f"bubble_{name}": bubble_seconds(name, 16, **EXAMPLE) for name in get_args(Schedule)},
        "v3_bubble": bubble_seconds("dualpipe", 16, forward=0, **chunks),
        "v3_link_share": v3.slow_link_share_unlimited * v3.step_seconds / v3.computing_seconds,
        "v3_extension_hours": work / sheet_of("printed step").flops_per_gpu / 3600,
        "v3_speculation": accepted_tokens(0.85, 1),
        "v2_cache_saving": 1 - v2_cache / model_sheet("deepseek-67b").kv_cache,
        "llama_training": 6 * llama.parameters_main * LLAMA_TOKENS,
        "effective_share_12k": first_order_share(mean, np.sqrt(2 * halt * mean), failing.restart_time, halt),
    }


def published_figures() -> Sequence[PublishedFigure]:
    """Return all figures of published.toml, in its order."""
    raw, ours = read_toml(Path(__file__).parent / "published.toml"), computed()
    found: list[PublishedFigure] = []
    for name, (what, printed, of, source, *rest) in raw["figures"].items():
        number, _, unit = printed.partition(" ")
        where, _, figure = of.partition(": ")
        words: dict[str, Any] = {"name": name, "what": what, "unit": unit, "source": source}
        words |= {"note": raw["notes"].get(name, ""), "within": rounding(number), **(rest[0] if rest else {})}
        value = getattr(sheet_of(where), figure) if of else ours[name]
        found.append(PublishedFigure(printed=float(number), ours=float(value), **words))
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
    columns = ("figure", "published", "ours", "error, %", "within", "verdict")
    return Section(
        name="published_section",
        title="How far can it be trusted?",
        finding=(
            f"{len(figures) - of['worked out']} published figures: {of['reproduced']} are reproduced from sizes of "
            f"models and machines, {of['follows']} follow from other printed figures, {of['fitted']} is fitted by one "
            f"constant, {of['missed']} are missed, and {of['misprint']} contradict their own source. "
            f"{of['worked out']} more, worked out by hand from published sizes and formulas, agree."
        ),
        tables=[
            Table(
                columns=(*columns, "source", "note") if full else columns,
                rows=[(*_row(f), *((f.source, f.note) if full else ())) for f in figures],
                numeric=columns[1:5],
            )
        ],
        about=(
            "Errors are of unrounded values, next to the error to hold: half a unit of the last printed digit, where "
            "no note says otherwise. bf16_efficiency and fp8_efficiency are constants from printed runs; no others are."
        ),
    )


def _row(f: PublishedFigure) -> tuple[str, ...]:
    printed, ours = (
        in_words(value, True) if not f.unit and value >= LARGE else narrow(in_unit(value, f.unit, given=True))
        for value in (f.printed, f.ours)
    )
    number, _, unit = ours.partition(" ")
    number = f"{float(number):.4g}" if number.replace(".", "").isdigit() else number
    ours = number if unit == printed.partition(" ")[2] else f"{number} {unit}"
    within = "below" if f.bound else f"{100 * f.within:.2g}"
    return f.what, "at most " * f.bound + printed, ours, f"{100 * f.residual:+.2f}", within, f.status
