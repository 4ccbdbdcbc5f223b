"""Context slope: what does one more cached token cost, by absorbed MLA, expanded MLA and multi-head attention?

    T(t) = a + s t         t: cached tokens; a: weights, calls; s: what a cached token costs

The slope s has two lower bounds, with h heads, c = kv_lora_rank, and head dims n, r and v, for each layer:

    form        numbers read         FLOPs
    absorbed    c + r                2 h (2 c + r)                         every head reads the same row
    expanded    c + r                2 h c (n + v) + 2 h (n + r + v)       keys and values are made again
    MHA         h (n + v)            2 h (n + v)

Memory bounds it by bytes / bandwidth, and arithmetic by FLOPs / peak. A cache that fits into the processor's caches is
read faster than from memory.

Worked example, DeepSeek-V3 in BF16, 61 layers: a row of 576 numbers is 70,272 bytes, MHA's are 4.0 MB. At 40 GB/s that
is 1.8 us and 100 us for each cached token.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dsmini.accounting.kv_cache import kv_bytes_per_token, mha_twin
from dsmini.config import ModelConfig
from dsmini.diagnosis.decoding.alternatives import EXPANDED, MHA, no_forms, no_mha
from dsmini.diagnosis.decoding.arm import PLAIN, Arm
from dsmini.diagnosis.decoding.predictions import Prices
from dsmini.diagnosis.decoding.steps import Point, seconds_of, steps_in_turn
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.evidence.evidence import Evidence, in_turns, timed
from dsmini.machine import memory_bytes
from dsmini.measure.rates import Roofs
from dsmini.measure.step_rates import Rates
from dsmini.nn.cache import KEY_STEP
from dsmini.report import Figure, Plot, Section, Series

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
LONGER = 4
"""Longest context, in contexts of the subject, where the model allows it."""
MOST_MEMORY = 0.25
"""Share of memory that all caches together may take."""


@dataclass(frozen=True, kw_only=True)
class ContextSlopes:
    """Seconds of steps by form of attention and by cached tokens."""

    contexts: Sequence[int]
    taken: Mapping[str, Sequence[Sequence[float]]]
    """Seconds of each turn, by context, for each form."""
    predicted: Mapping[str, Sequence[float]]
    """Empty without rates."""

    def slope(self, form: str) -> float:
        """Return the seconds of one more cached token, as measured."""
        return slope_of(self.contexts, [statistics.median(each) for each in self.taken[form]])


def slope_of(contexts: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the slope of a line through all contexts, fitted with the same relative error."""
    return float(np.polyfit(contexts, seconds, 1, w=1 / np.asarray(seconds))[0]) if len(contexts) > 1 else 0.0


def least_seconds(config: ModelConfig, form: str, batch: int, dtype: str, roofs: Roofs) -> tuple[float, float]:
    """Return the seconds that memory and arithmetic need at least for one more cached token of each sequence."""
    h, c = config.n_heads, config.kv_lora_rank
    n, r, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    flops = {"absorbed": h * (2 * c + r), "expanded": h * c * (n + v) + h * (n + r + v)}.get(form, h * (n + v))
    nbytes = kv_bytes_per_token(config, 2 if dtype == "bfloat16" else 4)
    peak = roofs.peak.get(dtype, max(roofs.peak.values()))
    return batch * nbytes / roofs.bandwidth, batch * config.n_layers * 2 * flops / peak


def forms_of(subject: DecodingSubject) -> dict[str, Arm]:
    """Return the forms of attention that the model can have, the one in use first."""
    own = "absorbed" if no_forms(subject) is None else subject.config.attention.upper()
    forms = {own: PLAIN}
    if no_forms(subject) is None:
        forms["expanded"] = EXPANDED
    if no_mha(subject) is None:
        forms["MHA"] = MHA
    return forms


def contexts_of(subject: DecodingSubject, arms: int) -> list[int]:
    """Return the contexts to try, ascending: up to four times the subject's, as far as model and memory allow."""
    c = subject.config
    most = min(c.max_seq_len - 1, LONGER * subject.context)
    contexts = sorted({_aligned(max(1, round(share * most)), most) for share in SHARES})
    numbers = max(kv_bytes_per_token(c, 4), 4 * c.n_layers * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
    room = MOST_MEMORY * memory_bytes(subject.device)
    while len(contexts) > 2 and sum(contexts) * subject.batch * numbers * arms > room:
        contexts.pop()
    return contexts


def _aligned(context: int, most: int) -> int:
    """Return the nearest context after which attention reads whole steps of rows; others need a mask."""
    wanted = max(1, round((context + 1) / KEY_STEP)) * KEY_STEP - 1
    return wanted if wanted <= most else context


def numbers(subject: DecodingSubject, rates: Rates | None, seconds: float) -> ContextSlopes:
    """Predict, then measure."""
    forms = forms_of(subject)
    contexts = contexts_of(subject, len(forms))
    predicted: dict[str, list[float]] = {}
    if rates is not None:
        points = [Point(batch=subject.batch, context=context) for context in contexts]
        prices = Prices(subject, rates)
        predicted = {form: [prices.forecast(arm, p).seconds for p in points] for form, arm in forms.items()}
    turns = {}
    for form, arm in forms.items():
        for context in contexts:
            run = arm.steps(subject.model, Point(batch=subject.batch, context=context))
            turns[f"{form} {context}"] = partial(seconds_of, run, steps_in_turn(run))
    found = in_turns(turns, seconds)
    taken = {form: [found[f"{form} {context}"] for context in contexts] for form in forms}
    return ContextSlopes(contexts=contexts, taken=taken, predicted=predicted)


def run(subject: DecodingSubject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    figures: list[Figure] = []
    for form, taken in found.taken.items():
        for i, context in enumerate(found.contexts):
            said = found.predicted[form][i] if found.predicted else None
            figures.append(timed("context_slope", {"form": form, "cached tokens": context}, taken[i], said))
    words = []
    for form in found.taken:
        said = slope_of(found.contexts, found.predicted[form]) if found.predicted else None
        slope = found.slope(form)
        figures.append(_slope(form, "seconds_per_cached_token", slope, said, "slope of the line through all contexts"))
        words.append(f"{1e6 * slope:.3g} us {form}" + ("" if said is None else f" ({1e6 * said:.3g} predicted)"))
        if rates is not None:
            config = mha_twin(subject.config) if form == "MHA" else subject.config
            least = least_seconds(config, form, subject.batch, subject.compute_dtype, rates.roofs)
            for metric, bound in zip(("memory_alone", "arithmetic_alone"), least, strict=True):
                note = f"{metric}: the roofs of this machine; caches of the processor are faster than memory"
                figures.append(_slope(form, metric, None, bound, note))
    x = [float(n) for n in found.contexts]
    series: list[Series] = []
    for form, taken in found.taken.items():
        series.append(Series(label=form, x=x, y=[1e3 * statistics.median(each) for each in taken]))
        if found.predicted:
            y = [1e3 * s for s in found.predicted[form]]
            series.append(Series(label=f"{form}, predicted", x=x, y=y, dashed=True, of=form))
    return Section(
        name="context_slope",
        title="What does one more cached token cost?",
        finding=f"One more cached token costs {', '.join(words)}.",
        figures=figures,
        plots=[Plot(title="A step by its context", x="cached tokens", y="ms", series=series)],
        about="Rows of the caches are random. Expanded runs by modules, and the others by kernels where they serve, so "
        "that its slope can be compared, and its level cannot.",
    )


def _slope(form: str, metric: str, measured: float | None, predicted: float | None, note: str) -> Figure:
    return Figure(
        question="context_slope",
        case={"form": form},
        metric=metric,
        unit="s",
        measured=measured,
        predicted=predicted,
        bound=measured is None,
        note=note,
    )


def _why_not(subject: DecodingSubject) -> str | None:
    return "the model allows too few cached tokens for a line" if subject.config.max_seq_len < 16 else None


CONTEXT_SLOPE = Evidence[DecodingSubject](name="context_slope", why_not=_why_not, run=run, weight=24.0, steps=100)
