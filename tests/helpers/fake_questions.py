"""Questions and a machine that measure nothing, for the tests of what runs and shows benchmarks.

python -c "import tests.helpers.fake_questions as f; f.main()" NAME ... --out DIR
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.question import Case, Question, Setting
from dsmini.measure.roofs import Roofs
from dsmini.report import Figure, Plot, Series, pick

ROOFS = Roofs(
    card={"processor": "an 8-core <test> & more", "cores": "2", "memory": "16 GiB", "device": "cpu"},
    peak={"float32": 150e9, "bfloat16": 900e9},
    bandwidth=38e9,
    copy=31e9,
    cache_bytes=32 << 20,
    probes={},
)
SIDES, CONTEXTS = ("dsmini", "transformers, of the same shape"), (128, 512, 2048, 8192)
KINDS = {"MLA": 70_272, "MHA, 128 wide": 3_997_696, "MHA, with <tags> & $5": 9_000_000}
"""Bytes of a token's cache by attention, with short labels and long ones."""
POINTS = {"rmsnorm": (0.3, 8e9), "gate": (1.1, 30e9), "w1, w3": (180.0, 6e11)}
"""FLOP a byte and FLOP/s of operations."""


def roofs(device: torch.device, *, on_part: Callable[[float, str], None], fresh: bool) -> Roofs:
    on_part(0.5, "peak float32")
    return ROOFS


def decode(on_case: Callable[[str], None] = lambda key: None) -> Question:
    """Return a question with times and intervals, a line of predictions, and notes.

    Args:
        on_case: called with each case before it is measured; may raise.
    """

    def measure(who: str, context: int) -> Iterator[Figure]:
        on_case(f"{who} {context}")
        rate = 52 - context / 512 if who == "dsmini" else 6400 / (128 + context / 2)
        known: dict[str, Any] = {"predicted": 60 / (1 + context / 20000)}
        known |= {"low": rate * 0.975, "high": rate * 1.025}
        case = {"side": who, "context": context, "dtype": "bfloat16"}
        note = "Weights are random." if who != "dsmini" else ""
        yield Figure(
            question="fake_decode", case=case, metric="tokens_per_s", unit="tokens/s", measured=rate, note=note, **known
        )

    def cases(setting: Setting) -> list[Case]:
        return [
            Case(key=f"{who} {c}", seconds=2.0, run=lambda who=who, c=c: measure(who, c))
            for who in SIDES
            for c in (CONTEXTS[:2] if setting.quick else CONTEXTS)
        ]

    def plots(figures: list[Figure]) -> list[Plot]:
        series = []
        for who in dict.fromkeys(str(f.case["side"]) for f in figures):
            mine = pick(figures, "tokens_per_s", side=who)
            x = [float(f.case["context"]) for f in mine]
            low, high = ([getattr(f, end) for f in mine] for end in ("low", "high"))
            series.append(Series(label=who, x=x, y=[f.measured or math.nan for f in mine], low=low, high=high))
            if who == "dsmini":
                y = [f.predicted or math.nan for f in mine]
                series.append(Series(label="dsmini, predicted", x=x, y=y, dashed=True, of="dsmini"))
        title = "Decoding at growing contexts"
        return [Plot(title=title, x="context, tokens", y="tokens/s", log_x=True, series=series)]

    return Question(
        name="fake_decode",
        title="How fast does a model decode, and does it stay fast at long contexts?",
        cases=cases,
        answer=lambda figures: f"At context 8,192 it decodes {len(figures)} times as fast as before.",
        plots=(plots,),
        about="Both sides take turns. Nothing is simulated.",
    )


def cache(measured: int | None = None) -> Question:
    """Return a question with exact counts in bytes, as bars, with long labels and with short ones.

    Args:
        measured: bytes of MLA's cache; None: the right ones.
    """

    def run(kind: str) -> Iterator[Figure]:
        said = measured if kind == "MLA" and measured else KINDS[kind]
        counts: dict[str, Any] = {"unit": "bytes", "measured": said, "predicted": KINDS[kind], "exact": True}
        yield Figure(question="fake_cache", case={"attention": kind}, metric="bytes_per_token", **counts)

    def bars(figures: list[Figure], title: str) -> Plot:
        y = [f.predicted or 0.0 for f in figures]
        series = [
            Series(label="measured", x=(), y=[f.measured or 0.0 for f in figures], kind="bars"),
            Series(label="predicted", x=(), y=y, kind="bars", dashed=True, of="measured"),
        ]
        labels = [str(f.case["attention"]) for f in figures]
        return Plot(title=title, x="attention", y="bytes a token", labels=labels, series=series)

    return Question(
        name="fake_cache",
        title="How many bytes does a token store?",
        cases=lambda setting: [Case(key=kind, seconds=0.1, run=lambda kind=kind: run(kind)) for kind in KINDS],
        answer=lambda figures: "MLA stores 70,272 bytes a token, 98.24 % less than multi-head attention.",
        plots=(lambda figures: [bars(figures, "Cache of a token, by attention"), bars(figures[:2], "The small ones")],),
        about="Read off the storages.",
    )


def roofline() -> Question:
    """Return a question with a cloud of points under a roof, and a plot without anything in it."""

    def run() -> Iterator[Figure]:
        about: dict[str, Any] = {"question": "fake_roofline", "metric": "rate", "unit": "FLOP/s"}
        for name, (intensity, rate) in POINTS.items():
            case = {"operation": name, "intensity": intensity, "rows": 4096}
            yield Figure(case=case, measured=rate, predicted=min(9e11, intensity * 38e9), **about)
        yield Figure(question="fake_roofline", case={"share": True}, metric="share_of_peak", unit="", measured=0.63)

    def plots(figures: list[Figure]) -> list[Plot]:
        mine = pick(figures, "rate")
        x = [0.1, 900 / 38, 1000.0]
        roof = Series(label="the roof", x=x, y=[min(9e11, v * 38e9) for v in x], dashed=True)
        points = [float(f.case["intensity"]) for f in mine]
        cloud = Series(label="operations", x=points, y=[f.measured or 0.0 for f in mine], kind="points")
        return [
            Plot(title="The roofline", x="FLOP a byte", y="FLOP/s", log_x=True, log_y=True, series=[roof, cloud]),
            Plot(title="Nothing", x="", y="", series=[Series(label="none", x=[1.0], y=[math.nan])]),
        ]

    return Question(
        name="fake_roofline",
        title="How close does every operation come to what this machine can do?",
        cases=lambda setting: [Case(key="all", seconds=1.0, run=run)],
        answer=lambda figures: "Two of three operations reach more than half of their roof.",
        about="Each is timed alone.",
        plots=(plots,),
    )


def known() -> Mapping[str, Question]:
    return {question.name: question for question in (cache(), decode(), roofline())}


def main() -> None:
    from benchmarks.run import main

    sys.exit(main(sys.argv[1:], known(), roofs))
