"""Bytes and time in FP8, next to BF16.

Weights: E4M3 codes with an FP32 scale for each 128x128 block, dequantized on use. Activations: the bytes that the
Linears of configs/fp8.toml save for backward, and whole training steps, with kernels and in plain PyTorch. Cache: the
layout of DeepSeek-V3.2. All sides take turns. Simulated: values are rounded to FP8 and multiplied in BF16, so FP8 costs
time here, while FP8 hardware saves some.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch

from benchmarks import models
from benchmarks.fp8_products import operand_error
from benchmarks.models import recipe, trainer
from benchmarks.question import (
    Case,
    Figure,
    Question,
    Setting,
    figure,
    left_out,
    pick,
    race,
    times,
)
from dsmini import RunConfig, Transformer, accounting, ops, quantize
from dsmini.measure.memory import saved_for_backward, storage_bytes
from dsmini.measure.rates import why_unusable
from dsmini.measure.workloads import random_model, random_tokens
from dsmini.nn.cache import Cache
from dsmini.nn.fp8 import fp8_weights, hold_fp8
from dsmini.numerics import E4M3, WEIGHT_TILE
from dsmini.report.charts import over_labels

BF16: Literal["bfloat16"] = "bfloat16"
FP8: Literal["fp8"] = "fp8"
PLAIN = "fp8 in plain PyTorch"
Format = Literal["bfloat16", "fp8"]
TURN = 5
"""Decoding steps of one side before the other side's turn."""
CONTEXT, QUICK_CONTEXT = 2048, 512
"""Tokens in the cache during decoding."""
TARGET = 1.5
"""Target: longest time of a training step in simulated FP8, as a multiple of a step in BF16."""
KEPT = (1 + 4 / 128) / 2
"""Bytes of an activation in FP8, a code and its share of an FP32 scale, over those in BF16."""
SIZES = {
    "weights": "bytes",
    "activations": "kept",
    "activations of Linears": "kept_by_linears",
    "cache": "bytes_per_token",
}
"""Metric of the bytes of each part."""


def cases(setting: Setting) -> list[Case]:
    quick, bf16 = setting.quick, dataclasses.replace(setting, dtype=torch.bfloat16)
    context = QUICK_CONTEXT if quick else CONTEXT
    return [
        Case(key="weights", seconds=4 if quick else 35, run=partial(weights, bf16)),
        Case(key="activations", seconds=6 if quick else 60, run=partial(activations, bf16)),
        Case(key=f"cache context={context}", seconds=4 if quick else 25, run=partial(cache, bf16, context)),
    ]


@torch.no_grad()
def hold_in_fp8(model: Transformer) -> tuple[Transformer, float]:
    """Return a copy of a model with the matrices in FP8 that DeepSeek stores in FP8, and their relative error.

    The error is the norm of all differences over the norm of all matrices.
    """
    held = copy.deepcopy(model)
    off = size = 0.0
    for name in fp8_weights(held):
        weight = held.get_parameter(name).detach()
        q = quantize(weight, WEIGHT_TILE, "fp32")
        off += (q.dequantize() - weight.float()).square().sum().item()
        size += weight.float().square().sum().item()
        hold_fp8(held, name, q.codes, q.scales)
    return held, (off / size) ** 0.5


@torch.inference_mode()
def weights(setting: Setting) -> Iterator[Figure]:
    """Yield bytes, error and decoding with weights in FP8, which are dequantized on use."""
    config = models.decoded(setting.quick)
    native = random_model(config, setting.device, setting.dtype)
    held, error = hold_in_fp8(native)
    both: dict[Format, Transformer] = {BF16: native, FP8: held}
    for format, model in both.items():
        case, predicted = {"what": "weights", "format": format}, accounting.weight_bytes(config, format).total
        note = "whole model: codes, scales, and the parts that stay in BF16"
        yield figure("bytes", case, float(storage_bytes(model)), predicted=predicted, exact=True, note=note)
    yield figure("error", {"what": "weights", "format": FP8}, error, predicted=operand_error(E4M3))
    caches: dict[Format, Cache] = {format: model.new_cache(1, 128) for format, model in both.items()}
    yield from decoding("weights", both, caches, 56, setting)


@torch.inference_mode()
def cache(setting: Setting, context: int) -> Iterator[Figure]:
    """Yield bytes and decoding with a cache in FP8, whose rows are dequantized on reading."""
    config = models.decoded(setting.quick)
    model = random_model(config, setting.device, setting.dtype)
    caches: dict[Format, Cache] = {
        BF16: model.new_cache(1, context + 64, torch.bfloat16),
        FP8: model.new_cache(1, context + 64, "fp8"),
    }
    for format, each in caches.items():
        predicted, note = accounting.kv_bytes_per_token(config, dtype=format), f"in all {config.n_layers} layers"
        held = {"predicted": predicted, "exact": True, "note": f"of a token, {note}; read off the storage"}
        yield figure("bytes_per_token", {"what": "cache", "format": format}, each.nbytes_per_token, **held)
    yield from decoding("cache", dict.fromkeys(caches, model), caches, context, setting)


def decoding(
    what: str, both: Mapping[Format, Transformer], caches: Mapping[Format, Cache], context: int, setting: Setting
) -> Iterator[Figure]:
    """Read a prompt, compare the logits of eight more tokens, and time decoding steps after them, by format."""
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield left_out("times_as_long", {"what": what}, reason)
        return
    config = both[FP8].config
    prompt, further = (random_tokens(config, 1, n, setting.device) for n in (context, 8))
    logits: list[torch.Tensor] = []
    for format, model in both.items():
        for part in prompt.split(512, 1):
            model.hidden(part, caches[format])
        logits.append(model(further, caches[format]).float())
    want, got = logits
    error, note = ((got - want).norm() / want.norm()).item(), "random weights, whose routing is near ties"
    yield figure("logit_error", {"what": what, "format": FP8}, error, note=note)

    def turn(format: Format) -> None:
        caches[format].truncate(context + 8)
        for token in random_tokens(config, TURN, 1, setting.device):
            both[format](token[None], caches[format])

    runs = {format: partial(turn, format) for format in both}
    yield from race(setting, {"what": what, "context": context}, runs, key="format", each=TURN)


def activations(setting: Setting) -> Iterator[Figure]:
    """Yield the bytes saved for backward, and whole training steps, with kernels and in plain PyTorch."""
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield left_out("times_as_long", {"what": "activations"}, reason)
        return
    run = trained_config(setting.quick)
    precisions = {BF16: "native", FP8: "fp8", PLAIN: "fp8"}
    configs = {name: dataclasses.replace(run.model, precision=of) for name, of in precisions.items()}  # pyright: ignore[reportArgumentType]
    trainers = {name: trainer(dataclasses.replace(run, model=config), setting) for name, config in configs.items()}
    b, s = run.train.batch_size, run.seq_len
    tokens = torch.randint(0, run.model.vocab_size, (b, s + 1)).to(setting.device)
    saved = {format: saved_for_backward(trainers[format].model, tokens) for format in (BF16, FP8)}
    for format, (by_linears, total) in saved.items():
        case, note = {"what": "activations", "format": format}, f"of a training step on {b * s:,} tokens"
        yield figure("kept_by_linears", case, float(by_linears), note=note)
        least = accounting.activation_bytes(configs[format], batch_size=b, seq_len=s, dtype="bfloat16").total
        note += "; predicted: lower bound, with fused attention"
        yield figure("kept", case, float(total), predicted=least, bound=True, note=note)
    share, note = saved[FP8].by_linears / saved[BF16].by_linears, "predicted: a code and its share of a scale"
    yield figure("kept_ratio", {"what": "activations", "format": FP8}, share, predicted=KEPT, note=note)

    def step(name: str) -> None:
        with ops.use("eager" if name == PLAIN else None):
            trainers[name].step()

    note = "a whole training step; values are rounded to FP8 and multiplied as BF16"
    yield from race(setting, {"what": "activations"}, {n: partial(step, n) for n in trainers}, key="format", note=note)
    for each in trainers.values():
        each.loader.close()


def trained_config(quick: bool) -> RunConfig:
    """Return configs/fp8.toml; for quick two layers and 320 tokens, a number that is none of its widths."""
    config = recipe("fp8")
    if not quick:
        return config
    model = dataclasses.replace(config.model, n_layers=2, n_mtp_layers=0, max_seq_len=160)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch_size=2))


def answer(figures: list[Figure]) -> str:
    told, held = [], shares(figures)
    for what in ("weights", "activations", "cache"):
        parts = [f"{held[what].measured:.0%} of BF16's bytes"] if what in held else []
        step = "training step" if what == "activations" else "decoding step"
        for f in pick(figures, "times_as_long", what=what, format=FP8):
            parts += [f"a {step} takes {times(f)} as long"] if f.measured else []
        parts += [f"logits are off by {f.measured:.1%}" for f in pick(figures, "logit_error", what=what)]
        told += [f"{what}: {', '.join(parts)}"] if parts else []
    return f"Simulated FP8, next to BF16: {'; '.join(told)}." if told else ""


def shares(figures: list[Figure]) -> dict[str, Figure]:
    """Return the bytes in FP8 over those in BF16, where both were measured."""
    found = {}
    for label, metric in SIZES.items():
        by = {f.case["format"]: f for f in pick(figures, metric, what=label.split()[0]) if f.measured}
        if {BF16, FP8} <= set(by):
            found[label] = figure("kept_ratio", {"what": label}, (by[FP8].measured or 0) / (by[BF16].measured or 1))
    return found


QUESTION = Question(
    name="fp8",
    title="How many bytes does FP8 save, and how much time does it cost here?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        lambda figures: over_labels(
            "Bytes in FP8", "share of BF16's bytes", {"fp8": shares(figures)}, kind="bars", line=("half", 0.5)
        ),
        lambda figures: over_labels(
            "Time in FP8",
            "times BF16's time",
            {"fp8": {f"{f.case['what']}, {f.case['format']}": f for f in pick(figures, "times_as_long")}},
            kind="bars",
            line=("target of a training step", TARGET),
        ),
    ),
)
