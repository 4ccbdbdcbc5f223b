"""Numerics: what do short formats change, product by product, and in the loss?"""

import statistics
import time
from collections.abc import Sequence

from dsmini.diagnosis.evidence.evidence import Evidence, none_of
from dsmini.diagnosis.evidence.loss_gap import LossGaps, loss_gaps
from dsmini.diagnosis.evidence.products import GROUPS, PASSES, UNITS, ProductError, product_errors
from dsmini.diagnosis.subject import Subject
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Plot, Section, Series

PRODUCTS = 0.25
"""Share of the time that products may take. The loss gap has the rest."""
INSIDE = (
    "A gap inside the band means that another order of the data changes the loss more than the dtype does. It does not "
    "prove that a long training ends alike: over so few steps a small gap may only begin to grow. A gap outside the "
    "band is the dtype's."
)


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page. Errors of products are expected before they are measured; the loss gap is not."""
    start = time.perf_counter()
    products = product_errors(subject, PRODUCTS * seconds)
    gaps = loss_gaps(subject, seconds - (time.perf_counter() - start))
    warnings = products.wrong[:3]
    if len(products.wrong) > len(warnings):
        warnings.append(f"{len(products.wrong) - len(warnings)} more products are wrong.")
    warnings += [f"The loss in {dtype} is not finite after {gaps.steps} steps." for dtype in gaps.not_finite]
    figures, plot = _of_products(products.errors)
    about = (
        "Operands are rounded as FP8 training rounds them, in tiles of 1 x 128 and blocks of 128 x 128. Simulated: "
        "products are added in FP32. Independent roundings are predicted. FP8 training leaves the head and the input "
        "of guesses in BF16."
    )
    if products.left_out:
        about += f" {products.left_out} matrices were left out, for want of time."
    return Section(
        name="numerics",
        title="What do short formats change?",
        finding=" ".join((_products_in_words(products.errors), _gaps_in_words(gaps))),
        figures=[*figures, *_of_gaps(gaps)],
        plots=[plot],
        prose=[("Inside and outside the band", INSIDE)] if gaps.losses else [],
        about=about,
        warnings=warnings,
    )


def _of_products(errors: Sequence[ProductError]) -> tuple[list[Figure], Plot]:
    """Return the figures of each class of products, pass and format, and a plot of those in FP8."""
    groups = [group for _, group in GROUPS if any(each.group == group for each in errors)]
    figures: list[Figure] = []
    series: list[Series] = []
    for format in UNITS:
        for part in PASSES:
            each = [[e for e in errors if (e.group, e.part, e.format) == (group, part, format)] for group in groups]
            some = [_figure(group, part, format, es) for group, es in zip(groups, each, strict=True) if es]
            figures += some
            if format == "fp8":
                at = [float(groups.index(str(figure.case["products"]))) for figure in some]
                series.append(Series(label=part, x=at, y=[100 * (f.measured or 0.0) for f in some], kind="bars"))
    said = [figure for figure in figures if (figure.case["format"], figure.case["part"]) == ("fp8", PASSES[0])]
    at = [float(groups.index(str(figure.case["products"]))) for figure in said]
    y = [100 * (figure.predicted or 0.0) for figure in said]
    series.append(Series(label=f"{PASSES[0]}, predicted", x=at, y=y, kind="bars", dashed=True, of=PASSES[0]))
    title = "Error of products in FP8 against FP32"
    return figures, Plot(title=title, x="products", y="% of their size", series=series, labels=groups)


def _figure(group: str, part: str, format: str, errors: Sequence[ProductError]) -> Figure:
    """Return the figure of the root mean squares over some products."""
    each = sorted(one.error for one in errors)
    return Figure(
        question="numerics",
        case={"products": group, "part": part, "format": format},
        metric="relative_error",
        unit="",
        measured=_root_mean_square(each),
        low=each[len(each) // 4],
        high=each[-1 - len(each) // 4],
        predicted=_root_mean_square([one.expected for one in errors]),
        note="FP8 is simulated" if format == "fp8" else "",
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return statistics.mean(value**2 for value in values) ** 0.5


def _of_gaps(gaps: LossGaps) -> list[Figure]:
    if not gaps.losses:
        return []
    figures: list[Figure] = []
    for dtype, losses in gaps.losses.items():
        case = {"dtype": dtype, "steps": gaps.steps}
        figures.append(_of_seeds("held_out_loss", case, losses))
        if dtype != gaps.now:
            figures.append(_of_seeds("loss_gap", {**case, "against": gaps.now}, gaps.gaps(dtype)))
    band = {"dtype": gaps.now, "steps": gaps.steps, "orders": len(gaps.losses[gaps.now])}
    figures.append(
        Figure(question="numerics", case=band, metric="band_of_orders", unit="nats a token", measured=gaps.band)
    )
    return figures


def _of_seeds(metric: str, case: dict[str, str | int], values: Sequence[float]) -> Figure:
    return Figure(
        question="numerics",
        case=case,
        metric=metric,
        unit="nats a token",
        measured=statistics.mean(values),
        low=min(values),
        high=max(values),
    )


def _products_in_words(errors: Sequence[ProductError]) -> str:
    parts: list[str] = []
    for format, name in (("fp8", "FP8"), ("bfloat16", "BF16")):
        some = [each for each in errors if each.format == format]
        if some:
            error, expected = (
                _root_mean_square([getattr(each, key) for each in some]) for key in ("error", "expected")
            )
            parts.append(f"{name} products err by {error:.2%} of their size, {expected:.2%} were predicted")
    return f"{'; '.join(parts)}." if parts else "All products are zero."


def _gaps_in_words(gaps: LossGaps) -> str:
    if gaps.why_not:
        return f"The loss was not compared: {gaps.why_not}."
    parts: list[str] = []
    for dtype in gaps.losses:
        if dtype != gaps.now:
            mean = statistics.mean(gaps.gaps(dtype))
            parts.append(f"{dtype} by {mean:+.4f} nats, {'inside' if gaps.is_inside(dtype) else 'outside'}")
    left_out = f" There was no time for {' and '.join(gaps.left_out)}." if gaps.left_out else ""
    return (
        f"After {gaps.steps} steps the held-out loss differs from that of the run's {gaps.now}: {'; '.join(parts)} the "
        f"band of {gaps.band:.4f} that {len(gaps.losses[gaps.now])} orders of the data make."
        f"{left_out}"
    )


NUMERICS = Evidence(name="numerics", why_not=none_of, run=run, weight=16.0, steps=8)
