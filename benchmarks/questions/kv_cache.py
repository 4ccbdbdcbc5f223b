"""Size of the cache and speed of decoding with each kind of attention.

Bytes are those that a token more takes in all layers, and must equal the formula. The time is that of one layer with a
small feed-forward, decoding from a cache of random rows; the kinds of attention take turns. GQA has a quarter of the
heads, DSA attends to 2,048 keys, and V4 has layers of CSA and HCA in turn.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import models
from benchmarks.models import decoding
from benchmarks.question import Case, Figure, Question, Setting, cases_over, compared, drawing, figure, pick, race
from dsmini import ModelConfig, accounting
from dsmini.measure.workloads import random_model
from dsmini.nn import Transformer

LONG = 4096
"""Tokens of the shorter of two caches whose difference counts: V4's windows are as large in both."""


def kinds(config: ModelConfig) -> dict[str, ModelConfig]:
    """Return the same model with each kind of attention; GQA with a quarter of the heads."""
    heads = {"gqa": max(1, config.n_heads // 4)}
    every = ("mla", "mha", "gqa", "mqa")
    plain = {k.upper(): dataclasses.replace(config, attention=k, n_kv_heads=heads.get(k)) for k in every}  # pyright: ignore[reportArgumentType]
    return plain | {"DSA": models.sparse(config, 2048), "V4": models.compressed(config)}


def cases(setting: Setting) -> list[Case]:
    contexts = [(512,), (4096,)] if setting.quick else [(512,), (2048,), (8192,), (32000,)]
    sizes = Case(key="bytes", seconds=1.0, run=cache_bytes)
    return [sizes, *cases_over("context={}", contexts, 3.0 if setting.quick else 15.0, partial(layer_speed, setting))]


def cache_bytes() -> Iterator[Figure]:
    """Yield the bytes of a token in the cache."""
    for kind, config in kinds(models.BIG).items():
        with torch.device("meta"):
            model = Transformer(config)
        for dtype in (torch.bfloat16, "fp8") if kind in ("MLA", "DSA", "V4") else (torch.bfloat16,):
            name = "fp8" if dtype == "fp8" else "bfloat16"
            held = (model.new_cache(1, 2 * LONG, dtype).nbytes - model.new_cache(1, LONG, dtype).nbytes) / LONG
            predicted, note = accounting.kv_bytes_per_token(config, dtype=name), f"in all {config.n_layers} layers"
            case = {"attention": kind, "cache": name}
            yield figure("bytes_per_token", case, held, predicted=predicted, exact=True, note=note)


@torch.no_grad()
def layer_speed(setting: Setting, context: int) -> Iterator[Figure]:
    """Yield the time of a layer with each kind of attention."""
    # few layers, dense and narrow, so that attention dominates
    layers = 1 if setting.quick else 2
    base = dataclasses.replace(models.BIG, n_layers=layers, n_dense_layers=layers, vocab_size=256, inter_dim=512)
    every = {kind: random_model(config, setting.device, setting.dtype) for kind, config in kinds(base).items()}
    runs, predicted = decoding(every, setting, 1, context)
    yield from race(setting, {"context": context}, runs, key="attention", each=layers, predicted=predicted)


def answer(figures: list[Figure]) -> str:
    held = {(f.case["attention"], f.case["cache"]): f.measured or 0 for f in pick(figures, "bytes_per_token")}
    mla, mha, fp8 = (held.get(key) for key in (("MLA", "bfloat16"), ("MHA", "bfloat16"), ("MLA", "fp8")))
    told = []
    if mla and mha:
        text = f"MLA stores {mla:,.0f} bytes a token in all {models.BIG.n_layers} layers"
        text += f" ({fp8:,.0f} in FP8)" if fp8 else ""
        text += f", {1 - mla / mha:.1%} less than MHA with the same heads ({mha:,.0f})"
        v4 = held.get(("V4", "fp8"))
        told.append(text + (f"; V4's attention stores {v4:,.0f} in FP8." if v4 else "."))
    with_heads = [f for f in pick(figures, "times_as_long") if f.case["attention"] == "MHA"]
    if slower := compared(with_heads, "context", "at context {}", key="attention"):
        told.append(f"Time to decode a token, next to MLA: {slower}.")
    return " ".join(told)


QUESTION = Question(
    name="kv-cache",
    title="How much smaller is MLA's cache, and how much faster is decoding?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing("bytes_per_token", "Cache of a token in all layers", "{attention}, {cache}", kind="bars"),
        drawing("seconds", "Time of a token in one layer", x="context", by="attention"),
    ),
)
