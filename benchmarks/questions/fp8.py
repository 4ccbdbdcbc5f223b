"""Memory, bytes, time and error of weights, activations and cache in eight bits, next to BF16."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.question import Case, Figure, Plot, Question, Setting, Value, pick
from benchmarks.trained import trainer
from dsmini import ModelConfig, RunConfig, Transformer, accounting, ops
from dsmini.measure.dtypes import why_unusable
from dsmini.measure.fp8_products import operand_error
from dsmini.measure.fp8_weights import hold_in_fp8
from dsmini.measure.memory import storage_bytes
from dsmini.measure.saved import saved_for_backward
from dsmini.measure.timing import interleaved, ratios, spread
from dsmini.measure.workloads import random_model, random_tokens
from dsmini.nn.cache import Cache
from dsmini.numerics import E4M3
from dsmini.report.charts import bars, measured_bars

NAME = "fp8"
CONTEXT, QUICK_CONTEXT = 2048, 512
"""Tokens in the cache that is decoded from."""
TURN = 5
"""Steps that one side takes before it is the other's turn."""
ROUNDS, QUICK_ROUNDS = 6, 2
TARGET = 1.5
"""Longest time of a training step in simulated FP8, in steps in BF16."""
KEPT = (1 + 4 / 128) / 2
"""Of an activation's bytes in BF16: a code and its share of an FP32 scale."""
STEPS = {"native": None, "fp8": None, "fp8 in plain PyTorch": "eager"}
"""Training steps to compare, and the backend that each is held to."""
SIMULATED = "simulated: values are rounded to FP8 and multiplied as BF16"

figure = functools.partial(Figure, question=NAME)


def cases(setting: Setting) -> list[Case]:
    quick = setting.quick
    bf16 = dataclasses.replace(setting, dtype=torch.bfloat16)
    context = QUICK_CONTEXT if quick else CONTEXT
    return [
        Case(key="weights", seconds=2 if quick else 30, run=lambda: weights(bf16)),
        Case(key="activations", seconds=5 if quick else 60, run=lambda: activations(bf16)),
        Case(key=f"cache context={context}", seconds=3 if quick else 20, run=lambda: cache(bf16, context)),
    ]


@torch.inference_mode()
def weights(setting: Setting) -> Iterator[Figure]:
    config = _decoded(setting)
    native = random_model(config, setting.device, setting.dtype)
    held, error = hold_in_fp8(native)
    models = {"bfloat16": native, "fp8": held}
    for format, model in models.items():
        predicted = accounting.weight_bytes(config, "fp8" if format == "fp8" else "bfloat16").total
        note = "codes, scales, and what stays unquantised"
        yield _bytes("bytes", {"what": "weights", "format": format}, storage_bytes(model), predicted, note)
    case = {"what": "weights", "format": "fp8"}
    yield figure(case=case, metric="error", unit="", measured=error, predicted=operand_error(E4M3), better="lower")
    if reason := _too_slow(setting):
        yield from _left_out(case, reason)
        return
    prompt = random_tokens(config, 1, 64, setting.device)
    caches = {format: _read(model, prompt, model.new_cache(1, 64 + _room(setting))) for format, model in models.items()}
    yield from _decoding("weights", models, caches, setting, "weights are dequantised when they are used")
    again = [(model, _read(model, prompt, model.new_cache(1, 72))) for model in models.values()]
    yield _logit_error(case, [model(prompt[:, -8:], cache) for model, cache in again])


def activations(setting: Setting) -> Iterator[Figure]:
    if reason := _too_slow(setting):
        yield from _left_out({"what": "activations", "format": "fp8"}, reason, "step_ratio")
        return
    run = trained_config(setting.quick)
    precisions = {name: "native" if name == "native" else "fp8" for name in STEPS}
    configs = {name: dataclasses.replace(run.model, precision=precision) for name, precision in precisions.items()}
    trainers = {name: trainer(dataclasses.replace(run, model=model), setting) for name, model in configs.items()}
    b, s = run.train.batch_size, run.seq_len
    tokens = torch.randint(0, run.model.vocab_size, (b, s + 1)).to(setting.device)
    saved = {name: saved_for_backward(trainers[name].model, tokens) for name in ("native", "fp8")}
    for name, (by_linears, total) in saved.items():
        case = {"what": "activations", "format": _format(name)}
        yield figure(case=case, metric="kept_by_linears", unit="bytes", measured=float(by_linears), better="lower")
        predicted = accounting.activation_bytes(configs[name], batch_size=b, seq_len=s, dtype="bfloat16").total
        least = {"predicted": predicted, "bound": True, "note": "predicted: lower bound, with fused attention"}
        yield figure(case=case, metric="kept", unit="bytes", measured=float(total), better="lower", **least)
    yield figure(
        case={"what": "activations", "format": "fp8"},
        metric="kept_ratio",
        unit="x",
        measured=saved["fp8"].by_linears / saved["native"].by_linears,
        predicted=KEPT,
        better="lower",
        note="predicted: a code and its share of a scale",
    )

    def step(name: str) -> Callable[[], object]:
        def take() -> None:
            with ops.use(STEPS[name]):
                trainers[name].step()

        return take

    taken = interleaved({name: step(name) for name in STEPS}, setting.device, _rounds(setting))
    for each in trainers.values():
        each.loader.close()
    note = f"beside BF16, round by round; target: at most {TARGET}; {SIMULATED}"
    for name, times in taken.items():
        case = {"what": "activations", "format": _format(name)}
        whole = "a whole training step"
        yield figure(case=case, metric="step_seconds", unit="s", better="lower", note=whole, **spread(times))
        if name != "native":
            longer = spread(ratios(taken, name, "native"))
            yield figure(case=case, metric="step_ratio", unit="x", better="lower", note=note, **longer)


def trained_config(quick: bool) -> RunConfig:
    """Return configs/fp8.toml; quick: two of its layers, and 320 tokens, which is none of its widths."""
    config = RunConfig.from_file(Path(__file__).parents[2] / "configs" / "fp8.toml")
    if not quick:
        return config
    model = dataclasses.replace(config.model, n_layers=2, n_mtp_layers=0, max_seq_len=160)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch_size=2))


@torch.inference_mode()
def cache(setting: Setting, context: int) -> Iterator[Figure]:
    config = _decoded(setting)
    model = random_model(config, setting.device, setting.dtype)
    formats: Mapping[str, torch.dtype | Literal["fp8"]] = {"bfloat16": torch.bfloat16, "fp8": "fp8"}
    caches = {name: model.new_cache(1, context + _room(setting), format) for name, format in formats.items()}
    for name, each in caches.items():
        predicted = accounting.kv_bytes_per_token(config, dtype="fp8" if name == "fp8" else "bfloat16")
        case = {"what": "cache", "format": name}
        yield _bytes("bytes_per_token", case, each.nbytes_per_token, predicted, "read off the storage")
    case = {"what": "cache", "format": "fp8"}
    if reason := _too_slow(setting):
        yield from _left_out({**case, "context": context}, reason)
        return
    torch.manual_seed(1)
    prompt = random_tokens(config, 1, context, setting.device)
    for each in caches.values():
        _read(model, prompt, each)
    further = random_tokens(config, 1, 8, setting.device)
    yield _logit_error(case, [model(further, each) for each in caches.values()])
    models = dict.fromkeys(caches, model)
    yield from _decoding("cache", models, caches, setting, "rows are dequantised when they are read", context=context)


# --- what they share


def _decoded(setting: Setting) -> ModelConfig:
    return shapes.QUICK if setting.quick else shapes.BIG


def _format(step: str) -> str:
    return "bfloat16" if step == "native" else step


def _rounds(setting: Setting) -> int:
    return QUICK_ROUNDS if setting.quick else ROUNDS


def _room(setting: Setting) -> int:
    return TURN * (_rounds(setting) + 1) + 8


def _too_slow(setting: Setting) -> str | None:
    return why_unusable(torch.bfloat16, setting.roofs.peak)


def _left_out(case: Mapping[str, Value], reason: str, metric: str = "decode_ratio") -> Iterator[Figure]:
    yield figure(case=case, metric=metric, unit="x", better="lower", note=f"left out: {reason}")


def _read(model: Transformer, prompt: Tensor, cache: Cache) -> Cache:
    """Read a prompt into a cache, and return the cache."""
    for part in prompt.split(512, 1):
        model.hidden(part, cache)
    return cache


def _decoding(
    what: str,
    models: Mapping[str, Transformer],
    caches: Mapping[str, Cache],
    setting: Setting,
    note: str,
    **case: Value,
) -> Iterator[Figure]:
    """Time decoding steps, and tell their seconds and the ratio to BF16's."""

    def turn(name: str) -> Callable[[], object]:
        tokens = random_tokens(models[name].config, TURN, 1, setting.device)
        return lambda: [models[name](token[None], caches[name]) for token in tokens]

    taken = interleaved({name: turn(name) for name in models}, setting.device, _rounds(setting))
    for name, times in taken.items():
        each = spread([t / TURN for t in times])
        where = {"what": what, "format": name, **case}
        yield figure(case=where, metric="decode_seconds", unit="s", better="lower", note=note, **each)
    longer = spread(ratios(taken, "fp8", "bfloat16"))
    where = {"what": what, "format": "fp8", **case}
    note = f"beside BF16, in turns; {note}"
    yield figure(case=where, metric="decode_ratio", unit="x", better="lower", note=note, **longer)


def _logit_error(case: Mapping[str, Value], logits: list[Tensor]) -> Figure:
    """Compute how far the second's are off the first's, as a share of their size."""
    want, got = (t.float() for t in logits)
    error = ((got - want).norm() / want.norm()).item()
    note = "of a model with random weights, whose routing is near its ties"
    return figure(case=case, metric="logit_error", unit="", measured=error, better="lower", note=note)


def _bytes(metric: str, case: Mapping[str, Value], measured: float, predicted: float, note: str) -> Figure:
    held = {"measured": float(measured), "predicted": predicted, "exact": True}
    return figure(case=case, metric=metric, unit="bytes", better="lower", note=note, **held)


def finding(figures: list[Figure]) -> str:
    def value(metric: str, what: str, format: str = "fp8") -> float | None:
        return next((f.measured for f in pick(figures, metric, what=what, format=format)), None)

    def sentence(what: str, metric: str, ratio: str, unit: str) -> str | None:
        held, bf16 = value(metric, what), value(metric, what, "bfloat16")
        parts = [f"{what} in {held / bf16:.0%} of the bytes"] if held is not None and bf16 else []
        slower, error = value(ratio, what), value("logit_error", what)
        parts += [f"{slower:.2f} times the time of a {unit}"] if slower is not None else []
        parts += [f"logits off by {error:.1%}"] if error is not None else []
        return " with ".join([parts[0], " and ".join(parts[1:])]) if len(parts) > 1 else next(iter(parts), None)

    said = [
        sentence("weights", "bytes", "decode_ratio", "decoding step"),
        sentence("activations", "kept", "step_ratio", "training step"),
        sentence("cache", "bytes_per_token", "decode_ratio", "decoding step"),
    ]
    told = [part for part in said if part]
    return f"Eight bits, simulated, keep {'; '.join(told)}." if told else "Nothing was measured yet."


def plots(figures: list[Figure]) -> list[Plot]:
    sizes = {
        "weights": ("weights", "bytes"),
        "activations": ("activations", "kept"),
        "those of Linears": ("activations", "kept_by_linears"),
        "cache": ("cache", "bytes_per_token"),
    }
    times = (("weights", "decode_ratio"), ("activations", "step_ratio"), ("cache", "decode_ratio"))
    shares: dict[str, float] = {}
    for label, (what, metric) in sizes.items():
        held = {f.case["format"]: f.measured for f in pick(figures, metric, what=what) if f.measured}
        if held.keys() >= {"fp8", "bfloat16"}:
            shares[label] = held["fp8"] / held["bfloat16"]
    found = [f for what, metric in times for f in pick(figures, metric, what=what) if f.measured is not None]
    slower = {f"{f.case['what']}, {f.case['format']}": f for f in found}
    drawn: list[Plot] = []
    if shares:
        drawn.append(bars("Bytes in FP8", "share of BF16's bytes", shares, ("half", 0.5), "fp8"))
    if slower:
        line = ("target of a training step", TARGET)
        drawn.append(measured_bars("Time in FP8", "times BF16's time", slower, line, "fp8"))
    return drawn


QUESTION = Question(
    name=NAME,
    title="What do eight bits save, and what do they cost here?",
    cases=cases,
    finding=finding,
    plots=plots,
    about=(
        "Weights: E4M3 codes with an FP32 scale for each 128x128 block, dequantised when they are used. Activations: "
        "what the Linears of configs/fp8.toml keep for backward, and whole training steps, with the kernels and in "
        "plain PyTorch. Cache: DeepSeek-V3.2's layout. What is compared takes turns. Simulated: values are rounded to "
        "FP8 and multiplied as BF16, so that all of it costs time where FP8 hardware gains some."
    ),
)
