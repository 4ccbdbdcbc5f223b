"""Which products lose how much?

The shape of configs/fp8.toml (quick: a smaller one) is trained natively for a few steps on real text. Of one more step
the inputs, weights and output gradients of all Linears that FP8 training rounds are caught, and each product is made
twice in FP32: of them, and of them rounded to E4M3 as DeepSeek-V3 does. Simulated: sums are FP32's. Simplified: the
input of w2 is kept itself, not its two factors.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, pick
from benchmarks.trained import recipe, trainer
from dsmini import ModelConfig, RunConfig, TrainConfig, accounting
from dsmini.measure.fp8 import PRODUCTS, capture, losses, product_error
from dsmini.measure.timing import spread
from dsmini.numerics import E4M3, E5M2
from dsmini.report.charts import points

NAME = "fp8-error"
QUICK = dataclasses.replace(
    shapes.TRAINED, n_layers=2, inter_dim=512, moe_inter_dim=128, q_lora_rank=128, kv_lora_rank=128
)
"""Small, and its tiles exist: all that is summed over is a multiple of 128."""
STEPS, QUICK_STEPS, BATCH = 24, 20, 4
ROWS, QUICK_ROWS = 4, 2
"""Sequences of the step whose matrices are looked at."""
EXPECTED = product_error(E4M3, E4M3)
OTHER_WAYS = {
    "one scale": ("gain_of_tiles", "blocks"),
    "e5m2 gradients": ("error_with_e5m2_gradients", "blocks and Linears"),
    "fp32 scales": ("error_with_fp32_scales", "blocks and Linears"),
}
"""Metric of the errors of each other way to round, as multiples of DeepSeek-V3's, and what its quartiles are over."""

figure = Figures(
    NAME,
    higher={"gain_of_tiles": "x"},
    lower={"error": "", "underflow": ""},
    neither={"error_with_e5m2_gradients": "x", "error_with_fp32_scales": "x", "clamped": "values"},
)


def cases(setting: Setting) -> list[Case]:
    config = QUICK if setting.quick else dataclasses.replace(recipe("fp8").model, precision="native")
    steps, seconds = (QUICK_STEPS, 3.0) if setting.quick else (STEPS, 70.0)
    flops = accounting.flops_per_token(config, config.max_seq_len, training=True).total
    flops *= steps * BATCH * config.max_seq_len
    return [Case(key=f"steps={steps}", seconds=seconds, flops=flops, run=lambda: measure(setting, config, steps))]


def measure(setting: Setting, model: ModelConfig, steps: int) -> Iterator[Figure]:
    config = RunConfig(model=model, train=TrainConfig(steps=max(2, steps), batch_size=BATCH))
    trained = trainer(config, setting, steps)
    trained.loader.close()
    trained.model.compute_dtype = torch.float32
    rows = QUICK_ROWS if setting.quick else ROWS
    tokens, targets = trained.corpus.batch(trained.sequences, rows, config.seq_len, 0)
    lost = losses(capture(trained.model, tokens.to(setting.device), targets.to(setting.device)))
    for (name, block, linear, product), error in lost.errors.items():
        if name == "tiles":
            case = {"block": block, "linear": linear, "product": product}
            yield figure("error", case, error, predicted=EXPECTED)
    yield from _comparisons(lost.errors)
    for (name, linear, operand), share in lost.underflow.items():
        yield figure("underflow", {"linear": linear, "operand": operand, "scales": name}, share)
    note = "a tile's scale is made of its largest value"
    for operand, count in lost.clamped.items():
        yield figure("clamped", {"operand": operand}, count, predicted=0, exact=True, note=note)


def _comparisons(errors: dict[tuple[str, str, str, str], float]) -> Iterator[Figure]:
    """Tell the errors of the other ways as multiples of DeepSeek-V3's."""
    multiples: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (name, block, linear, product), error in errors.items():
        if name != "tiles" and errors["tiles", block, linear, product]:
            where = linear if name == "one scale" else "all"
            multiples[name, where, product].append(error / errors["tiles", block, linear, product])
    for (name, linear, product), values in multiples.items():
        metric, over = OTHER_WAYS[name]
        note = f"over the error with a power-of-two scale a tile; quartiles over {over}"
        case = {"linear": linear, "product": product}
        yield figure(metric, case, values, predicted=_expected(name, product), note=note)


def _expected(way: str, product: str) -> float | None:
    """Return the multiple that rounding alone makes; None where it depends on the values."""
    if way == "one scale":
        return None
    return product_error(E4M3, E5M2) / EXPECTED if way == "e5m2 gradients" and product != "fprop" else 1.0


def finding(figures: list[Figure]) -> str:
    errors = [f for f in pick(figures, "error") if f.measured is not None]
    if not errors:
        return "Nothing was measured yet."
    by_product = {product: pick(errors, "error", product=product) for product in PRODUCTS}
    parts = [f"{product} {_median(found):.1%}" for product, found in by_product.items() if found]
    worst = max(errors, key=lambda f: f.measured or 0.0)
    text = (
        f"FP8 products are off by {', '.join(parts)} of their size (medians; {EXPECTED:.1%} is what "
        f"rounding makes of sums whose terms have either sign), at most {worst.measured:.1%}, in "
        f"{worst.case['product']} of {worst.case['linear']} in {worst.case['block']}"
    )
    gains = [f for f in pick(figures, "gain_of_tiles") if f.measured is not None]
    if gains:
        best = max(gains, key=lambda f: f.measured or 0.0)
        most = best.measured or 0.0
        text += f"; with one scale a tensor the errors would be {_median(gains):.2f} times as large"
        if most > 1.01:
            text += f", at most {most:.2f} times, in {best.case['product']} of {best.case['linear']}"
    return text + "."


def _median(figures: list[Figure]) -> float:
    return spread([f.measured or 0.0 for f in figures])["measured"]


def plots(figures: list[Figure]) -> list[Plot]:
    errors = {product: pick(figures, "error", product=product) for product in PRODUCTS}
    flushed = {
        f"{operand}, {scales}": pick(figures, "underflow", scales=scales, operand=operand)
        for scales in ("tiles", "one scale")
        for operand in ("input", "weight", "gradient")
    }
    drawn = [
        points(
            "Relative error of FP8 products",
            "relative error",
            errors,
            lambda f: f"{f.case['block']} {f.case['linear']}",
            line=("rounding alone", EXPECTED),
            caption="Of the result, against the FP32 product of what was not rounded; experts of a layer together.",
        ),
        points(
            "Values that become zero",
            "share of the values",
            flushed,
            lambda f: str(f.case["linear"]),
            caption="Of those that were not zero before; all blocks together.",
        ),
    ]
    return [plot for plot in drawn if plot.labels]
