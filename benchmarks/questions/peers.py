"""dsmini next to transformers, llama.cpp and ik_llama.cpp.

Models of one shape with random weights decode, read prompts and train on the same number of tokens. All take turns,
and each turn gives one ratio; the head takes the last token. transformers 5.24 also stores MLA's latent, but expands
all of it in every step; it reads a prompt in parts of 512 tokens, as the engines do. llama.cpp and ik_llama.cpp, where
installed and only on a CPU, run our weights from a GGUF file: in BF16, in FP32, and in 8-bit integers (Q8_0) next to
dsmini in FP8, whose head is BF16: once with such a head too. Their cache is FP16. ik_llama.cpp serves only DeepSeek's
widths of heads, and does not limit the groups of experts: "wide" is such a model. --peer-python names another Python
that has them. The roof is the least time of a case on this machine: the bytes that dsmini must move over the
bandwidth, or the FLOPs over the peak, whichever is longer.
"""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.models import trainer, training_flops
from benchmarks.peer_models.engine import BF16_HEAD, Engine, engines
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
from dsmini.measure.roofs import why_unusable
from dsmini.measure.turns import reported
from dsmini.measure.workloads import dtype_name, random_cache, random_model, random_tokens
from dsmini.nn.cache import CacheDtype
from dsmini.nn.fp8 import hold_all_fp8

OURS, THEIRS, IK = "dsmini", "transformers", "ik_llama.cpp"
KINDS: dict[str, tuple[Literal["float32", "bfloat16", "fp8"], tuple[str, ...]]] = {
    **{"FP32": ("float32", ("F32",)), "BF16": ("bfloat16", ("BF16",))},
    "FP8": ("fp8", ("Q8_0", f"Q8_0, {BF16_HEAD}")),
}
"""Types of the weights: their name in accounting, and the engines' types that are compared with each."""
PART = 512
"""Tokens of a prompt that others read together."""
LONGEST, LEAST = 120.0, 3
"""Seconds after which no turn of reading prompts begins, and turns in any case."""
COUNTED = 3
"""Tokens that one side decodes in its turn, after one on a cold cache that does not count."""


class Size(NamedTuple):
    """Contexts to decode at, lengths of prompts to read, turns, and sequences of a training step."""

    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    turns: int
    batch: int

    @property
    def room(self) -> int:
        """Tokens that a cache has room for after a context."""
        return (self.turns + 1) * (COUNTED + 1)


FULL, QUICK = Size((128, 2048, 8192), (128, 512, 2048, 8192), 7, 16), Size((128, 1024), (256,), 6, 4)


def _size(setting: Setting) -> Size:
    return QUICK if setting.quick else FULL


# --- the sides: each fills its cache with rows for tokens [1, s], or starts with an empty one, and makes room for more.
# feed appends tokens, computes at least the logits of the last one, and returns the seconds by the side's own clock


class Ours:
    """Model of dsmini, with a cache in the dtype of the model or in FP8."""

    def __init__(self, model: Transformer, cache_dtype: CacheDtype | None = None) -> None:
        self.model, self.decoder = model, Decoder(model)
        self.cache_dtype: CacheDtype | None = cache_dtype

    def fill(self, tokens: Tensor, room: int) -> None:
        # random rows: a CPU without BF16 units would take minutes to read a prompt in BF16
        self.cache = random_cache(self.model, 1, tokens.shape[1], room, self.cache_dtype)

    def start(self, room: int) -> None:
        self.cache = self.model.new_cache(1, room, self.cache_dtype)

    def feed(self, tokens: Tensor) -> None:
        self.model.head(self.decoder.states(tokens, self.cache).normed[:, -1:])


def deepseek_v3(config: ModelConfig) -> Any:
    """Return transformers' DeepseekV3ForCausalLM of this shape, with random weights and SDPA attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = config_to_json(dataclasses.asdict(config)) | {"attn_implementation": "sdpa"}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields))


class Theirs:
    """Model of transformers with random weights."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.model = deepseek_v3(config).to(dtype).to(device).eval()

    def fill(self, tokens: Tensor, room: int) -> None:
        self.start(tokens.shape[1] + room)
        self.feed(tokens)

    def start(self, room: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def feed(self, tokens: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions rename an argument
            for part in tokens.split(PART, 1):
                self.model(input_ids=part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


Side = Ours | Theirs | Engine


def sides(setting: Setting, config: ModelConfig, found: Mapping[str, str], kind: str) -> dict[str, Side]:
    """Return the models of all implementations that are here, in one type of weights, ours first.

    Args:
        found: the Python of each engine.
    """
    dtype, size = torch.float32 if kind == "FP32" else torch.bfloat16, _size(setting)
    model, room = random_model(config, setting.device, dtype), max(*size.contexts, *size.prompts) + size.room
    out: dict[str, Side] = {}
    if kind != "FP8" and not why_unusable(dtype, setting.roofs.peak):
        out[f"{THEIRS} {kind}"] = Theirs(config, setting.device, dtype)
    for (name, python), theirs in itertools.product(found.items(), KINDS[kind][1]):
        out[f"{name} {theirs}"] = Engine(name, python, model, theirs, room, PART)
    ours = Ours(hold_all_fp8(model), "fp8") if kind == "FP8" else Ours(model)
    return {f"{OURS} {kind}": ours, **out}


# --- the measurement


def cases(setting: Setting) -> list[Case]:
    cpu, size, out = setting.device.type == "cpu", _size(setting), list[Case]()
    found, fast, quick = engines(setting.peer_python) if cpu else {}, cpu and ops.serving("cpu") == "cpu", setting.quick
    for dtype, seconds in ((torch.float32, 15), (torch.bfloat16, 60)):
        usable = not why_unusable(dtype, setting.roofs.peak)
        flops = usable * training_flops(models.TRAINED, 2 * (size.turns + 1) * size.batch)  # ours and theirs
        estimate = (4 if quick else seconds) + seconds_of_products(flops, dtype, setting)
        run = partial(train, dataclasses.replace(setting, dtype=dtype))
        out.append(Case(key=f"train dtype={dtype_name(dtype)}", seconds=estimate, run=run))
    # --quick takes FP8 and the faster one of the others; without BF16 units kernels multiply BF16 weights in FP32
    slow = bool(why_unusable(torch.bfloat16, setting.roofs.peak))
    there = {"FP32": slow or not quick, "BF16": not slow or (fast and not quick), "FP8": fast}
    config, kinds = models.decoded(quick), [kind for kind in KINDS if there[kind]]
    shapes = {"": config} | ({"wide": dataclasses.replace(config, **models.WIDE)} if IK in found else {})
    for (shape, config), kind in itertools.product(shapes.items(), kinds):
        here = {name: python for name, python in found.items() if shape or name != IK}
        # the models are made once, for the cases of one type of weights
        make = functools.cache(partial(sides, setting, config, here, kind))
        dtype = torch.float32 if kind == "FP32" or slow else torch.bfloat16
        for what, tokens in [("decode", n) for n in size.contexts] + [("prefill", n) for n in size.prompts]:
            flops = 2 * tokens * accounting.flops_per_token(config, tokens).total  # ours and theirs
            reading = seconds_of_products(flops, dtype, setting)
            if what == "prefill":
                reading = min((size.turns + 1) * reading, max(LONGEST, (LEAST + 1) * reading))
            making = 60 if not quick and (what, tokens) == ("decode", size.contexts[0]) else 0
            case = {"what": what, "tokens": tokens, **({"shape": shape} if shape else {})}
            run = partial(compare, setting, config, make, kind, case)
            key = " ".join([f"{what} tokens={tokens}", *filter(None, [shape]), kind, *here])
            out.append(Case(key=key, seconds=1 + tokens / 400 + making + reading, run=run))
    return out


def _roof(setting: Setting, config: ModelConfig, kind: str, what: str, tokens: int) -> float:
    """Return the least seconds of decoding a token after this many, or of reading this many."""
    how: dict[str, Any] = {"dtype": KINDS[kind][0], "cache_dtype": "fp8" if kind == "FP8" else None}
    if what == "decode":
        moved, flops = accounting.decode_bytes_per_token(config, context=tokens + 1, **how).total, 0.0
    else:
        moved = tokens * accounting.prefill_bytes_per_token(config, seq_len=tokens, **how).total
        last: dict[str, Any] = {"training": False, "last_logits": True}
        flops = accounting.step_flops(config, batch_size=1, seq_len=tokens, **last).total
    return setting.roofs.least_seconds(moved, flops, KINDS[kind][0])


@torch.inference_mode()
def compare(setting: Setting, config: ModelConfig, make: Any, kind: str, case: dict[str, Any]) -> Iterator[Figure]:
    every, size, what, tokens = make(), _size(setting), case["what"], case["tokens"]
    how: dict[str, Any] = {"key": "who", "count": size.turns, "seconds": float("inf")}

    def token(side: Side) -> float:
        """Decode a token; return the seconds by the side's own clock, if it has one."""
        own, drawn = list[float | None](), random_tokens(config, 1, 1, setting.device)
        seconds = once(lambda: own.append(side.feed(drawn)), setting.device)
        return own[0] or seconds

    def read(side: Side) -> None:
        side.start(tokens)
        side.feed(random_tokens(config, 1, tokens, setting.device))

    if what == "decode":
        for side in every.values():
            side.fill(random_tokens(config, 1, tokens, setting.device), size.room)
        how |= {"uncounted": 1, "repeats": COUNTED, "clock": reported}
    else:
        how |= {"seconds": LONGEST, "least": LEAST}
    run, each = (token, 1) if what == "decode" else (read, tokens)
    runs, roof = {name: partial(run, side) for name, side in every.items()}, _roof(setting, config, kind, what, tokens)
    yield from race(setting, case, runs, tokens=each, roof=roof, **how)
    if (what, tokens) == ("prefill", size.prompts[-1]):
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
    how = {"count": size.turns, "seconds": float("inf")}
    roof = training_flops(models.TRAINED, size.batch) / setting.roofs.peak[setting.dtype_name]
    yield from race(setting, case, runs, key="who", tokens=tokens, roof=roof, pairs=both, note=note, **how)
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

WORDS = {"train": "training", "decode": "decoding", "prefill": "reading"}


def _where(f: Figure, length: bool = True) -> str:
    """Return what a peer was compared in: "decoding 2,048 wide FP8"."""
    what, tokens = WORDS[str(f.case["what"])], f"{f.case['tokens']:,}" if length and "tokens" in f.case else ""
    parts = what, tokens, f.case.get("shape"), f.case.get("dtype"), str(f.case["than"]).removeprefix(OURS).strip()
    return " ".join(str(part) for part in parts if part)


def answer(figures: list[Figure]) -> str:
    by_peer: dict[str, dict[str, list[Figure]]] = {}
    for f in pick(figures, "times_as_long"):
        if f.measured is not None:
            by_peer.setdefault(str(f.case["who"]), {}).setdefault(_where(f, length=False), []).append(f)

    def told(of: list[Figure]) -> str:
        least, *_, most = sorted(of * 2, key=lambda f: f.measured or 0.0)
        return times(least) if len(of) == 1 else f"{least.measured:.2f} to {most.measured:.2f} times"

    words = [f"{peer} {', '.join(f'{told(of)} in {w}' for w, of in by.items())}" for peer, by in by_peer.items()]
    return f"Time of others, next to dsmini: {'; '.join(words)}." if words else ""


def _is(f: Figure, what: str, shape: str) -> bool:
    return f.case["what"] == what and f.case.get("shape", "") == shape


QUESTION = Question(
    name="peers",
    title="How fast is dsmini compared with other implementations of the same shape?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        *(
            drawing("tokens_per_s", title, x="tokens", by="who", only=partial(_is, what=what, shape=shape))
            for shape, more in (("", ""), ("wide", " with DeepSeek's widths of heads"))
            for what, title in (("decode", f"Decoding{more}"), ("prefill", f"Reading a prompt{more}"))
        ),
        drawing("times_as_long", "Time of others", _where, by="who", line=("equal", 1.0), log_y=True),
    ),
    needs="" if find_spec("transformers") else "transformers is not installed; pip install 'dsmini[peers]'",
)
