"""Which products of a training step lose how much to FP8, measured on the matrices of a real one."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch

from benchmarks.question import Case, Figure, Plot, Question, Setting, pick
from benchmarks.trained import trainer
from dsmini import ModelConfig, RunConfig, TrainConfig, accounting
from dsmini.measure.fp8 import PRODUCTS, Gemm, capture, losses, product_error
from dsmini.measure.timing import spread
from dsmini.numerics import E4M3, E5M2
from dsmini.report.charts import points

NAME = "fp8-error"
QUICK = ModelConfig(
    dim=256,
    inter_dim=512,
    moe_inter_dim=128,
    n_layers=2,
    n_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_mtp_layers=0,
)
"""Small, and its tiles exist: all that is summed over is a multiple of 128."""
STEPS, QUICK_STEPS, BATCH = 24, 20, 4
ROWS, QUICK_ROWS = 4, 2
"""Sequences of the step whose matrices are looked at."""
EXPECTED = product_error(E4M3, E4M3)


def cases(setting: Setting) -> list[Case]:
    steps = QUICK_STEPS if setting.quick else STEPS
    seconds = 3.0 if setting.quick else 70.0
    config = QUICK if setting.quick else _fp8_config().model
    flops = accounting.flops_per_token(config, config.max_seq_len, training=True).total
    flops *= steps * BATCH * config.max_seq_len
    return [Case(key=f"steps={steps}", seconds=seconds, flops=flops, run=lambda: measure(setting))]


def measure(setting: Setting) -> Iterator[Figure]:
    quick = setting.quick
    model_config = QUICK if quick else dataclasses.replace(_fp8_config().model, precision="native")
    steps = QUICK_STEPS if quick else STEPS
    config = RunConfig(model=model_config, train=TrainConfig(steps=max(2, steps), batch_size=BATCH))
    trained = trainer(config, setting, steps)
    trained.loader.close()
    trained.model.compute_dtype = torch.float32
    tokens, targets = trained.corpus.batch(trained.sequences, QUICK_ROWS if quick else ROWS, config.seq_len, 0)
    gemms = capture(trained.model, tokens.to(setting.device), targets.to(setting.device))
    yield from figures(gemms)


def _fp8_config() -> RunConfig:
    return RunConfig.from_file(Path(__file__).parents[2] / "configs" / "fp8.toml")


def figures(gemms: Iterable[Gemm]) -> Iterator[Figure]:
    """Tell what a step's products lose."""
    lost = losses(gemms)
    yield from _errors({key[1:]: error for key, error in lost.errors.items() if key[0] == "tiles"})
    yield from _comparisons(lost.errors)
    for (name, linear, operand), share in lost.underflow.items():
        case = {"linear": linear, "operand": operand, "scales": name}
        yield Figure(question=NAME, case=case, metric="underflow", unit="", measured=share, better="lower")
    for operand, count in lost.clamped.items():
        yield Figure(
            question=NAME,
            case={"operand": operand},
            metric="clamped",
            unit="values",
            measured=count,
            predicted=0,
            exact=True,
            note="a tile's scale is made of its largest value",
        )


def _errors(errors: dict[tuple[str, str, str], float]) -> Iterator[Figure]:
    """Tell the error of each product with a power-of-two scale a tile, as DeepSeek-V3 has it."""
    for (block, linear, product), error in errors.items():
        case = {"block": block, "linear": linear, "product": product}
        yield Figure(
            question=NAME, case=case, metric="error", unit="", measured=error, predicted=EXPECTED, better="lower"
        )


def _comparisons(errors: dict[tuple[str, str, str, str], float]) -> Iterator[Figure]:
    """Tell the errors of the other ways as multiples of DeepSeek-V3's."""
    multiples: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (name, block, linear, product), error in errors.items():
        if name != "tiles" and errors["tiles", block, linear, product]:
            where = linear if name == "one scale" else "all"
            multiples[name, where, product].append(error / errors["tiles", block, linear, product])
    metrics: dict[str, tuple[str, Literal["higher"] | None, str]] = {
        "one scale": ("gain_of_tiles", "higher", "blocks"),
        "e5m2 gradients": ("error_with_e5m2_gradients", None, "blocks and Linears"),
        "fp32 scales": ("error_with_fp32_scales", None, "blocks and Linears"),
    }
    for (name, linear, product), values in multiples.items():
        metric, better, over = metrics[name]
        yield Figure(
            question=NAME,
            case={"linear": linear, "product": product},
            metric=metric,
            unit="x",
            predicted=_expected(name, product),
            better=better,
            note=f"over the error with a power-of-two scale a tile; quartiles over {over}",
            **spread(values),
        )


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


QUESTION = Question(
    name=NAME,
    title="Which products lose how much?",
    cases=cases,
    finding=finding,
    plots=plots,
    about=(
        "The shape of configs/fp8.toml (quick: a smaller one) is trained natively for a few steps on real text. Of one "
        "more step the inputs, weights and output gradients of all Linears that FP8 training rounds are caught, and "
        "each product is made twice in FP32: of them, and of them rounded to E4M3 as DeepSeek-V3 does. Simulated: "
        "sums are FP32's. Simplified: the input of w2 is kept itself, not its two factors."
    ),
)
