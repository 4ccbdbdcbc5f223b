"""The same shapes elsewhere, in turns: transformers' DeepSeek-V3, and llama.cpp where it is installed."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.peer_models.sides import LlamaCpp, Ours, Side, Theirs
from benchmarks.peer_models.transformers_model import deepseek_v3
from benchmarks.question import Case, Figure, Plot, Question, Setting, Value, pick
from benchmarks.trained import trainer
from dsmini import ModelConfig, RunConfig, TrainConfig, accounting
from dsmini.measure.rates import why_unusable
from dsmini.measure.timing import interleaved, once, ratios, spread
from dsmini.measure.workloads import dtype_name, random_tokens
from dsmini.report.charts import lines, points
from dsmini.training.trainer import Trainer

NAME = "peers"
OURS, THEIRS, LLAMA = "dsmini", "transformers", "llama.cpp"
CONTEXTS, QUICK_CONTEXTS = (128, 2048, 8192), (128, 1024)
PROMPT = 512
TURN = 4
"""Tokens that one side decodes before it is the other's turn; the first of them, on a cold cache, does not count."""
ROUNDS, QUICK_ROUNDS = 4, 2
BATCH, QUICK_BATCH = 16, 4
"""Sequences of a training step."""
ESTIMATES = {128: 5, 512: 8, 1024: 3, 2048: 12, 8192: 50}
"""Seconds by context."""

figure = functools.partial(Figure, question=NAME)


def cases(setting: Setting) -> list[Case]:
    make = functools.cache(lambda: sides(setting))
    quick = setting.quick

    def read() -> Iterator[Figure]:
        yield from prefill(setting, make)
        make.cache_clear()  # the last that needs the models

    trained = [
        Case(
            key=f"train dtype={dtype_name(dtype)}",
            seconds=4 if quick else 15 if dtype == torch.float32 else 60,
            flops=0 if why_unusable(dtype, setting.roofs.peak) else train_flops(quick),
            dtype=dtype,
            run=lambda dtype=dtype: train(dataclasses.replace(setting, dtype=dtype)),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    decoded = [
        Case(
            key=f"decode context={context}",
            seconds=ESTIMATES.get(context, context / 150),
            flops=read_flops(setting, context),
            run=lambda context=context: decode(context, setting, make),
        )
        for context in _contexts(setting)
    ]
    flops = (_rounds(setting) + 1) * read_flops(setting, PROMPT)
    last = Case(key=f"prefill tokens={PROMPT}", seconds=3 if quick else 10, flops=flops, run=read)
    return [*trained, *decoded, last]


def read_flops(setting: Setting, tokens: int) -> float:
    """Return the FLOPs with which ours and theirs read a prompt of that length."""
    return 2 * tokens * accounting.flops_per_token(_decoded(setting), tokens).total


def train_flops(quick: bool) -> float:
    """Return the FLOPs with which ours and theirs train."""
    config, batch, rounds = shapes.TRAINED, QUICK_BATCH if quick else BATCH, QUICK_ROUNDS if quick else ROUNDS
    tokens = 2 * (rounds + 1) * batch * config.max_seq_len
    return tokens * accounting.flops_per_token(config, config.max_seq_len, training=True).total


def sides(setting: Setting) -> dict[str, Side]:
    """Return all models that are here."""
    config = _decoded(setting)
    ours = Ours(config, setting)
    out: dict[str, Side] = {OURS: ours, THEIRS: Theirs(config, setting)}
    if setting.device.type == "cpu" and find_spec("llama_cpp") and find_spec("gguf"):
        out[LLAMA] = LlamaCpp(ours.model, max(_contexts(setting)) + _room(setting), PROMPT)
    return out


@torch.inference_mode()
def decode(context: int, setting: Setting, make: Callable[[], dict[str, Side]]) -> Iterator[Figure]:
    config, all_sides = _decoded(setting), make()
    for side in all_sides.values():
        side.start(context + _room(setting))
        for part in random_tokens(config, 1, context, setting.device).split(PROMPT, 1):
            side.feed(part)
    taken: dict[str, list[float]] = {name: [] for name in all_sides}
    for i in range(_rounds(setting) + 1):
        for name, side in all_sides.items():
            tokens = random_tokens(config, TURN, 1, setting.device)[:, None]
            seconds = [once(lambda token=token, side=side: side.feed(token), setting.device) for token in tokens]
            taken[name] += [statistics.median(seconds[1:])] if i else []
    yield from speeds({"what": "decode", "context": context}, taken, 1)
    for name, side in all_sides.items():
        held = side.bytes_per_token()
        if held is not None:
            ours = name == OURS
            yield figure(
                case={"what": "decode", "context": context, "who": name},
                metric="cache_bytes_per_token",
                unit="bytes",
                measured=held,
                predicted=accounting.kv_bytes_per_token(config, setting.dtype.itemsize) if ours else None,
                exact=ours,
                better="lower",
                note="read off the storage",
            )


@torch.inference_mode()
def prefill(setting: Setting, make: Callable[[], dict[str, Side]]) -> Iterator[Figure]:
    config = _decoded(setting)

    def read(side: Side) -> Callable[[], None]:
        def run() -> None:
            side.start(PROMPT)
            side.feed(random_tokens(config, 1, PROMPT, setting.device))

        return run

    taken = interleaved({name: read(side) for name, side in make().items()}, setting.device, _rounds(setting))
    yield from speeds({"what": "prefill", "tokens": PROMPT}, taken, PROMPT)


def train(setting: Setting) -> Iterator[Figure]:
    batch = QUICK_BATCH if setting.quick else BATCH
    case = {"what": "train", "dtype": dtype_name(setting.dtype)}
    if reason := why_unusable(setting.dtype, setting.roofs.peak):
        yield figure(case=case, metric="speed_ratio", unit="x", better="higher", note=f"left out: {reason}")
        return
    ours = _our_trainer(False, batch, setting)
    trainers = [ours]
    steps: dict[str, Callable[[], object]] = {OURS: ours.step, THEIRS: _their_step(batch, setting)}
    if setting.dtype == torch.bfloat16 and not setting.quick:
        trainers.append(_our_trainer(True, batch, setting))
        steps[f"{OURS} compiled"] = trainers[-1].step
    taken = interleaved(steps, setting.device, _rounds(setting))
    for each in trainers:
        each.loader.close()
    note = "whole steps with AdamW: ours with batch, clipping and routing bias, theirs without"
    yield from speeds(case, taken, batch * ours.config.seq_len, note)


def _our_trainer(compiled: bool, batch: int, setting: Setting) -> Trainer:
    run = TrainConfig(batch_size=batch, steps=1000, compile=compiled, optimizer="adamw")
    return trainer(RunConfig(model=shapes.TRAINED, train=run), setting)


def _their_step(batch: int, setting: Setting) -> Callable[[], object]:
    config = shapes.TRAINED
    torch.manual_seed(0)
    model: Any = deepseek_v3(config).to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = random_tokens(config, batch, config.max_seq_len, setting.device)

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speeds(
    case: Mapping[str, Value], taken: Mapping[str, Sequence[float]], tokens: int, note: str = ""
) -> Iterator[Figure]:
    """Tell each one's tokens a second, and ours over each other's, round by round."""
    for name, seconds in taken.items():
        speed = spread([tokens / t for t in seconds])
        where = {**case, "who": name}
        yield figure(case=where, metric="tokens_per_s", unit="tokens/s", better="higher", note=note, **speed)
    for ours in (name for name in taken if name.startswith(OURS)):
        for peer in (name for name in taken if not name.startswith(OURS)):
            faster = spread(ratios(taken, peer, ours))
            where = {**case, "who": ours, "beside": peer}
            yield figure(case=where, metric="speed_ratio", unit="x", better="higher", note=note, **faster)


def _decoded(setting: Setting) -> ModelConfig:
    return shapes.QUICK if setting.quick else shapes.BIG


def _contexts(setting: Setting) -> tuple[int, ...]:
    return QUICK_CONTEXTS if setting.quick else CONTEXTS


def _rounds(setting: Setting) -> int:
    return QUICK_ROUNDS if setting.quick else ROUNDS


def _room(setting: Setting) -> int:
    return (_rounds(setting) + 1) * TURN + PROMPT


def finding(figures: list[Figure]) -> str:
    told = []
    for peer in (THEIRS, LLAMA):
        parts = []
        for f in pick(figures, "speed_ratio", beside=peer):
            if f.measured is not None:
                compiled = " compiled" if f.case["who"] != OURS else ""
                parts.append(f"{f.measured:.1f} in {_where(f)}{compiled}")
        if parts:
            told.append(f"beside {peer}: {', '.join(parts)}")
    return f"Times the speed, {'; '.join(told)}." if told else "Nothing was measured yet."


def _where(f: Figure) -> str:
    if f.case["what"] == "decode":
        return f"decoding at {f.case['context']:,}"
    if f.case["what"] == "prefill":
        return f"reading {f.case['tokens']:,}"
    return f"training in {f.case['dtype']}"


def plots(figures: list[Figure]) -> list[Plot]:
    drawn = lines(
        pick(figures, "tokens_per_s", what="decode"),
        "tokens_per_s",
        x="context",
        by="who",
        title="Decoding",
        unit="tokens/s",
        label=str,
    )
    compared = [f for f in pick(figures, "speed_ratio") if f.measured is not None]
    if compared:
        peers = dict.fromkeys(str(f.case["beside"]) for f in compared)
        groups = {f"beside {peer}": pick(compared, "speed_ratio", beside=peer) for peer in peers}
        title, line = "Speed beside others", ("equal", 1.0)
        drawn.append(points(title, "times theirs", groups, _label, line=line, quartiles=True, log_y=True))
    return drawn


def _label(f: Figure) -> str:
    return f"{_where(f)}{str(f.case['who']).removeprefix(OURS)}"


QUESTION = Question(
    name=NAME,
    title="How fast is it beside others, at the same shapes?",
    cases=cases,
    finding=finding,
    plots=plots,
    needs=None if find_spec("transformers") else "transformers is not installed; pip install 'dsmini[peers]'",
    about=(
        "Models of one shape with random weights decode and read prompts in the same dtype, and train on as many "
        "tokens; all take turns, and ratios are taken round by round. transformers 5.24 keeps MLA's latent too, and "
        "expands all of it at every step. llama.cpp, where it is installed and on a CPU alone, runs our weights from a "
        "GGUF file, with its cache in FP16, and makes logits of the last token alone."
    ),
)
