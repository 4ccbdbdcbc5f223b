"""How many bytes does FP8 save, and how much time does it cost here?

Weights: E4M3 codes with an FP32 scale for each 128x128 block, dequantized on use. Activations: the bytes that the
Linears of configs/fp8.toml save for backward, and whole training steps, with kernels and in plain PyTorch. Cache: the
layout of DeepSeek-V3.2. All sides take turns. Simulated: values are rounded to FP8 and multiplied in BF16, so FP8 costs
time here, while FP8 hardware saves some.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, Value, pick, values
from benchmarks.fp8_products import operand_error
from benchmarks.trained import recipe, trainer
from dsmini import RunConfig, Transformer, accounting, ops, quantize
from dsmini.measure.memory import saved_for_backward, storage_bytes
from dsmini.measure.rates import why_unusable
from dsmini.measure.timing import interleaved, ratios
from dsmini.measure.workloads import random_model, random_tokens
from dsmini.nn.cache import Cache
from dsmini.nn.fp8 import fp8_weights, hold_fp8
from dsmini.numerics import E4M3, WEIGHT_TILE
from dsmini.report.charts import over_labels
from dsmini.report.verdicts import compared

NAME = "fp8"
CONTEXT, QUICK_CONTEXT = 2048, 512
"""Tokens in the cache during decoding."""
TURN = 5
"""Steps of one side before the other side's turn."""
ROUNDS, QUICK_ROUNDS = 6, 2
TARGET = 1.5
"""Target: longest time of a training step in simulated FP8, as a multiple of a step in BF16."""
KEPT = (1 + 4 / 128) / 2
"""Bytes of an activation in FP8, a code and its share of an FP32 scale, over those in BF16."""
FORMATS = ("bfloat16", "fp8")
STEPS = {"bfloat16": None, "fp8": None, "fp8 in plain PyTorch": "eager"}
"""Training steps to compare, and the backend that each must use."""
TIMES = {"weights": "decode_ratio", "activations": "step_ratio", "cache": "decode_ratio"}
"""Metric of the time in FP8 over the time in BF16."""
SIZES = {
    "weights": ("weights", "bytes"),
    "activations": ("activations", "kept"),
    "those of Linears": ("activations", "kept_by_linears"),
    "cache": ("cache", "bytes_per_token"),
}

figure = Figures(
    NAME,
    lower={
        **dict.fromkeys(("bytes", "bytes_per_token", "kept", "kept_by_linears"), "bytes"),
        **dict.fromkeys(("decode_seconds", "step_seconds"), "s"),
        **dict.fromkeys(("decode_ratio", "step_ratio", "kept_ratio"), "x"),
        **dict.fromkeys(("error", "logit_error"), ""),
    },
)


def cases(setting: Setting) -> list[Case]:
    quick = setting.quick
    bf16 = dataclasses.replace(setting, dtype=torch.bfloat16)
    context = QUICK_CONTEXT if quick else CONTEXT
    return [
        Case(key="weights", seconds=2 if quick else 30, run=partial(weights, bf16)),
        Case(key="activations", seconds=5 if quick else 60, run=partial(activations, bf16)),
        Case(key=f"cache context={context}", seconds=3 if quick else 20, run=partial(cache, bf16, context)),
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
    config = shapes.decoded(setting.quick)
    native = random_model(config, setting.device, setting.dtype)
    held, error = hold_in_fp8(native)
    models = dict(zip(FORMATS, (native, held), strict=True))
    held_bytes = {format: storage_bytes(model) for format, model in models.items()}
    predicted = {format: accounting.weight_bytes(config, format).total for format in FORMATS}
    yield from _sizes("weights", held_bytes, predicted, "whole model: codes, scales, and the parts that stay in BF16")
    yield figure("error", _case("weights"), error, predicted=operand_error(E4M3))
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield figure.left_out("decode_ratio", _case("weights"), reason)
        return
    prompt = random_tokens(config, 1, 64, setting.device)
    caches = {format: model.new_cache(1, 64 + _room(setting)) for format, model in models.items()}
    note = "weights are dequantized on use"
    yield from _decoding("weights", models, caches, (prompt, prompt[:, -8:]), setting, note)


def activations(setting: Setting) -> Iterator[Figure]:
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield figure.left_out("step_ratio", _case("activations"), reason)
        return
    run = trained_config(setting.quick)
    models = {
        name: dataclasses.replace(run.model, precision="native" if name == "bfloat16" else "fp8") for name in STEPS
    }
    trainers = {name: trainer(dataclasses.replace(run, model=model), setting) for name, model in models.items()}
    b, s = run.train.batch_size, run.seq_len
    tokens = torch.randint(0, run.model.vocab_size, (b, s + 1)).to(setting.device)
    saved = {format: saved_for_backward(trainers[format].model, tokens) for format in FORMATS}
    for format, (by_linears, total) in saved.items():
        case = _case("activations", format)
        yield figure("kept_by_linears", case, float(by_linears), note=f"of a training step on {b * s:,} tokens")
        predicted = accounting.activation_bytes(models[format], batch_size=b, seq_len=s, dtype="bfloat16").total
        note = f"of a training step on {b * s:,} tokens; predicted: lower bound, with fused attention"
        yield figure("kept", case, float(total), predicted=predicted, bound=True, note=note)
    share = saved["fp8"].by_linears / saved["bfloat16"].by_linears
    note = "predicted: a code and its share of a scale"
    yield figure("kept_ratio", _case("activations"), share, predicted=KEPT, note=note)

    def step(name: str) -> None:
        with ops.use(STEPS[name]):
            trainers[name].step()

    taken = interleaved({name: partial(step, name) for name in STEPS}, setting.device, _rounds(setting))
    for each in trainers.values():
        each.loader.close()
    simulated = "simulated: values are rounded to FP8 and multiplied as BF16"
    note = f"compared with BF16, round by round; target: at most {TARGET}; {simulated}"
    for name, seconds in taken.items():
        yield figure("step_seconds", _case("activations", name), seconds, note="a whole training step")
        if name != "bfloat16":
            yield figure("step_ratio", _case("activations", name), ratios(taken, name, "bfloat16"), note=note)


def trained_config(quick: bool) -> RunConfig:
    """Return configs/fp8.toml; for quick two layers and 320 tokens, a number that is none of its widths."""
    config = recipe("fp8")
    if not quick:
        return config
    model = dataclasses.replace(config.model, n_layers=2, n_mtp_layers=0, max_seq_len=160)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch_size=2))


@torch.inference_mode()
def cache(setting: Setting, context: int) -> Iterator[Figure]:
    config = shapes.decoded(setting.quick)
    model = random_model(config, setting.device, setting.dtype)
    room = context + _room(setting)
    caches = {"bfloat16": model.new_cache(1, room, torch.bfloat16), "fp8": model.new_cache(1, room, "fp8")}
    held = {format: each.nbytes_per_token for format, each in caches.items()}
    predicted = {format: accounting.kv_bytes_per_token(config, dtype=format) for format in FORMATS}
    yield from _sizes("cache", held, predicted, f"of a token, in all {config.n_layers} layers; read off the storage")
    if reason := why_unusable(torch.bfloat16, setting.roofs.peak):
        yield figure.left_out("decode_ratio", {**_case("cache"), "context": context}, reason)
        return
    torch.manual_seed(1)
    tokens = random_tokens(config, 1, context, setting.device), random_tokens(config, 1, 8, setting.device)
    note = "rows are dequantized on reading"
    yield from _decoding("cache", dict.fromkeys(FORMATS, model), caches, tokens, setting, note, context=context)


def _case(what: str, format: str = "fp8") -> dict[str, Value]:
    return {"what": what, "format": format}


def _sizes(what: str, held: Mapping[str, float], predicted: Mapping[str, float], note: str) -> Iterator[Figure]:
    for format in FORMATS:
        exact = {"predicted": predicted[format], "exact": True, "note": note}
        yield figure(SIZES[what][1], _case(what, format), float(held[format]), **exact)


def _rounds(setting: Setting) -> int:
    return QUICK_ROUNDS if setting.quick else ROUNDS


def _room(setting: Setting) -> int:
    return TURN * (_rounds(setting) + 1) + 8


def _decoding(
    what: str,
    models: Mapping[str, Transformer],
    caches: Mapping[str, Cache],
    tokens: tuple[Tensor, Tensor],
    setting: Setting,
    note: str,
    **more: Value,
) -> Iterator[Figure]:
    """Read a prompt, compare the logits of more tokens, and time decoding steps, by format.

    Args:
        tokens: the prompt, and eight more tokens.
    """
    prompt, further = tokens
    for format, model in models.items():
        for part in prompt.split(512, 1):
            model.hidden(part, caches[format])
    want, got = (model(further, caches[format]).float() for format, model in models.items())
    error = ((got - want).norm() / want.norm()).item()
    near = "random weights, whose routing is near ties"
    yield figure("logit_error", _case(what), error, note=near)

    def turn(format: str) -> None:
        for token in random_tokens(models[format].config, TURN, 1, setting.device):
            models[format](token[None], caches[format])

    taken = interleaved({format: partial(turn, format) for format in models}, setting.device, _rounds(setting))
    for format, seconds in taken.items():
        yield figure("decode_seconds", _case(what, format) | more, [t / TURN for t in seconds], note=note)
    slower = ratios(taken, "fp8", "bfloat16")
    yield figure("decode_ratio", _case(what) | more, slower, note=f"compared with BF16, in turns; {note}")


def finding(figures: list[Figure]) -> str:
    told, shares = [], {label: f.measured or 0.0 for label, f in _shares(figures).items()}
    for what, metric in TIMES.items():
        step = "decoding step" if metric == "decode_ratio" else "training step"
        stored = f"{what} in {shares[what]:.0%} of the bytes" if what in shares else what
        slower = [f for f in pick(figures, metric, **_case(what)) if f.measured is not None]
        parts = [f"a {step} takes {compared(f, words='as long')}" for f in slower]
        parts += [f"logits are off by {x:.1%}" for x in values(figures, "logit_error", **_case(what))]
        if parts or what in shares:
            told.append(f"{stored} ({', '.join(parts)})" if parts else stored)
    return f"Simulated FP8 stores {'; '.join(told)}." if told else ""


def _shares(figures: list[Figure]) -> dict[str, Figure]:
    """Return the bytes in FP8 over those in BF16, if both were measured."""
    shares = {}
    for label, (what, metric) in SIZES.items():
        eight, sixteen = (values(figures, metric, **_case(what, format)) for format in ("fp8", "bfloat16"))
        if eight and sixteen:
            shares[label] = figure("kept_ratio", _case(what), eight[0] / sixteen[0])
    return shares


def plots(figures: list[Figure]) -> list[Plot]:
    found = [f for what, metric in TIMES.items() for f in pick(figures, metric, what=what)]
    slower = {f"{f.case['what']}, {f.case['format']}": f for f in found}
    sizes, half, target = {"fp8": _shares(figures)}, ("half", 0.5), ("target of a training step", TARGET)
    return [
        *over_labels("Bytes in FP8", "share of BF16's bytes", sizes, kind="bars", line=half),
        *over_labels("Time in FP8", "times BF16's time", {"fp8": slower}, kind="bars", line=target),
    ]
