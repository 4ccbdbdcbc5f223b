"""Error of each product of a training step in FP8.

A model of the shape of configs/fp8.toml (quick: a smaller one) trains natively for a few steps on real text. One more
step yields the inputs, weights and output gradients of all Linears that FP8 training rounds. Each product is then
computed twice in FP32: from these matrices, and from the same rounded to E4M3 as in DeepSeek-V3. Simulated: sums are in
FP32. Simplified: the input of w2 is rounded itself, not its two factors.
"""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch

from benchmarks import models
from benchmarks.fp8_products import PRODUCTS, capture, losses, product_error
from benchmarks.models import recipe, trainer, training_flops
from benchmarks.question import (
    Case,
    Figure,
    Question,
    Setting,
    figure,
    pick,
)
from dsmini import ModelConfig, RunConfig, TrainConfig
from dsmini.numerics import E4M3, E5M2
from dsmini.report.charts import over_labels

QUICK = dataclasses.replace(
    models.TRAINED, n_layers=2, inter_dim=512, moe_inter_dim=128, q_lora_rank=128, kv_lora_rank=128
)
"""Small model with whole tiles: each sum runs over a multiple of 128."""
STEPS, QUICK_STEPS, BATCH = 24, 20, 4
ROWS, QUICK_ROWS = 4, 2
"""Sequences of the step whose products are computed twice."""
EXPECTED = product_error(E4M3, E4M3)


def cases(setting: Setting) -> list[Case]:
    config = QUICK if setting.quick else dataclasses.replace(recipe("fp8").model, precision="native")
    steps, seconds = (QUICK_STEPS, 3.0) if setting.quick else (STEPS, 70.0)
    flops = training_flops(config, steps * BATCH)
    return [Case(key=f"steps={steps}", seconds=seconds, flops=flops, run=lambda: errors(setting, config, steps))]


def errors(setting: Setting, model: ModelConfig, steps: int) -> Iterator[Figure]:
    """Train natively for a few steps, and yield the errors of the products of one more."""
    config = RunConfig(model=model, train=TrainConfig(steps=max(2, steps), batch_size=BATCH))
    trained = trainer(config, setting, steps)
    trained.loader.close()
    trained.model.compute_dtype = torch.float32
    rows = QUICK_ROWS if setting.quick else ROWS
    tokens, targets = trained.corpus.batch(trained.sequences, rows, config.seq_len, 0)
    found, underflow = losses(capture(trained.model, tokens.to(setting.device), targets.to(setting.device)))
    others: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (way, block, linear, product), error in found.items():
        if way == "tiles":
            yield figure("error", {"block": block, "linear": linear, "product": product}, error, predicted=EXPECTED)
        elif plain := found["tiles", block, linear, product]:
            others[way, product].append(error / plain)
    for (way, product), ratios in others.items():
        e5m2 = way == "e5m2 gradients" and product != "fprop"
        predicted = None if way == "one scale" else product_error(E4M3, E5M2) / EXPECTED if e5m2 else 1.0
        note = "median over all products of the error, over that with a power-of-two scale a tile"
        case = {"rounded with": way, "product": product}
        yield figure("times_the_error", case, statistics.median(ratios), predicted=predicted, note=note)
    for (way, linear, operand), share in underflow.items():
        yield figure("underflow", {"linear": linear, "operand": operand, "scales": way}, share)


def answer(figures: list[Figure]) -> str:
    measured = [f for f in pick(figures, "error") if f.measured is not None]
    if not measured:
        return ""
    by_product = {p: [f.measured or 0.0 for f in measured if f.case["product"] == p] for p in PRODUCTS}
    parts = [f"{product} {statistics.median(found):.1%}" for product, found in by_product.items() if found]
    worst = max(measured, key=lambda f: f.measured or 0.0)
    where = " of ".join(str(worst.case[key]) for key in ("product", "linear", "block"))
    text = f"Median relative errors of FP8 products: {', '.join(parts)} ({EXPECTED:.1%} are expected from rounding)"
    text += f"; at most {worst.measured:.1%}, in {where}"
    one = [f.measured for f in pick(figures, "times_the_error", **{"rounded with": "one scale"}) if f.measured]
    return (
        f"{text}; one scale for a whole matrix makes them {statistics.median(one):.2f} times as large."
        if one
        else f"{text}."
    )


def _flushed(figures: list[Figure]) -> dict[str, dict[str, Figure]]:
    """Return the values that become zero, without groups of zeros, which would only lengthen the legend."""
    groups: dict[str, dict[str, Figure]] = {}
    for f in pick(figures, "underflow"):
        groups.setdefault(f"{f.case['operand']}, {f.case['scales']}", {})[str(f.case["linear"])] = f
    return {name: group for name, group in groups.items() if any(f.measured for f in group.values())}


QUESTION = Question(
    name="fp8-error",
    title="How large is the error of each product in FP8?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        lambda figures: over_labels(
            "Relative error of FP8 products",
            "relative error",
            {
                p: {f"{f.case['block']} {f.case['linear']}": f for f in pick(figures, "error", product=p)}
                for p in PRODUCTS
            },
            line=("rounding alone", EXPECTED),
            caption="Error of the result compared with the FP32 product without rounding; experts of a layer together.",
        ),
        lambda figures: over_labels(
            "Values that become zero",
            "share of the values",
            _flushed(figures),
            caption="Share of the values that were not zero before; all blocks together.",
        ),
    ),
)
