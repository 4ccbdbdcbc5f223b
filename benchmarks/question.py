"""Questions, their cases and figures: what every question of the benchmarks is made of.

A question is data: words, cases that are measured one by one, a function that answers in one sentence, and plots. Its
cases follow from the setting alone. Answers and plots use figures alone, so a page can be drawn again from a file.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from dsmini import ModelConfig
from dsmini.measure.price import Prices
from dsmini.measure.roofs import Roofs, read_bandwidth
from dsmini.measure.turns import Estimate, Run, TimeOverError, in_turns, median_of
from dsmini.measure.workloads import StepShape, dtype_name
from dsmini.report import Figure, Plot, Series, Value, pick
from dsmini.report.units import shown
from dsmini.report.units import words as in_words

REACHED = 0.5
"""Share of the peak rate that a model's products are assumed to reach in estimates of time."""


@dataclass
class Deadline:
    """Time of time.monotonic() after which no turn begins."""

    at: float = float("inf")

    def __call__(self, share: float, _: object) -> None:
        """Raise TimeOverError after it, unless all turns are done; the on_turn of in_turns."""
        if share < 1 and time.monotonic() > self.at:
            raise TimeOverError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that all cases share."""

    quick: bool
    """Small sizes, for all questions in two minutes on two cores."""
    device: torch.device
    dtype: torch.dtype
    roofs: Roofs
    """Measured rates of this machine."""
    prices: Prices | None = None
    """Seconds of operations here; None on a GPU, where nothing is predicted."""
    text: Path | None = None
    """File that --text names, for the questions that read one."""
    peer_python: tuple[Path, ...] = ()
    """Pythons that --peer-python names, which have llama.cpp or ik_llama.cpp."""
    out: Path = Path("results")
    """Folder of --out, for files that a question writes besides its figures."""
    deadline: Deadline = field(default_factory=Deadline)
    """Time until which the running case may begin another turn."""

    @property
    def turns(self) -> dict[str, Any]:
        """Number, seconds and deadline of the turns of a comparison, as in_turns takes them."""
        number = {"count": 9, "seconds": 1.5, "least": 3} if self.quick else {"count": 40, "seconds": 12.0, "least": 6}
        return {**number, "on_turn": self.deadline}

    def predicted(
        self, shapes: Mapping[str, StepShape], make: Callable[[ModelConfig], Run] | None = None
    ) -> dict[str, float]:
        """Return the predicted seconds of steps by name; of none where nothing is predicted.

        Args:
            make: makes a step of a model, where it is not a plain one.
        """
        if self.prices is None:
            return {}
        prices, made = self.prices, {n: make and partial(make, shape.config) for n, shape in shapes.items()}
        return {name: prices.forecast(shape, made[name]).seconds for name, shape in shapes.items()}

    @property
    def dtype_name(self) -> Literal["float32", "bfloat16"]:
        """Name of the dtype in accounting and in this machine's rates."""
        return dtype_name(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Part of a question that is measured in one go and stays done when a run is interrupted."""

    key: str
    """Name within the question, with everything its figures depend on: "context=2048 dtype=bfloat16"."""
    seconds: float
    """Estimated seconds on this machine."""
    run: Callable[[], Iterable[Figure]]


def seconds_of_products(flops: float, dtype: torch.dtype, setting: Setting) -> float:
    """Return the estimated seconds of a model's products on this machine; 0 if its rate is unknown."""
    peak = setting.roofs.peak.get(dtype_name(dtype))
    return flops / (REACHED * peak) if peak else 0.0


def cases_over(
    key: str, points: Iterable[tuple[Any, ...]], seconds: float, measure: Callable[..., Iterable[Figure]]
) -> list[Case]:
    """Return a case for each point, whose values fill the key ("context={}") and are the last arguments of measure."""
    return [Case(key=key.format(*point), seconds=seconds, run=partial(measure, *point)) for point in points]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Question of the benchmarks."""

    name: str
    """Name in python -m benchmarks NAME."""
    title: str
    about: str | None
    """Docstring of its module: how it is measured, with all that is simulated."""
    cases: Callable[[Setting], list[Case]]
    answer: Callable[[list[Figure]], str]
    """Function that makes one sentence from figures, which may be incomplete; "" if they are not enough."""
    plots: Sequence[Callable[[list[Figure]], list[Plot]]] = ()
    """Functions that draw figures, such as those of `drawing`."""
    needs: str = ""
    """Reason why the question cannot run here, such as a missing package; empty if it can."""
    on_request: bool = False
    """True for a question that takes long: only a run that names it includes it."""
    needs_text: bool = False
    """True if it reads the file of --text."""


def drawing(
    metric: str,
    title: str,
    label: str | Callable[[Figure], str] = "",
    *,
    x: str = "",
    by: str = "",
    only: Callable[[Figure], bool] = lambda f: True,
    kind: Literal["points", "bars"] = "points",
    line: tuple[str, float] | None = None,
    predicted: bool = False,
    log_y: bool = False,
) -> Callable[[Sequence[Figure]], list[Plot]]:
    """Return a function that plots a metric over a number of the case, or over labels that are made of the case.

    Lines over a number have dashed predictions. Values over labels have their 95 % intervals.

    Args:
        label: label of a figure; a string is filled with its case, such as "{block} {linear}".
        x: key of the number on the horizontal axis; "" draws over labels.
        by: key whose values have a line or a group each.
        only: True for the figures to draw.
        line: label and height of a dashed line across all labels.
        predicted: draw predictions over labels too, as points.
    """

    def place(f: Figure) -> Any:
        if x:
            return float(f.case[x])
        return label.format(**f.case) if isinstance(label, str) else label(f)

    def group(f: Figure) -> str:
        value = f.case[by] if by else "measured"
        return str(value) if isinstance(value, str) or not x else f"{by} {value}"

    def draw(figures: Sequence[Figure]) -> list[Plot]:
        found = [f for f in pick(figures, metric) if f.measured is not None and {x, by} - {""} <= f.case.keys()]
        found = sorted(filter(only, found), key=place) if x else list(filter(only, found))
        if not found:
            return []
        labels, series = list(dict.fromkeys(map(place, found))), list[Series]()
        for name in dict.fromkeys(map(group, found)):
            mine = [f for f in found if group(f) == name]
            at = [place(f) if x else float(labels.index(place(f))) for f in mine]
            low, high = ([getattr(f, end) for f in mine] for end in ("low", "high"))
            ends: Any = {} if None in low or None in high else {"low": low, "high": high}
            shape = "line" if x else kind
            series.append(Series(label=name, x=at, y=[f.measured or 0.0 for f in mine], kind=shape, **ends))
            if predicted or (x and all(f.predicted for f in mine)):
                y, shape = [f.predicted or 0.0 for f in mine], "line" if x else "points"
                series.append(Series(label=f"{name}, predicted", x=at, y=y, kind=shape, dashed=True, of=name))
        if line:
            words, height = line
            series.append(Series(label=words, x=[-0.5, len(labels) - 0.5], y=[height] * 2, dashed=True))
        if x:
            return [Plot(title=title, x=x, y=found[0].unit, series=series, log_x=True, log_y=True)]
        return [Plot(title=title, x="", y=in_words(metric), series=series, labels=labels, log_y=log_y)]

    return draw


UNITS: Mapping[str, str] = {
    **dict.fromkeys(("seconds", "step_seconds"), "s"),
    **dict.fromkeys(("bytes_per_token", "kept"), "bytes"),
    **dict.fromkeys(("peak_memory", "tensor_memory"), "bytes"),
    **dict.fromkeys(("error", "times_the_error", "kept_ratio", "bubble", "share_of_roof"), ""),
    **dict.fromkeys(("right", "gain", "recall", "answered"), ""),
    "times_as_long": "x",
    **dict.fromkeys(("loss", "loss_as_peer"), "nats"),
    "tokens_per_s": "tokens/s",
    "flop_rate": "FLOP/s",
    "bandwidth": "bytes/s",
    "flops_per_token": "FLOP",
    "distinct_experts": "experts",
}
"""Unit of each metric."""


def figure(
    metric: str,
    case: Mapping[str, Value],
    measured: float | Estimate | Sequence[float] | None = None,
    *,
    of: str = "",
    **more: Any,
) -> Figure:
    """Return a figure; of several independent values the median, with its 95 % interval. The runner names the question.

    Args:
        of: metric whose unit it has, for one that UNITS does not list, such as a difference.
    """
    found = median_of(measured) if isinstance(measured, Sequence) else measured
    if isinstance(found, Estimate):
        more = {"low": found.low if found.is_clear else None, "high": found.high if found.is_clear else None, **more}
        found = found.value
    return Figure(question="", case=case, metric=metric, unit=UNITS[of or metric], measured=found, **more)


def left_out(metric: str, case: Mapping[str, Value], reason: str) -> Figure:
    """Return a figure that was not measured, with the reason."""
    return figure(metric, case, note=f"left out: {reason}")


def race(
    setting: Setting,
    case: Mapping[str, Value],
    runs: Mapping[str, Run],
    *,
    key: str = "model",
    each: float = 1.0,
    predicted: Mapping[str, float] = MappingProxyType({}),
    tokens: float = 0.0,
    roof: float = 0.0,
    pairs: Sequence[tuple[str, str]] | None = None,
    note: str = "",
    **turns: Any,
) -> Iterator[Figure]:
    """Let runs take turns. Yield the seconds of each, and how many times as long the others take as the first.

    Args:
        key: name of the runs in a case, such as "attention".
        each: steps in a run; seconds are of one.
        predicted: seconds of a run, by name.
        tokens: of a run; then tokens a second take the place of seconds.
        roof: least seconds of a run; then the share that each run reaches of the roof is a figure too.
        pairs: runs to compare, each with the one that it is compared with; None: all with the first.
        turns: arguments of in_turns, instead of the setting's.
    """

    def shown_as(seconds: float) -> float:
        return tokens / seconds if tokens else seconds / each

    taken = in_turns(runs, setting.device, **{**setting.turns, **turns})
    for name, seconds in taken.seconds.items():
        expected = shown_as(predicted[name]) if predicted else None
        values, metric = list(map(shown_as, seconds)), "tokens_per_s" if tokens else "seconds"
        yield figure(metric, {**case, key: name}, values, predicted=expected, note=note)
        if roof:
            yield figure("share_of_roof", {**case, key: name}, [roof / one for one in seconds])
    first, *others = runs
    for name, than in [(other, first) for other in others] if pairs is None else pairs:
        expected = predicted[name] / predicted[than] if predicted else None
        here = {**case, key: name, "than": than}
        yield figure("times_as_long", here, taken.ratio(name, than), predicted=expected, note=note)


def times(f: Figure) -> str:
    """Return a ratio in words, with its interval: "1.62 times (1.55 to 1.70)"; unclear if the interval holds 1."""
    assert f.measured is not None, "the caller picks measured figures"
    digits = 1 if f.measured >= 10 else 2
    if f.low is None or f.high is None:
        return f"{f.measured:.{digits}f} times"
    unclear = ", unclear" if f.low <= 1 <= f.high else ""
    return f"{f.measured:.{digits}f} times ({f.low:.{digits}f} to {f.high:.{digits}f}{unclear})"


def compared(figures: Iterable[Figure], x: str = "", at: str = "at {}", key: str = "model") -> str:
    """Return in words how many times as long runs take as the first one of their race, at both ends of x.

    "MHA 1.21 times (1.18 to 1.25) at context 512 and 1.62 times (1.55 to 1.70) at context 4,096; GQA 1.10 times"

    Args:
        x: key of the case whose smallest and largest value are told; "": a single race.
        at: words after a ratio, with the value of x.
    """
    told = []
    ratios = [f for f in pick(figures, "times_as_long") if f.measured is not None and key in f.case]
    for name in dict.fromkeys(f.case[key] for f in ratios):
        mine = sorted((f for f in ratios if f.case[key] == name), key=lambda f: f.case.get(x, 0))
        ends = [f"{times(f)} {at.format(shown(f.case[x])) if x else ''}".rstrip() for f in (mine[:1] + mine[1:][-1:])]
        told.append(f"{name} {' and '.join(ends)}")
    return "; ".join(told)


FASTEST = 1.25
"""Rate of the best kernels over that of the plain reading which is the roof (docs/log.md)."""


def check_bandwidth(what: str, reached: float, setting: Setting) -> float:
    """Return the roof of reading memory, in bytes/s, for a rate that was reached.

    A rate above the stored roof has it measured again: other processes may have slowed its first measurement.

    Raises: ValueError for a rate far above the roof, which can only be an error of counting.
    """
    roof = setting.roofs.memory
    if reached > roof:
        roof = max(roof, read_bandwidth(setting.device))
    if reached > FASTEST * roof:
        raise ValueError(
            f"{what}: {reached / 1e9:.1f} GB/s from memory is above the roof of {roof / 1e9:.1f}: bytes are "
            "counted wrong, or the stored roof is too low; --fresh measures it again"
        )
    return roof
