"""Questions and a machine that measure nothing, for the tests of what runs and shows benchmarks."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.question import Case, Question, cases_over, drawing, figure
from dsmini.measure.roofs import Roofs
from dsmini.report import Figure, Plot, Series, pick
from tests.helpers.questions import invented_roofs

CARD = {"processor": "an 8-core <test> & more", "cores": "2", "memory": "16 GiB", "device": "cpu"}
ROOFS = invented_roofs(card=CARD, peak={"float32": 150e9, "bfloat16": 900e9}, bandwidth=38e9, copy=31e9)
SIDES, CONTEXTS = ("dsmini", "transformers, of the same shape"), (128, 512, 2048, 8192)
KINDS = {"MLA": 70_272, "MHA, 128 wide": 3_997_696, "MHA, with <tags> & $5": 9_000_000}
"""Bytes of a token's cache by attention, with short labels and long ones."""
POINTS = {"rmsnorm": (0.3, 8e9), "gate": (1.1, 30e9), "w1, w3": (180.0, 6e11)}
"""FLOP a byte and FLOP/s of operations."""


def roofs(device: torch.device, *, on_part: Callable[[float, str], None], fresh: bool) -> Roofs:
    on_part(0.5, "peak float32")
    return ROOFS


def decode(on_case: Callable[[str], None] = lambda key: None, speed: float = 1.0) -> Question:
    """Return a question with times and intervals, a line of predictions, and notes.

    Args:
        on_case: called with each case before it is measured; may raise.
        speed: factor of the rate of dsmini at the longest context.
    """

    def measure(who: str, context: int) -> list[Figure]:
        on_case(f"{who} {context}")
        rate = 52 - context / 512 if who == SIDES[0] else 6400 / (128 + context / 2)
        rate *= speed if (who, context) == (SIDES[0], CONTEXTS[-1]) else 1.0
        known: dict[str, Any] = {"low": rate * 0.975, "high": rate * 1.025, "predicted": 60 / (1 + context / 20000)}
        known["note"] = "Weights are random." if who != SIDES[0] else ""
        return [figure("tokens_per_s", {"side": who, "context": context, "dtype": "bfloat16"}, rate, **known)]

    return Question(
        name="fake_decode",
        title="How fast does a model decode, and does it stay fast at long contexts?",
        cases=lambda s: cases_over(
            "{} {}", [(who, c) for who in SIDES for c in (CONTEXTS[:2] if s.quick else CONTEXTS)], 2.0, measure
        ),
        answer=lambda figures: f"At context 8,192 it decodes {len(figures)} times as fast as before.",
        plots=(drawing("tokens_per_s", "Decoding at growing contexts", x="context", by="side"),),
        about="Both sides take turns. Nothing is simulated.",
    )


def cache(measured: int | None = None) -> Question:
    """Return a question with exact counts in bytes, as bars, with long labels and with short ones.

    Args:
        measured: bytes of MLA's cache; None: the right ones.
    """

    def run(kind: str) -> list[Figure]:
        said = measured if kind == "MLA" and measured else KINDS[kind]
        return [figure("bytes_per_token", {"attention": kind}, said, predicted=KINDS[kind], exact=True)]

    bars: dict[str, Any] = {"label": "{attention}", "kind": "bars", "predicted": True}
    short = drawing("bytes_per_token", "The small ones", only=lambda f: "<" not in str(f.case["attention"]), **bars)
    return Question(
        name="fake_cache",
        title="How many bytes does a token store?",
        cases=lambda _: cases_over("{}", [(kind,) for kind in KINDS], 0.1, run),
        answer=lambda figures: "MLA stores 70,272 bytes a token, 98.24 % less than multi-head attention.",
        plots=(drawing("bytes_per_token", "Cache of a token, by attention", **bars), short),
        about="Read off the storages.",
    )


def roofline() -> Question:
    """Return a question with a cloud of points under a roof, and a plot without anything in it."""

    def run() -> Iterator[Figure]:
        for name, (intensity, rate) in POINTS.items():
            case, roof = {"operation": name, "intensity": intensity, "rows": 4096}, min(9e11, intensity * 38e9)
            yield Figure(question="", metric="rate", unit="FLOP/s", case=case, measured=rate, predicted=roof)
        yield Figure(question="", metric="share_of_peak", unit="", case={"share": True}, measured=0.63)

    def plots(figures: list[Figure]) -> list[Plot]:
        x, points = [0.1, 900 / 38, 1000.0], [(float(f.case["intensity"]), f.measured) for f in pick(figures, "rate")]
        roof = Series(label="the roof", x=x, y=[min(9e11, v * 38e9) for v in x], dashed=True)
        cloud = Series(label="operations", x=[at for at, _ in points], y=[y or 0.0 for _, y in points], kind="points")
        return [
            Plot(title="The roofline", x="FLOP a byte", y="FLOP/s", log_x=True, log_y=True, series=[roof, cloud]),
            Plot(title="Nothing", x="", y="", series=[Series(label="none", x=[1.0], y=[math.nan])]),
        ]

    return Question(
        name="fake_roofline",
        title="How close does every operation come to what this machine can do?",
        cases=lambda _: [Case(key="all", seconds=1.0, run=run)],
        answer=lambda figures: "Two of three operations reach more than half of their roof.",
        about="Each is timed alone.",
        plots=(plots,),
    )


def known() -> Mapping[str, Question]:
    return {question.name: question for question in (cache(), decode(), roofline())}
