"""Bytes and time in FP8, next to BF16.

Weights: E4M3 codes with an FP32 scale for each 128x128 block, dequantized on use. Activations: the bytes that the
Linears of configs/fp8.toml save for backward, and whole training steps, with kernels and in plain PyTorch. Cache: the
layout of DeepSeek-V3.2. All sides take turns. Simulated: values are rounded to FP8 and multiplied in BF16, so FP8 costs
time here, while FP8 hardware saves some.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import models
from benchmarks.models import recipe, trainer
from benchmarks.question import Case, Figure, Question, Setting, drawing, figure, left_out, pick, race, times
from dsmini import RunConfig, Transformer, accounting, ops
from dsmini.measure.memory import saved_for_backward, storage_bytes
from dsmini.measure.rates import why_unusable
from dsmini.measure.workloads import random_model, random_tokens
from dsmini.nn.cache import Cache
from dsmini.nn.fp8 import hold_all_fp8

BF16, FP8, PLAIN = "bfloat16", "fp8", "fp8 in plain PyTorch"
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
        Case(key="weights", seconds=4 if quick else 35, run=partial(weights, bf16)),
        Case(key="activations", seconds=6 if quick else 60, run=partial(activations, bf16)),
        Case(key=f"cache context={context}", seconds=4 if quick else 25, run=partial(cache, bf16, context)),
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
def weights(setting: Setting) -> Iterator[Figure]:
    """Yield bytes and decoding with weights in FP8, which are dequantized on use."""
    config = models.decoded(setting.quick)
    native = random_model(config, setting.device, setting.dtype)
    both = {BF16: native, FP8: hold_all_fp8(copy.deepcopy(native))}
    predicted = {format: accounting.weight_bytes(config, format).total for format in both}  # pyright: ignore[reportArgumentType]
    note = "whole model: codes, scales, and the parts that stay in BF16"
    held = {format: storage_bytes(model) for format, model in both.items()}
    yield from sizes("weights", "bytes", held, note, predicted=predicted, exact=True)
    yield from decoding(
        "weights", both, {format: model.new_cache(1, 128) for format, model in both.items()}, 56, setting
    )


@torch.inference_mode()
def cache(setting: Setting, context: int) -> Iterator[Figure]:
    """Yield bytes and decoding with a cache in FP8, whose rows are dequantized on reading."""
    config = models.decoded(setting.quick)
    model = random_model(config, setting.device, setting.dtype)
    caches = {
        BF16: model.new_cache(1, context + 64, torch.bfloat16),
        FP8: model.new_cache(1, context + 64, "fp8"),
    }
    held = {format: each.nbytes_per_token for format, each in caches.items()}
    predicted = {format: accounting.kv_bytes_per_token(config, dtype=format) for format in caches}  # pyright: ignore[reportArgumentType]
    note = f"of a token, in all {config.n_layers} layers; read off the storage"
    yield from sizes("cache", "bytes_per_token", held, note, predicted=predicted, exact=True)
    yield from decoding("cache", dict.fromkeys(caches, model), caches, context, setting)


def decoding(
    what: str, both: Mapping[str, Transformer], caches: Mapping[str, Cache], context: int, setting: Setting
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
            model.states(part, caches[format])
        logits.append(model(further, caches[format]).float())
    want, got = logits
    error, note = ((got - want).norm() / want.norm()).item(), "random weights, whose routing is near ties"
    yield figure("logit_error", {"what": what, "format": FP8}, error, note=note)

    def turn(format: str) -> None:
        caches[format].truncate(context + 8)
        for token in random_tokens(config, TURN, 1, setting.device):
            both[format](token[None], caches[format])

    runs: dict[str, Callable[[], None]] = {format: partial(turn, format) for format in both}
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
    note = f"of a training step on {b * s:,} tokens"
    yield from sizes("Linears", "kept_by_linears", {format: each.by_linears for format, each in saved.items()}, note)
    size: Any = {"batch_size": b, "seq_len": s, "dtype": "bfloat16"}
    least = {format: accounting.activation_bytes(configs[format], **size).total for format in saved}
    note += "; predicted: lower bound, with fused attention"
    held = {format: each.total for format, each in saved.items()}
    yield from sizes("activations", "kept", held, note, predicted=least, bound=True)

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
    told = []
    for what in ("weights", "activations", "cache"):
        parts = [f"{f.measured:.0%} of BF16's bytes" for f in pick(figures, "kept_ratio", what=what)]
        step = "training step" if what == "activations" else "decoding step"
        for f in pick(figures, "times_as_long", what=what, format=FP8):
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
            label="{what}, {format}",
            y="times BF16's time",
            only=lambda f: "format" in f.case,
            kind="bars",
            line=("target of a training step", TARGET),
        ),
    ),
)
