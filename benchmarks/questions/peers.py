"""How fast is it compared with others, at the same shapes?

Models of one shape with random weights decode and read prompts in the same dtype, and train on as many tokens; all
take turns, and ratios are taken round by round. transformers 5.24 keeps MLA's latent too, and expands all of it at
every step. llama.cpp, where it is installed and on a CPU alone, runs our weights from a GGUF file, with its cache in
FP16, and makes logits of the last token alone.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, Value, pick
from benchmarks.peer_models.sides import LlamaCpp, Ours, Side, Theirs, deepseek_v3
from benchmarks.trained import trainer, training_flops
from dsmini import RunConfig, TrainConfig, accounting
from dsmini.machine import once
from dsmini.measure.rates import why_unusable
from dsmini.measure.timing import interleaved, ratios
from dsmini.measure.workloads import dtype_name, random_tokens
from dsmini.report.charts import lines, over_labels

NAME = "peers"
OURS, THEIRS, LLAMA = "dsmini", "transformers", "llama.cpp"
PROMPT = 512
TURN = 4
"""Tokens that one side decodes before it is the other's turn; the first of them, on a cold cache, does not count."""

figure = Figures(
    NAME,
    higher={"tokens_per_s": "tokens/s", "speed_ratio": "x"},
    lower={"cache_bytes_per_token": "bytes"},
)
Make = Callable[[], dict[str, Side]]


class Size(NamedTuple):
    """Contexts to decode at, rounds of turns, and sequences of a training step."""

    contexts: tuple[int, ...]
    rounds: int
    batch: int


FULL, QUICK = Size((128, 2048, 8192), 4, 16), Size((128, 1024), 2, 4)


def _size(setting: Setting) -> Size:
    return QUICK if setting.quick else FULL


def _room(setting: Setting) -> int:
    """Return the tokens that a cache has room for after a context."""
    return (_size(setting).rounds + 1) * TURN + PROMPT


def cases(setting: Setting) -> list[Case]:
    make: Make = functools.cache(lambda: sides(setting))
    size, quick, config = _size(setting), setting.quick, shapes.decoded(setting.quick)
    rounds = size.rounds + 1

    def reading(tokens: int) -> float:
        """Return the FLOPs with which ours and theirs read a prompt of that length."""
        return 2 * tokens * accounting.flops_per_token(config, tokens).total

    def read() -> Iterator[Figure]:
        yield from prefill(setting, make)
        make.cache_clear()  # the last that needs the models

    out: list[Case] = []
    for dtype, seconds in ((torch.float32, 15), (torch.bfloat16, 60)):
        usable = not why_unusable(dtype, setting.roofs.peak)
        flops = usable * training_flops(shapes.TRAINED, 2 * rounds * size.batch)  # ours and theirs
        key, run = f"train dtype={dtype_name(dtype)}", partial(train, dataclasses.replace(setting, dtype=dtype))
        out.append(Case(key=key, seconds=4 if quick else seconds, flops=flops, dtype=dtype, run=run))
    for context in size.contexts:
        key, run = f"decode context={context}", partial(decode, context, setting, make)
        out.append(Case(key=key, seconds=2 + context / 170, flops=reading(context), run=run))
    key, seconds = f"prefill tokens={PROMPT}", 3 if quick else 10
    return [*out, Case(key=key, seconds=seconds, flops=rounds * reading(PROMPT), run=read)]


def sides(setting: Setting) -> dict[str, Side]:
    """Return all models that are here."""
    config = shapes.decoded(setting.quick)
    ours = Ours(config, setting)
    out: dict[str, Side] = {OURS: ours, THEIRS: Theirs(config, setting)}
    if setting.device.type == "cpu" and find_spec("llama_cpp") and find_spec("gguf"):
        out[LLAMA] = LlamaCpp(ours.model, max(_size(setting).contexts) + _room(setting), PROMPT)
    return out


@torch.inference_mode()
def decode(context: int, setting: Setting, make: Make) -> Iterator[Figure]:
    config, all_sides, case = shapes.decoded(setting.quick), make(), {"what": "decode", "context": context}
    for side in all_sides.values():
        side.start(context + _room(setting))
        for part in random_tokens(config, 1, context, setting.device).split(PROMPT, 1):
            side.feed(part)
    taken: dict[str, list[float]] = {name: [] for name in all_sides}
    for i in range(_size(setting).rounds + 1):
        for name, side in all_sides.items():
            tokens = random_tokens(config, TURN, 1, setting.device)[:, None]
            seconds = [once(partial(side.feed, token), setting.device) for token in tokens]
            taken[name] += [statistics.median(seconds[1:])] if i else []
    yield from speeds(case, taken, 1)
    for name, side in all_sides.items():
        held = side.bytes_per_token()
        if held is not None:
            expected = accounting.kv_bytes_per_token(config, setting.dtype.itemsize) if name == OURS else None
            checked = {"predicted": expected, "exact": name == OURS, "note": "read off the storage"}
            yield figure("cache_bytes_per_token", {**case, "who": name}, held, **checked)


@torch.inference_mode()
def prefill(setting: Setting, make: Make) -> Iterator[Figure]:
    def read(side: Side) -> None:
        side.start(PROMPT)
        side.feed(random_tokens(shapes.decoded(setting.quick), 1, PROMPT, setting.device))

    runs = {name: partial(read, side) for name, side in make().items()}
    yield from speeds(
        {"what": "prefill", "tokens": PROMPT}, interleaved(runs, setting.device, _size(setting).rounds), PROMPT
    )


def train(setting: Setting) -> Iterator[Figure]:
    batch, config = _size(setting).batch, shapes.TRAINED
    case = {"what": "train", "dtype": dtype_name(setting.dtype)}
    if reason := why_unusable(setting.dtype, setting.roofs.peak):
        yield figure.left_out("speed_ratio", case, reason)
        return
    trainers = {}
    for name in (OURS, f"{OURS} compiled") if setting.dtype == torch.bfloat16 and not setting.quick else (OURS,):
        how = TrainConfig(batch_size=batch, steps=1000, compile=name != OURS, optimizer="adamw")
        trainers[name] = trainer(RunConfig(model=config, train=how), setting)
    steps = {OURS: trainers[OURS].step, THEIRS: _their_step(batch, setting)}
    steps |= {name: each.step for name, each in trainers.items()}
    taken = interleaved(steps, setting.device, _size(setting).rounds)
    for each in trainers.values():
        each.loader.close()
    note = "whole steps with AdamW: ours with batch, clipping and routing bias, theirs without"
    yield from speeds(case, taken, batch * trainers[OURS].config.seq_len, note)


def _their_step(batch: int, setting: Setting) -> Callable[[], None]:
    torch.manual_seed(0)
    model = deepseek_v3(shapes.TRAINED).to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = random_tokens(shapes.TRAINED, batch, shapes.TRAINED.max_seq_len, setting.device)

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
        yield figure("tokens_per_s", {**case, "who": name}, [tokens / t for t in seconds], note=note)
    for ours in (name for name in taken if name.startswith(OURS)):
        for peer in (name for name in taken if not name.startswith(OURS)):
            beside = {**case, "who": ours, "beside": peer}
            yield figure("speed_ratio", beside, ratios(taken, peer, ours), note=note)


def finding(figures: list[Figure]) -> str:
    told = []
    for peer in (THEIRS, LLAMA):
        compared = [f for f in pick(figures, "speed_ratio", beside=peer) if f.measured is not None]
        if compared:
            told.append(f"{peer}: {', '.join(f'{f.measured:.1f} times in {_label(f)}' for f in compared)}")
    return f"Speed compared with {'; with '.join(told)}." if told else ""


def _label(f: Figure) -> str:
    where = f"training in {f.case.get('dtype')}"
    if f.case["what"] == "decode":
        where = f"decoding at {f.case['context']:,}"
    if f.case["what"] == "prefill":
        where = f"reading {f.case['tokens']:,}"
    return f"{where}{str(f.case['who']).removeprefix(OURS)}"


def plots(figures: list[Figure]) -> list[Plot]:
    decoded = pick(figures, "tokens_per_s", what="decode")
    drawn = lines(decoded, "tokens_per_s", x="context", by="who", title="Decoding", label=str)
    groups = {
        f"compared with {peer}": {_label(f): f for f in pick(figures, "speed_ratio", beside=peer)}
        for peer in (THEIRS, LLAMA)
    }
    line = ("equal", 1.0)
    return drawn + over_labels("Speed compared with others", "times theirs", groups, line=line, log_y=True)
