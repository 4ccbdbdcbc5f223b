"""dsmini next to transformers and llama.cpp.

Models of one shape with random weights decode, read prompts and train on the same number of tokens. All take turns, and
each turn gives one ratio. transformers 5.24 also stores MLA's latent, but expands all of it in every step. llama.cpp,
where installed and only on a CPU, runs our weights from a GGUF file: in BF16, and in 8-bit integers (Q8_0) next to
dsmini in FP8. Its cache is FP16, and it computes the logits of the last token only. --peer-python names another Python
that has it.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.models import trainer, training_flops
from benchmarks.peer_models.engine import Engine, engine_python
from benchmarks.question import (
    Case,
    Figure,
    Question,
    Setting,
    drawing,
    left_out,
    pick,
    race,
    seconds_of_products,
    times,
)
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer, accounting, ops
from dsmini.config.published import config_to_json
from dsmini.inference.fused import Decoder
from dsmini.machine import once
from dsmini.measure.rates import why_unusable
from dsmini.measure.turns import reported
from dsmini.measure.workloads import dtype_name, random_cache, random_model, random_tokens
from dsmini.nn.cache import CacheDtype
from dsmini.nn.fp8 import hold_all_fp8

OURS, THEIRS, LLAMA = "dsmini", "transformers", "llama.cpp"
LOW, FP8, Q8 = "dsmini BF16", "dsmini FP8", "llama.cpp Q8_0"
PROMPT, PART = 512, 512
"""Tokens of the prompt that is read, and of a part of a longer one."""
COUNTED = 3
"""Tokens that one side decodes in its turn, after one on a cold cache that does not count."""


class Size(NamedTuple):
    """Contexts to decode at, turns, and sequences of a training step."""

    contexts: tuple[int, ...]
    turns: int
    batch: int

    @property
    def room(self) -> int:
        """Tokens that a cache has room for after a context."""
        return (self.turns + 1) * (COUNTED + 1) + PROMPT


FULL, QUICK = Size((128, 2048, 8192), 7, 16), Size((128, 1024), 5, 4)


def _size(setting: Setting) -> Size:
    return QUICK if setting.quick else FULL


# --- the sides: each fills its cache with rows for tokens [1, s], or starts with an empty one, and makes room for more.
# feed appends tokens, computes at least the logits of the last one, and returns the seconds by the side's own clock


class Ours:
    """Model of dsmini that decodes, with weights and a cache in the dtype of the model or in FP8."""

    def __init__(self, model: Transformer, cache_dtype: CacheDtype | None = None) -> None:
        self.model, self.decoder = model, Decoder(model)
        self.cache_dtype: CacheDtype | None = cache_dtype

    def fill(self, tokens: Tensor, room: int) -> None:
        # random rows: a CPU without BF16 units would take minutes to read a prompt in BF16
        self.cache = random_cache(self.model, 1, tokens.shape[1], room, self.cache_dtype)

    def start(self, room: int) -> None:
        self.cache = self.model.new_cache(1, room, self.cache_dtype)

    def feed(self, tokens: Tensor) -> None:
        self.decoder.logits(tokens, self.cache)


def deepseek_v3(config: ModelConfig) -> Any:
    """Return transformers' DeepseekV3ForCausalLM of this shape, with random weights and SDPA attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = config_to_json(dataclasses.asdict(config)) | {"attn_implementation": "sdpa"}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields))


class Theirs:
    """Model of transformers with random weights."""

    def __init__(self, config: ModelConfig, setting: Setting) -> None:
        self.model = deepseek_v3(config).to(setting.dtype).to(setting.device).eval()

    def fill(self, tokens: Tensor, room: int) -> None:
        self.start(tokens.shape[1] + room)
        for part in tokens.split(PART, 1):
            self.feed(part)

    def start(self, room: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def feed(self, tokens: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions rename an argument
            self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)


Side = Ours | Theirs | Engine


def sides(setting: Setting, python: str | None) -> dict[str, Side]:
    """Return the models of all implementations that are here. On a CPU with kernels ours decode in BF16 and FP8 too.

    Args:
        python: the Python of llama.cpp.
    """
    config, size = models.decoded(setting.quick), _size(setting)
    native = random_model(config, setting.device, setting.dtype)
    out: dict[str, Side] = {OURS: Ours(native)}
    if setting.device.type == "cpu" and ops.serving("cpu") == "cpu":
        low = native if setting.dtype == torch.bfloat16 else random_model(config, setting.device, torch.bfloat16)
        out |= {} if low is native else {LOW: Ours(low)}
        out[FP8] = Ours(hold_all_fp8(copy.deepcopy(low)), "fp8")
    out[THEIRS] = Theirs(config, setting)
    if python:
        for name, kind in ((LLAMA, "BF16"), (Q8, "Q8_0")):
            out[name] = Engine(python, native, kind, max(size.contexts) + size.room, PROMPT)
    return out


def pairs(names: Collection[str]) -> list[tuple[str, str]]:
    """Return each peer with our side that it is compared with: that of its number of bits, if there is one."""
    of = {THEIRS: OURS, LLAMA: LOW, Q8: FP8}
    return [(peer, ours if ours in names else OURS) for peer, ours in of.items() if peer in names]


# --- the measurement


def cases(setting: Setting) -> list[Case]:
    python = engine_python(setting.peer_python) if setting.device.type == "cpu" else None
    quick, size, out = setting.quick, _size(setting), list[Case]()
    for dtype, seconds in ((torch.float32, 15), (torch.bfloat16, 60)):
        usable = not why_unusable(dtype, setting.roofs.peak)
        flops = usable * training_flops(models.TRAINED, 2 * (size.turns + 1) * size.batch)  # ours and theirs
        estimate = (4 if quick else seconds) + seconds_of_products(flops, dtype, setting)
        run = partial(train, dataclasses.replace(setting, dtype=dtype))
        out.append(Case(key=f"train dtype={dtype_name(dtype)}", seconds=estimate, run=run))
    # the models are made once, for the cases of decoding and of reading
    make, with_whom = functools.cache(partial(sides, setting, python)), f" {LLAMA}" * bool(python)
    for context in size.contexts:
        first = (0 if quick else 60) * (context == size.contexts[0])  # makes the models and the engine's files
        seconds, run = 2 + context / 170 + first + _reading(setting, context), partial(decode, setting, make, context)
        out.append(Case(key=f"decode context={context}{with_whom}", seconds=seconds, run=run))
    seconds = (3 if quick else 10) + (size.turns + 1) * _reading(setting, PROMPT)
    out.append(Case(key=f"prefill tokens={PROMPT}{with_whom}", seconds=seconds, run=partial(prefill, setting, make)))
    return out


def _reading(setting: Setting, tokens: int) -> float:
    """Return the estimated seconds of reading a prompt of this length with ours and with theirs."""
    flops = 2 * tokens * accounting.flops_per_token(models.decoded(setting.quick), tokens).total
    return seconds_of_products(flops, setting.dtype, setting)


@torch.inference_mode()
def decode(setting: Setting, make: Callable[[], dict[str, Side]], context: int) -> Iterator[Figure]:
    every, size, config = make(), _size(setting), models.decoded(setting.quick)
    for side in every.values():
        side.fill(random_tokens(config, 1, context, setting.device), size.room)

    def token(side: Side) -> float:
        """Decode a token; return the seconds by the side's own clock, if it has one."""
        own, tokens = list[float | None](), random_tokens(config, 1, 1, setting.device)
        seconds = once(lambda: own.append(side.feed(tokens)), setting.device)
        return own[0] or seconds

    how = {"uncounted": 1, "repeats": COUNTED, "clock": reported, "count": size.turns, "seconds": float("inf")}
    runs = {name: partial(token, side) for name, side in every.items()}
    case = {"what": "decode", "context": context}
    yield from race(setting, case, runs, key="who", tokens=1, pairs=pairs(every), **how)


@torch.inference_mode()
def prefill(setting: Setting, make: Any) -> Iterator[Figure]:
    def read(side: Side) -> None:
        side.start(PROMPT)
        side.feed(random_tokens(models.decoded(setting.quick), 1, PROMPT, setting.device))

    # our other sides only decode: they read a prompt as the first does, or far slower
    runs = {name: partial(read, side) for name, side in make().items() if name not in (LOW, FP8)}
    how, case = {"count": _size(setting).turns, "seconds": float("inf")}, {"what": "prefill", "tokens": PROMPT}
    yield from race(setting, case, runs, key="who", tokens=PROMPT, pairs=pairs(runs), **how)
    make.cache_clear()  # the last case that needs the models


def train(setting: Setting) -> Iterator[Figure]:
    size, case = _size(setting), {"what": "train", "dtype": dtype_name(setting.dtype)}
    if reason := why_unusable(setting.dtype, setting.roofs.peak):
        yield left_out("times_as_long", case, reason)
        return
    trainers = {}
    compiled = [f"{OURS} compiled"] if setting.dtype == torch.bfloat16 and not setting.quick else []
    for name in (OURS, *compiled):
        how = TrainConfig(batch_size=size.batch, steps=1000, compile=name != OURS, optimizer="adamw")
        trainers[name] = trainer(RunConfig(model=models.TRAINED, train=how), setting)
    runs = {name: each.step for name, each in trainers.items()} | {THEIRS: their_step(size.batch, setting)}
    note = "whole steps with AdamW: ours with batch, clipping and routing bias, theirs without"
    tokens, both = size.batch * trainers[OURS].config.seq_len, [(THEIRS, name) for name in trainers]
    turns = {"count": size.turns, "seconds": float("inf")}
    yield from race(setting, case, runs, key="who", tokens=tokens, pairs=both, note=note, **turns)
    for each in trainers.values():
        each.loader.close()


def their_step(batch: int, setting: Setting) -> Callable[[], None]:
    """Return a training step of transformers' model."""
    model = deepseek_v3(models.TRAINED).to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = random_tokens(models.TRAINED, batch, models.TRAINED.max_seq_len, setting.device)

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- the answer

WHERE = {"train": "training in {dtype}", "decode": "decoding at {context:,}", "prefill": "reading {tokens:,}"}


def _where(f: Figure) -> str:
    """Return what a peer was compared in, with the bits of ours if they are not the model's."""
    return WHERE[str(f.case["what"])].format(**f.case) + str(f.case["than"]).removeprefix(OURS)


def answer(figures: list[Figure]) -> str:
    by_peer: dict[str, list[str]] = {}
    for f in pick(figures, "times_as_long"):
        if f.measured is not None:
            by_peer.setdefault(str(f.case["who"]), []).append(f"{times(f)} in {_where(f)}")
    told = [f"{peer} {', '.join(of)}" for peer, of in by_peer.items()]
    return f"Time of others, next to dsmini: {'; '.join(told)}." if told else ""


QUESTION = Question(
    name="peers",
    title="How fast is dsmini compared with other implementations of the same shape?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing("tokens_per_s", "Decoding", x="context", by="who"),
        drawing("times_as_long", "Time of others", _where, by="who", line=("equal", 1.0), log_y=True),
    ),
    needs="" if find_spec("transformers") else "transformers is not installed; pip install 'dsmini[peers]'",
)
