"""How much does each product lose to FP8?

The shape of configs/fp8.toml (quick: a smaller one) is trained natively for a few steps on real text. Of one more step
the inputs, weights and output gradients of all Linears that FP8 training rounds are caught, and each product is made
twice in FP32: of them, and of them rounded to E4M3 as DeepSeek-V3 does. Simulated: sums are FP32's. Simplified: the
input of w2 is kept itself, not its two factors.
"""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, pick, values
from benchmarks.fp8_products import PRODUCTS, capture, losses, product_error
from benchmarks.trained import recipe, trainer, training_flops
from dsmini import ModelConfig, RunConfig, TrainConfig
from dsmini.numerics import E4M3, E5M2
from dsmini.report.charts import over_labels

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
    neither={"error_with_e5m2_gradients": "x", "error_with_fp32_scales": "x"},
)


def cases(setting: Setting) -> list[Case]:
    config = QUICK if setting.quick else dataclasses.replace(recipe("fp8").model, precision="native")
    steps, seconds = (QUICK_STEPS, 3.0) if setting.quick else (STEPS, 70.0)
    flops = training_flops(config, steps * BATCH)
    return [Case(key=f"steps={steps}", seconds=seconds, flops=flops, run=lambda: measure(setting, config, steps))]


def measure(setting: Setting, model: ModelConfig, steps: int) -> Iterator[Figure]:
    config = RunConfig(model=model, train=TrainConfig(steps=max(2, steps), batch_size=BATCH))
    trained = trainer(config, setting, steps)
    trained.loader.close()
    trained.model.compute_dtype = torch.float32
    rows = QUICK_ROWS if setting.quick else ROWS
    tokens, targets = trained.corpus.batch(trained.sequences, rows, config.seq_len, 0)
    errors, underflow = losses(capture(trained.model, tokens.to(setting.device), targets.to(setting.device)))
    multiples: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (way, block, linear, product), error in errors.items():
        if way == "tiles":
            yield figure("error", {"block": block, "linear": linear, "product": product}, error, predicted=EXPECTED)
        elif plain := errors["tiles", block, linear, product]:
            multiples[way, linear if way == "one scale" else "all", product].append(error / plain)
    for (way, linear, product), found in multiples.items():
        metric, over = OTHER_WAYS[way]
        note = f"over the error with a power-of-two scale a tile; quartiles over {over}"
        yield figure(
            metric, {"linear": linear, "product": product}, found, predicted=_expected(way, product), note=note
        )
    for (way, linear, operand), share in underflow.items():
        yield figure("underflow", {"linear": linear, "operand": operand, "scales": way}, share)


def _expected(way: str, product: str) -> float | None:
    """Return the multiple that rounding alone makes; None where it depends on the values."""
    if way == "one scale":
        return None
    return product_error(E4M3, E5M2) / EXPECTED if way == "e5m2 gradients" and product != "fprop" else 1.0


def finding(figures: list[Figure]) -> str:
    errors, gains = ([f for f in pick(figures, m) if f.measured is not None] for m in ("error", "gain_of_tiles"))
    if not errors:
        return ""
    medians = {product: values(errors, "error", product=product) for product in PRODUCTS}
    parts = [f"{product} {statistics.median(found):.1%}" for product, found in medians.items() if found]
    text = (
        f"Relative errors of FP8 products: {', '.join(parts)} (medians; rounding alone makes {EXPECTED:.1%} where "
        f"terms "
        f"have either sign), at most {_largest(errors, '{:.1%}')}"
    )
    if gains:
        middle = statistics.median(values(gains, "gain_of_tiles"))
        text += f"; with one scale for the whole matrix they would be {middle:.2f} times as large"
        text += f", at most {_largest(gains, '{:.2f} times')}"
    return text + "."


def _largest(figures: list[Figure], as_: str) -> str:
    f = max(figures, key=lambda f: f.measured or 0.0)
    where = f" of {f.case['block']}" if "block" in f.case else ""
    return f"{as_.format(f.measured)}, in {f.case['product']} of {f.case['linear']}{where}"


def plots(figures: list[Figure]) -> list[Plot]:
    def block_and_linear(f: Figure) -> str:
        return f"{f.case['block']} {f.case['linear']}"

    errors = {p: {block_and_linear(f): f for f in pick(figures, "error", product=p)} for p in PRODUCTS}
    flushed = {
        f"{operand}, {scales}": {
            str(f.case["linear"]): f for f in pick(figures, "underflow", scales=scales, operand=operand)
        }
        for scales in ("tiles", "one scale")
        for operand in ("input", "weight", "gradient")
    }
    of_result = "Of the result, against the FP32 product of what was not rounded; experts of a layer together."
    of_values = "Of those that were not zero before; all blocks together."
    line = ("rounding alone", EXPECTED)
    return [
        *over_labels("Relative error of FP8 products", "relative error", errors, line=line, caption=of_result),
        *over_labels("Values that become zero", "share of the values", flushed, caption=of_values),
    ]
