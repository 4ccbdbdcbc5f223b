"""Bytes and time in FP8, next to BF16.

Weights: E4M3 codes with an FP32 scale for each 128x128 block, dequantized on use. Cache: the layout of DeepSeek-V3.2.
Activations: the bytes that the Linears of configs/fp8.toml save for backward, and whole training steps, with kernels
and in plain PyTorch. All sides take turns. Simulated: values are rounded to FP8 and multiplied in BF16, so FP8 costs
time here, while FP8 hardware saves some.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.models import recipe, trainer
from benchmarks.question import Case, Figure, Question, Setting, drawing, figure, left_out, pick, race, times
from dsmini import RunConfig, accounting, ops
from dsmini.measure.memory import saved_for_backward, storage_bytes
from dsmini.measure.rates import why_unusable
from dsmini.measure.workloads import random_model, random_tokens
from dsmini.nn.fp8 import hold_all_fp8

BF16, FP8, PLAIN = "bfloat16", "fp8", "activations in plain PyTorch"
TURN = 5
"""Decoding steps of one side before the other side's turn."""
CONTEXT, QUICK_CONTEXT = 2048, 512
"""Tokens in the cache during decoding."""
TARGET = 1.5
"""Target: longest time of a training step in simulated FP8, as a multiple of a step in BF16."""
KEPT = (1 + 4 / 128) / 2
"""Bytes of an activation in FP8, a code and its share of an FP32 scale, over those in BF16."""


def cases(setting: Setting) -> list[Case]:
    quick, bf16 = setting.quick, dataclasses.replace(setting, dtype=torch.bfloat16)
    context = QUICK_CONTEXT if quick else CONTEXT
    return [
        Case(key=f"decoding context={context}", seconds=8 if quick else 50, run=partial(decoding, bf16, context)),
        Case(key="activations", seconds=6 if quick else 60, run=partial(activations, bf16)),
    ]


def sizes(what: str, metric: str, held: Mapping[str, float], note: str, **known: Any) -> Iterator[Figure]:
    """Yield the bytes of a part by format, and those in FP8 over those in BF16.

    Args:
        known: predictions by format as `predicted`, and other fields of a figure.
    """
    predicted = known.pop("predicted", {})
    for format, nbytes in held.items():
        here = {"what": what, "format": format}
        yield figure(metric, here, float(nbytes), predicted=predicted.get(format), note=note, **known)
    share = {"predicted": KEPT, "note": "predicted: a code and its share of a scale"} if what == "Linears" else {}
    yield figure("kept_ratio", {"what": what, "format": FP8}, held[FP8] / held[BF16], **share)


@torch.inference_mode()
def decoding(setting: Setting, context: int) -> Iterator[Figure]:
    """Yield bytes, logits and time of decoding in BF16, with weights in FP8, and with a cache in FP8.

    Weights and rows in FP8 are dequantized on use.
    """
    config = models.decoded(setting.quick)
    native = random_model(config, setting.device, setting.dtype)
    held = hold_all_fp8(copy.deepcopy(native))
    room = context + 64
    sides = {
        BF16: (native, native.new_cache(1, room, torch.bfloat16)),
        "weights": (held, held.new_cache(1, room, torch.bfloat16)),
        "cache": (native, native.new_cache(1, room, "fp8")),
    }
    both: Any = (BF16, FP8)
    known = {format: accounting.weight_bytes(config, format).total for format in both}
    note = "whole model: codes, scales, and the parts that stay in BF16"
    nbytes = dict(zip(both, map(storage_bytes, (native, held)), strict=True))
    yield from sizes("weights", "bytes", nbytes, note, predicted=known, exact=True)
    known = {format: accounting.kv_bytes_per_token(config, dtype=format) for format in both}
    note = f"of a token, in all {config.n_layers} layers; read off the storage"
    nbytes = {BF16: sides[BF16][1].nbytes_per_token, FP8: sides["cache"][1].nbytes_per_token}
    yield from sizes("cache", "bytes_per_token", nbytes, note, predicted=known, exact=True)
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield left_out("times_as_long", {"what": "weights"}, reason)
        return
    prompt, further = (random_tokens(config, 1, n, setting.device) for n in (context, 8))
    logits: dict[str, Tensor] = {}
    for name, (model, cache) in sides.items():
        for part in prompt.split(512, 1):
            model.states(part, cache)
        logits[name] = model(further, cache).float()
    for name in ("weights", "cache"):
        error = ((logits[name] - logits[BF16]).norm() / logits[BF16].norm()).item()
        note = "random weights, whose routing is near ties"
        yield figure("logit_error", {"what": name}, error, note=note)

    def turn(name: str) -> None:
        model, cache = sides[name]
        cache.truncate(context + 8)
        for token in random_tokens(config, TURN, 1, setting.device):
            model(token[None], cache)

    yield from race(setting, {"context": context}, {n: partial(turn, n) for n in sides}, key="what", each=TURN)


def activations(setting: Setting) -> Iterator[Figure]:
    """Yield the bytes saved for backward, and whole training steps, with kernels and in plain PyTorch."""
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield left_out("times_as_long", {"what": "activations"}, reason)
        return
    run = trained_config(setting.quick)
    precisions = {BF16: "native", "activations": "fp8", PLAIN: "fp8"}
    configs = {name: dataclasses.replace(run.model, precision=of) for name, of in precisions.items()}  # pyright: ignore[reportArgumentType]
    trainers = {name: trainer(dataclasses.replace(run, model=config), setting) for name, config in configs.items()}
    b, s = run.train.batch_size, run.seq_len
    tokens = torch.randint(0, run.model.vocab_size, (b, s + 1)).to(setting.device)
    sides = {BF16: BF16, FP8: "activations"}
    saved = {format: saved_for_backward(trainers[name].model, tokens) for format, name in sides.items()}
    note = f"of a training step on {b * s:,} tokens"
    yield from sizes("Linears", "kept_by_linears", {format: each.by_linears for format, each in saved.items()}, note)
    size: Any = {"batch_size": b, "seq_len": s, "dtype": "bfloat16"}
    least = {format: accounting.activation_bytes(configs[name], **size).total for format, name in sides.items()}
    note += "; predicted: lower bound, with fused attention"
    held = {format: each.total for format, each in saved.items()}
    yield from sizes("activations", "kept", held, note, predicted=least, bound=True)

    def step(name: str) -> None:
        with ops.use("eager" if name == PLAIN else None):
            trainers[name].step()

    note = "a whole training step; values are rounded to FP8 and multiplied as BF16"
    yield from race(setting, {}, {n: partial(step, n) for n in trainers}, key="what", note=note)
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
    told = []
    for what in ("weights", "activations", "cache"):
        parts = [f"{f.measured:.0%} of BF16's bytes" for f in pick(figures, "kept_ratio", what=what)]
        step = "training step" if what == "activations" else "decoding step"
        for f in pick(figures, "times_as_long", what=what):
            parts += [f"a {step} takes {times(f)} as long"] if f.measured else []
        parts += [f"logits are off by {f.measured:.1%}" for f in pick(figures, "logit_error", what=what)]
        told += [f"{what}: {', '.join(parts)}"] if parts else []
    return f"Simulated FP8, next to BF16: {'; '.join(told)}." if told else ""


QUESTION = Question(
    name="fp8",
    title="How many bytes does FP8 save, and how much time does it cost here?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing(
            "kept_ratio",
            "Bytes in FP8",
            label="{what}",
            y="share of BF16's bytes",
            kind="bars",
            line=("half", 0.5),
        ),
        drawing(
            "times_as_long",
            "Time in FP8",
            label="{what}",
            y="times BF16's time",
            kind="bars",
            line=("target of a training step", TARGET),
        ),
    ),
)
