"""Questions and a machine that measure nothing, for the tests of what runs and shows benchmarks.

python -c "import tests.helpers.fake_questions as f; f.main()" NAME ... --out DIR
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.case import Case, Figure, Plot, Series, Setting, pick
from benchmarks.questions import Question
from dsmini.measure.rates import Curve, Roofs

ROOFS = Roofs(
    card={"processor": "an 8-core <test> & more", "cores": "2", "memory": "16 GiB", "device": "cpu"},
    peak={"float32": 150e9, "bfloat16": 900e9},
    bandwidth=38e9,
    copy=31e9,
    call=1.2e-6,
    cache_bytes=32 << 20,
    probes={},
    curves={"warm pointwise float32": Curve(sizes=[1e3, 1e6], costs=[1e-6, 1e-4])},
)
CONTEXTS = (128, 512, 2048, 8192)
RATES = {("dsmini", 128): 52.0, ("dsmini", 512): 51.0, ("dsmini", 2048): 47.0, ("dsmini", 8192): 36.0} | {
    ("transformers, of the same shape", c): 6400 / (128 + c / 2) for c in CONTEXTS
}


def roofs(device: torch.device, *, on_part: Callable[[float, str], None], fresh: bool) -> Roofs:
    on_part(0.5, "peak float32")
    return ROOFS


def decode(on_case: Callable[[str], None] = lambda key: None, speed: float = 1.0) -> Question:
    """Times with quartiles, a line of predictions, notes.

    Args:
        on_case: told of each case before it is measured; may raise.
    """

    def measure(who: str, context: int) -> Iterator[Figure]:
        on_case(f"{who} {context}")
        rate = RATES[who, context] * speed
        yield Figure(
            question="fake_decode", case={"side": who, "context": context, "dtype": "bfloat16"},
            metric="tokens_per_s", unit="tokens/s", measured=rate, predicted=60 / (1 + context / 20000),
            low=rate * 0.97, high=rate * 1.02, better="higher",
            note="Weights are random." if who != "dsmini" else "",
        )  # fmt: skip

    def cases(setting: Setting) -> list[Case]:
        contexts = CONTEXTS[:2] if setting.quick else CONTEXTS
        sides = dict.fromkeys(who for who, _ in RATES)
        return [
            Case(key=f"{who} {c}", seconds=2.0, run=lambda who=who, c=c: measure(who, c))
            for who in sides for c in contexts
        ]  # fmt: skip

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
        caption = "Single tokens from a filled cache; medians, and the quartiles of 24 tokens."
        title = "Decoding at growing contexts"
        return [Plot(title=title, x="context, tokens", y="tokens/s", log_x=True, series=series, caption=caption)]

    return Question(
        name="fake_decode",
        title="How fast does a model decode, and does it stay fast at long contexts?",
        cases=cases,
        finding=lambda figures: (
            f"At context 8,192 it decodes {len(pick(figures, 'tokens_per_s'))} times as fast as before."
        ),
        plots=plots,
        about="Both sides hold the same shape with random weights and take turns, six tokens each, so that a busy "
        "neighbour slows both. Nothing is simulated.",
    )


def cache(measured: int | None = None) -> Question:
    """Exact counts in bytes, as bars, with long labels and with short ones.

    Args:
        measured: bytes of MLA's cache instead of the right ones.
    """
    kinds = {
        "MLA": 70_272,
        "MQA": 31_232,
        "GQA of 8": 249_856,
        "MHA, 128 wide": 3_997_696,
        "MHA, with <tags> & $5": 9_000_000,
    }

    def run(kind: str) -> Iterator[Figure]:
        size = kinds[kind]
        yield Figure(
            question="fake_cache", case={"attention": kind}, metric="bytes_per_token", unit="bytes",
            measured=measured if kind == "MLA" and measured else size, predicted=size, exact=True, better="lower",
        )  # fmt: skip

    def bars(figures: list[Figure], labels: list[str], title: str) -> Plot:
        values = [f.measured or 0.0 for f in figures]
        return Plot(
            title=title, x="attention", y="bytes a token", labels=labels,
            series=[
                Series(label="measured", x=(), y=values, kind="bars"),
                Series(label="predicted", x=(), y=[f.predicted or 0.0 for f in figures], kind="bars", dashed=True,
                    of="measured"),
            ],
        )  # fmt: skip

    def plots(figures: list[Figure]) -> list[Plot]:
        names = [str(f.case["attention"]) for f in figures]
        return [
            bars(figures, names, "Cache of a token, by attention"),
            bars(figures[:3], names[:3], "The small ones"),
        ]

    return Question(
        name="fake_cache",
        title="How many bytes does a token keep?",
        cases=lambda setting: [Case(key=kind, seconds=0.1, run=lambda kind=kind: run(kind)) for kind in kinds],
        finding=lambda figures: "MLA keeps 70,272 bytes a token, 98.24 % less than multi-head attention.",
        plots=plots,
        about="Read off the storages.",
    )


def roofline() -> Question:
    """A cloud of named points under a roof, and a plot without anything in it."""
    points = {"rmsnorm": (0.3, 8e9), "softmax": (0.7, 21e9), "gate": (1.1, 30e9), "rope": (0.5, 9e9)}
    points |= {"w1, w3": (180.0, 6e11), "wo": (90.0, 5.1e11), "wkv_b": (40.0, 4.6e11), "experts": (33.0, 3e11)}
    points |= {"absorbed scores": (14.0, 2.2e11)}

    def run() -> Iterator[Figure]:
        for name, (intensity, rate) in points.items():
            yield Figure(
                question="fake_roofline", case={"operation": name, "intensity": intensity, "rows": 4096}, metric="rate",
                unit="FLOP/s", measured=rate, predicted=min(9e11, intensity * 38e9), better="higher",
            )  # fmt: skip
        yield Figure(question="fake_roofline", case={"share": True}, metric="share_of_peak", unit="", measured=0.63)

    def plots(figures: list[Figure]) -> list[Plot]:
        mine = pick(figures, "rate")
        x = [0.1, 900 / 38, 1000.0]
        roof = Series(label="the roof", x=x, y=[min(9e11, v * 38e9) for v in x], dashed=True)
        cloud = Series(
            label="operations", x=[float(f.case["intensity"]) for f in mine], y=[f.measured or 0.0 for f in mine],
            kind="points",
        )  # fmt: skip
        return [
            Plot(title="The roofline", x="FLOP a byte", y="FLOP/s", log_x=True, log_y=True, series=[roof, cloud]),
            Plot(title="Of nothing", x="", y="", series=[Series(label="none", x=[1.0], y=[math.nan])]),
        ]

    return Question(
        name="fake_roofline",
        title="How close does every operation come to what this machine can do?",
        cases=lambda setting: [Case(key="all", seconds=1.0, run=run)],
        finding=lambda figures: "Seven of nine operations reach more than half of their roof; rope is far below it.",
        plots=plots,
    )


def known() -> Mapping[str, Question]:
    return {question.name: question for question in (cache(), decode(), roofline())}


def main() -> None:
    from benchmarks import runner

    sys.exit(runner.main(sys.argv[1:], known(), roofs))
