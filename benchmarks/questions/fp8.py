"""Memory, bytes, time and error of weights, activations and cache in eight bits, beside BF16."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.question import Case, Figure, Plot, Question, Series, Setting, Value, pick
from benchmarks.questions.fp8_error import operand_error
from dsmini import ModelConfig, RunConfig, Transformer, accounting, ops
from dsmini.checkpoint.slots import fp8_weights
from dsmini.data.corpus import load_corpus
from dsmini.measure.kept import kept_for_backward
from dsmini.measure.timing import built, interleaved, random_tokens, spread
from dsmini.nn.cache import Cache
from dsmini.nn.fp8 import hold_fp8
from dsmini.numerics import E4M3, WEIGHT_TILE, dequantize_tiles, quantize
from dsmini.training.trainer import Trainer

NAME = "fp8"
CORPUS = Path("runs/corpus")
CONTEXT, QUICK_CONTEXT = 2048, 512
"""Tokens in the cache that is decoded from."""
TURN = 5
"""Steps that one side takes before it is the other's turn."""
ROUNDS, QUICK_ROUNDS = 6, 2
TARGET = 1.5
"""A training step in simulated FP8 shall take no longer than so many steps in BF16."""
KEPT = (1 + 4 / 128) / 2
"""Of an activation's bytes in BF16: a code and its share of an FP32 scale."""
STEPS = {"native": None, "fp8": None, "fp8 in plain PyTorch": "reference"}
"""The training steps that are compared, and the kernels that they are held to."""
SIMULATED = "simulated: values are rounded to FP8 and multiplied as BF16"


# --- weights


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def with_fp8_weights(model: Transformer) -> tuple[Transformer, float]:
    """A copy that holds its matrices in FP8, and how far these are off, as a share of their size."""
    held = copy.deepcopy(model)
    off = size = 0.0
    for module, name in fp8_weights(held).values():
        weight = getattr(module, name).detach()
        q = quantize(weight, WEIGHT_TILE, "fp32")
        for w, codes, scales in zip(_as_matrices(weight), _as_matrices(q.codes), _as_matrices(q.scales), strict=True):
            off += (dequantize_tiles(codes, scales, WEIGHT_TILE) - w.float()).square().sum().item()
            size += w.float().square().sum().item()
        hold_fp8(module, name, q.codes, q.scales)
    return held, (off / size) ** 0.5


def _as_matrices(t: Tensor) -> Tensor:
    return t if t.dim() == 3 else t[None]


@torch.inference_mode()
def _weights(setting: Setting) -> Iterator[Figure]:
    config = _decoded(setting)
    native = built(config, setting)
    held, error = with_fp8_weights(native)
    models = {"bfloat16": native, "fp8": held}
    for format, model in models.items():
        case = {"what": "weights", "format": format}
        predicted = accounting.weight_bytes(config, "fp8" if format == "fp8" else "bfloat16").total
        yield _bytes("bytes", case, held_bytes(model), predicted, "codes, scales, and what stays unquantised")
    case = {"what": "weights", "format": "fp8"}
    yield _figure("error", case, "", measured=error, predicted=operand_error(E4M3), better="lower")
    prompt = random_tokens(config, 1, 64, setting.device)
    caches = {format: _read(model, prompt, _room(setting)) for format, model in models.items()}
    yield from _decoding("weights", models, caches, setting, "weights are dequantised when they are used")
    yield _logit_error(case, [model(prompt[:, -8:], _read(model, prompt, 8)) for model in models.values()])


# --- activations


def _activations(setting: Setting) -> Iterator[Figure]:
    trainers = {name: _trainer(name, setting) for name in STEPS}
    config = trainers["fp8"].config
    tokens = torch.randint(0, config.model.vocab_size, (config.train.batch_size, config.seq_len + 1))
    tokens = tokens.to(setting.device)
    kept = {name: kept_for_backward(trainers[name].model, tokens) for name in ("native", "fp8")}
    for name, (by_linears, whole) in kept.items():
        case = {"what": "activations", "format": "bfloat16" if name == "native" else "fp8"}
        yield _figure("kept_by_linears", case, "bytes", measured=float(by_linears), better="lower")
        model, sizes = trainers[name].config.model, {"batch_size": tokens.shape[0], "seq_len": tokens.shape[1] - 1}
        predicted = accounting.activation_bytes(model, **sizes, dtype="bfloat16").total
        note = "predicted: lower bound, with fused attention"
        how: dict[str, Any] = {"predicted": predicted, "bound": True, "note": note}
        yield _figure("kept", case, "bytes", measured=float(whole), better="lower", **how)
    share = kept["fp8"][0] / kept["native"][0]
    case = {"what": "activations", "format": "fp8"}
    note = "predicted: a code and its share of a scale"
    yield _figure("kept_ratio", case, "x", measured=share, predicted=KEPT, better="lower", note=note)

    def step(name: str) -> Callable[[], object]:
        def run() -> None:
            with ops.use(STEPS[name]):
                trainers[name].step()

        return run

    rounds = QUICK_ROUNDS if setting.quick else ROUNDS
    taken = interleaved({name: step(name) for name in STEPS}, setting.device, rounds)
    for trainer in trainers.values():
        trainer.loader.close()
    for name, times in taken.items():
        case = {"what": "activations", "format": "bfloat16" if name == "native" else name}
        yield _figure("step_seconds", case, "s", better="lower", note="a whole training step", **spread(times))
        if name != "native":
            ratios = [a / b for a, b in zip(times, taken["native"], strict=True)]
            note = f"beside BF16, round by round; target: at most {TARGET}; {SIMULATED}"
            yield _figure("step_ratio", case, "x", better="lower", note=note, **spread(ratios))


def _trainer(name: str, setting: Setting) -> Trainer:
    config = trained_config(setting.quick)
    model = dataclasses.replace(config.model, precision="native" if name == "native" else "fp8")
    config = dataclasses.replace(config, model=model)
    corpus = load_corpus(config.data, config.seq_len, model.vocab_size, CORPUS)
    torch.manual_seed(0)
    with torch.device(setting.device):
        built = Transformer(model, compute_dtype=torch.bfloat16)
    return Trainer(built, corpus, config, setting.device)


def trained_config(quick: bool) -> RunConfig:
    """configs/fp8.toml; quick: two of its layers, and 320 tokens, which is none of its widths."""
    config = RunConfig.from_file(Path(__file__).parents[2] / "configs" / "fp8.toml")
    if not quick:
        return config
    model = dataclasses.replace(config.model, n_layers=2, n_mtp_layers=0, max_seq_len=160)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch_size=2))


# --- cache


@torch.inference_mode()
def _cache(setting: Setting) -> Iterator[Figure]:
    config = _decoded(setting)
    model = built(config, setting)
    torch.manual_seed(1)
    context = QUICK_CONTEXT if setting.quick else CONTEXT
    prompt = random_tokens(config, 1, context, setting.device)
    formats: Mapping[str, torch.dtype | Literal["fp8"]] = {"bfloat16": torch.bfloat16, "fp8": "fp8"}
    caches = {name: _read(model, prompt, _room(setting), format) for name, format in formats.items()}
    predicted = {name: accounting.kv_bytes_per_token(config, dtype=name) for name in ("bfloat16", "fp8")}
    for name, cache in caches.items():
        case = {"what": "cache", "format": name}
        yield _bytes("bytes_per_token", case, cache.nbytes_per_token, predicted[name], "read off the storage")
    further = random_tokens(config, 1, 8, setting.device)
    yield _logit_error({"what": "cache", "format": "fp8"}, [model(further, cache) for cache in caches.values()])
    models = dict.fromkeys(caches, model)
    yield from _decoding("cache", models, caches, setting, "rows are dequantised when they are read", context=context)


# --- what they share


def _decoded(setting: Setting) -> ModelConfig:
    return shapes.QUICK if setting.quick else shapes.BIG


def _room(setting: Setting) -> int:
    rounds = QUICK_ROUNDS if setting.quick else ROUNDS
    return TURN * (rounds + 1) + 8


def _read(model: Transformer, prompt: Tensor, room: int, dtype: torch.dtype | Literal["fp8"] | None = None) -> Cache:
    """A cache of what the prompt makes, with room for more tokens."""
    cache = model.new_cache(1, prompt.shape[1] + room, dtype)
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
    """Seconds of a decoding step, and the ratio to BF16's, in turns."""

    def turn(name: str) -> Callable[[], object]:
        tokens = random_tokens(models[name].config, TURN, 1, setting.device)
        return lambda: [models[name](token[None], caches[name]) for token in tokens]

    rounds = QUICK_ROUNDS if setting.quick else ROUNDS
    taken = interleaved({name: turn(name) for name in models}, setting.device, rounds)
    for name, times in taken.items():
        where = {"what": what, "format": name, **case}
        yield _figure("decode_seconds", where, "s", better="lower", note=note, **spread([t / TURN for t in times]))
    ratios = [a / b for a, b in zip(taken["fp8"], taken["bfloat16"], strict=True)]
    where = {"what": what, "format": "fp8", **case}
    yield _figure("decode_ratio", where, "x", better="lower", note=f"beside BF16, in turns; {note}", **spread(ratios))


def _logit_error(case: Mapping[str, Value], logits: list[Tensor]) -> Figure:
    """How far the second's are off the first's, as a share of their size."""
    want, got = (t.float() for t in logits)
    error = ((got - want).norm() / want.norm()).item()
    return _figure(
        "logit_error",
        case,
        "",
        measured=error,
        better="lower",
        note="of a model with random weights, whose routing is near its ties",
    )


def _bytes(metric: str, case: Mapping[str, Value], measured: float, predicted: int, note: str) -> Figure:
    return _figure(
        metric, case, "bytes", measured=float(measured), predicted=predicted, exact=True, better="lower", note=note
    )


def _figure(metric: str, case: Mapping[str, Value], unit: str, **values: Any) -> Figure:
    return Figure(question=NAME, case=case, metric=metric, unit=unit, **values)


def cases(setting: Setting) -> list[Case]:
    quick = setting.quick
    bf16 = dataclasses.replace(setting, dtype=torch.bfloat16)
    context = QUICK_CONTEXT if quick else CONTEXT
    return [
        Case(key="weights", seconds=2 if quick else 30, run=lambda: _weights(bf16)),
        Case(key="activations", seconds=5 if quick else 60, run=lambda: _activations(bf16)),
        Case(key=f"cache context={context}", seconds=3 if quick else 20, run=lambda: _cache(bf16)),
    ]


def finding(figures: list[Figure]) -> str:
    def value(metric: str, what: str, format: str = "fp8") -> float | None:
        return next((f.measured for f in pick(figures, metric, what=what, format=format)), None)

    def share(metric: str, what: str) -> float | None:
        a, b = value(metric, what), value(metric, what, "bfloat16")
        return a / b if a is not None and b else None

    def sentence(what: str, size: float | None, ratio: float | None, error: float | None, unit: str) -> str | None:
        parts = [f"{what} in {size:.0%} of the bytes"] if size is not None else []
        parts += [f"{ratio:.2f} times the time of a {unit}"] if ratio is not None else []
        parts += [f"logits off by {error:.1%}"] if error is not None else []
        return " with ".join([parts[0], " and ".join(parts[1:])]) if len(parts) > 1 else next(iter(parts), None)

    decoded, trained = "decoding step", "training step"
    said = [
        sentence(what, share(metric, what), value(ratio, what), value("logit_error", what), step)
        for what, metric, ratio, step in (
            ("weights", "bytes", "decode_ratio", decoded),
            ("activations", "kept", "step_ratio", trained),
            ("cache", "bytes_per_token", "decode_ratio", decoded),
        )
    ]
    told = [part for part in said if part]
    return f"Eight bits, simulated, keep {'; '.join(told)}." if told else "Nothing was measured yet."


def plots(figures: list[Figure]) -> list[Plot]:
    sizes = (
        ("weights", "bytes", "weights"),
        ("activations", "kept", "activations"),
        ("activations", "kept_by_linears", "those of Linears"),
        ("cache", "bytes_per_token", "cache"),
    )
    times = (("weights", "decode_ratio"), ("activations", "step_ratio"), ("cache", "decode_ratio"))
    drawn: list[Plot] = []
    shares: dict[str, float] = {}
    for what, metric, label in sizes:
        held = {f.case["format"]: f.measured for f in pick(figures, metric, what=what) if f.measured}
        if held.keys() >= {"fp8", "bfloat16"}:
            shares[label] = held["fp8"] / held["bfloat16"]
    if shares:
        drawn.append(_bars("Bytes in FP8", "share of BF16's bytes", shares, {}, 0.5, "half"))
    found = [f for what, metric in times for f in pick(figures, metric, what=what) if f.measured is not None]
    if found:
        at = {f"{f.case['what']}, {f.case['format']}": f for f in found}
        bars = {label: f.measured or 0.0 for label, f in at.items()}
        ranges = {label: (f.low or 0.0, f.high or 0.0) for label, f in at.items()}
        drawn.append(_bars("Time in FP8", "times BF16's time", bars, ranges, TARGET, "target of a training step"))
    return drawn


def _bars(
    title: str, y: str, bars: dict[str, float], ranges: dict[str, tuple[float, float]], line: float, what: str
) -> Plot:
    x = list(range(len(bars)))
    low, high = ([ranges[label][end] for label in bars] if ranges else None for end in (0, 1))
    span = [-0.5, len(bars) - 0.5]
    series = [
        Series(label="fp8", x=x, y=list(bars.values()), low=low, high=high, kind="bars"),
        Series(label=what, x=span, y=[line, line], dashed=True),
    ]
    return Plot(title=title, x="", y=y, series=series, labels=list(bars))


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
