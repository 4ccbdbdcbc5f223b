"""How much smaller is MLA's cache, and what does that buy?

Bytes are read off the storage and must equal the formula. The speed is that of one layer with a small feed-forward,
decoding from a cache of random rows; the kinds take turns. GQA has a quarter of the heads.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, pick, values
from benchmarks.steps import decode_in_turns
from dsmini import ModelConfig, accounting
from dsmini.machine import memory_bytes
from dsmini.measure.workloads import random_model, random_tokens
from dsmini.nn import Cache
from dsmini.report.charts import lines, over_labels

NAME = "kv-cache"
KINDS = ("mla", "mha", "gqa", "mqa")

figure = Figures(
    NAME,
    lower={"bytes_per_token": "bytes", "seconds_per_layer": "s"},
    neither={"context_that_fits": "tokens"},
)


def kinds(config: ModelConfig) -> dict[str, ModelConfig]:
    """Return the same model with each kind of attention; GQA with a quarter of the heads."""
    heads = {"gqa": max(1, config.n_heads // 4)}
    return {kind: dataclasses.replace(config, attention=kind, n_kv_heads=heads.get(kind)) for kind in KINDS}  # pyright: ignore[reportArgumentType]


def cases(setting: Setting) -> list[Case]:
    contexts = [512, 4096] if setting.quick else [512, 2048, 8192, 32000]
    sizes = Case(key="bytes", seconds=1.0, run=partial(measure_bytes, setting))
    seconds = 1.0 if setting.quick else 8.0
    return [sizes, *cases_over("context={}", ((n,) for n in contexts), seconds, partial(measure_speed, setting))]


def measure_bytes(setting: Setting) -> Iterator[Figure]:
    """Yield a token's bytes from storage, exactly as predicted, and how many tokens fit in this machine's memory."""
    for kind, config in kinds(shapes.BIG).items():
        for dtype in (torch.bfloat16, "fp8") if kind == "mla" else (torch.bfloat16,):
            name = "fp8" if dtype == "fp8" else "bfloat16"
            case, predicted = {"attention": kind, "cache": name}, accounting.kv_bytes_per_token(config, dtype=name)
            held = Cache(config, 2, 64, dtype, setting.device).nbytes_per_token
            yield figure("bytes_per_token", case, held, predicted=predicted, exact=True)
            room = memory_bytes(setting.device) - 2 * accounting.parameters(config).total
            note = "in the device's memory next to the weights in BF16, were max_seq_len as large"
            yield figure("context_that_fits", case, predicted=float(max(0, room) // predicted), note=note)


@torch.no_grad()
def measure_speed(setting: Setting, context: int) -> Iterator[Figure]:
    """Yield the time of a layer with each kind, which take turns."""
    # few layers, dense and narrow, so that attention is what is seen
    layers = 1 if setting.quick else 2
    base = dataclasses.replace(shapes.BIG, n_layers=layers, n_dense_layers=layers, vocab_size=256, inter_dim=512)
    models = {kind: random_model(config, setting.device, setting.dtype) for kind, config in kinds(base).items()}
    rounds, token = 15 if setting.quick else 40, random_tokens(base, 1, 1, setting.device)
    timed = decode_in_turns(models, setting, 1, context, rounds, lambda model, cache: model(token, cache))
    for kind, (predicted, taken) in timed.items():
        case, each = {"attention": kind, "context": context}, [s / layers for s in taken]
        yield figure("seconds_per_layer", case, each, predicted=predicted / layers)


def finding(figures: list[Figure]) -> str:
    mla, mha, fp8 = (
        values(figures, "bytes_per_token", attention=attention, cache=cache)
        for attention, cache in (("mla", "bfloat16"), ("mha", "bfloat16"), ("mla", "fp8"))
    )
    if not mla or not mha:
        return ""
    text = f"MLA stores {mla[0]:,.0f} bytes a token, {1 - mla[0] / mha[0]:.1%} less than MHA with the same heads"
    text += f" ({mha[0]:,.0f})" + (f", and {fp8[0]:,.0f} in FP8" if fp8 else "")
    speed = pick(figures, "seconds_per_layer")
    longest = max((f.case["context"] for f in speed), default=0)
    mla, mha = (values(speed, "seconds_per_layer", attention=kind, context=longest) for kind in ("mla", "mha"))
    if mla and mha:
        text += f"; at context {longest:,} its layer decodes {mha[0] / mla[0]:.1f} times as fast"
    return text + "."


def plots(figures: list[Figure]) -> list[Plot]:
    sizes = {f"{f.case['attention']} {f.case['cache']}": f for f in pick(figures, "bytes_per_token")}
    title = "Decoding a token, one layer"
    return [
        *over_labels("Cache of a token", "bytes", {"bytes": sizes}, kind="bars"),
        *lines(figures, "seconds_per_layer", x="context", by="attention", title=title),
    ]
