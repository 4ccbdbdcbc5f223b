"""How fast is dsmini compared with other implementations of the same shape?

Models of one shape with random weights decode, read prompts and train on the same number of tokens. All take turns, and
each round gives one ratio. transformers 5.24 also stores MLA's latent, but expands all of it in every step. llama.cpp
and ik_llama.cpp, where installed and only on a CPU, run our weights from a GGUF file: in BF16, and in 8-bit integers
(Q8_0) next to dsmini in FP8. Their cache is FP16, and they compute the logits of the last token only. ik_llama.cpp
serves only DeepSeek's widths of heads, and does not limit the groups of experts: "wide" is such a model. --peer-python
names another Python that has them.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, Value, pick
from benchmarks.peer_models.engines import Engine, engines
from benchmarks.peer_models.sides import Ours, Side, Theirs, deepseek_v3
from benchmarks.questions.fp8 import hold_in_fp8
from benchmarks.trained import trainer, training_flops
from dsmini import ModelConfig, RunConfig, TrainConfig, accounting, ops
from dsmini.machine import once
from dsmini.measure.rates import why_unusable
from dsmini.measure.timing import interleaved, ratios
from dsmini.measure.workloads import dtype_name, random_model, random_tokens
from dsmini.report.charts import lines, over_labels
from dsmini.report.verdicts import compared

NAME = "peers"
OURS, THEIRS, LLAMA, IK = "dsmini", "transformers", "llama.cpp", "ik_llama.cpp"
LOW, FP8, Q8 = "dsmini BF16", "dsmini FP8", "Q8_0"
PEERS = (THEIRS, LLAMA, f"{LLAMA} {Q8}", IK, f"{IK} {Q8}")
"""Others in the order of the finding. dsmini BF16 decodes where dsmini is FP32, because this CPU has no BF16 units."""
PROMPT = 512
TURN = 4
"""Tokens that one side decodes in its turn; the first of them, on a cold cache, does not count."""

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
    """Return the number of tokens that a cache has room for after a context."""
    return (_size(setting).rounds + 1) * TURN + PROMPT


def cases(setting: Setting) -> list[Case]:
    found = engines(setting.peer_pythons) if setting.device.type == "cpu" else {}
    size, quick = _size(setting), setting.quick
    rounds, out = size.rounds + 1, list[Case]()
    for dtype, seconds in ((torch.float32, 15), (torch.bfloat16, 60)):
        usable = not why_unusable(dtype, setting.roofs.peak)
        flops = usable * training_flops(shapes.TRAINED, 2 * rounds * size.batch)  # ours and theirs
        key, run = f"train dtype={dtype_name(dtype)}", partial(train, dataclasses.replace(setting, dtype=dtype))
        out.append(Case(key=key, seconds=4 if quick else seconds, flops=flops, dtype=dtype, run=run))
    out += _of_shape(setting, shapes.decoded(quick), {LLAMA: found[LLAMA]} if LLAMA in found else {}, {})
    if IK in found:
        wide = dataclasses.replace(shapes.wide(quick), n_expert_groups=1, n_limited_groups=1)
        out += _of_shape(setting, wide, {IK: found[IK]}, {"shape": "wide"})
    return out


def _of_shape(
    setting: Setting, config: ModelConfig, found: Mapping[str, str], shape: Mapping[str, Value]
) -> list[Case]:
    """Return the cases of decoding and reading with a model of one shape, for which it is made once.

    Args:
        found: the Python of each engine to compare with.
        shape: keys of the case that tell the shape.
    """
    make: Make = functools.cache(lambda: sides(setting, config, found, not shape))
    size, quick, rounds = _size(setting), setting.quick, _size(setting).rounds + 1

    def reading(tokens: int) -> float:
        """Return the FLOPs of reading a prompt of this length with ours and with theirs."""
        return 2 * tokens * accounting.flops_per_token(config, tokens).total

    def read() -> Iterator[Figure]:
        yield from prefill(setting, config, make, shape)
        make.cache_clear()  # the last case that needs the models

    out: list[Case] = []
    with_whom = "".join(f" {name}" for name in (*shape.values(), *found))
    for context in size.contexts:
        key, run = f"decode context={context}{with_whom}", partial(decode, context, setting, config, make, shape)
        # the first case makes the models and the engines' files
        seconds = 2 + context / 170 + (0 if quick else 60) * (context == size.contexts[0])
        out.append(Case(key=key, seconds=seconds, flops=reading(context), run=run))
    key, seconds = f"prefill tokens={PROMPT}{with_whom}", 3 if quick else 10
    return [*out, Case(key=key, seconds=seconds, flops=rounds * reading(PROMPT), run=read)]


def sides(setting: Setting, config: ModelConfig, found: Mapping[str, str], theirs: bool) -> dict[str, Side]:
    """Return the models of all implementations that are here. On a CPU with kernels ours decode in BF16 and FP8 too."""
    native = random_model(config, setting.device, setting.dtype)
    out: dict[str, Side] = {OURS: Ours(native)}
    if setting.device.type == "cpu" and ops.serving("cpu") == "cpu":
        low = native if setting.dtype == torch.bfloat16 else random_model(config, setting.device, torch.bfloat16)
        out |= {} if low is native else {LOW: Ours(low)}
        out[FP8] = Ours(hold_in_fp8(low)[0], "fp8")
    if theirs:
        out[THEIRS] = Theirs(config, setting)
    room = max(_size(setting).contexts) + _room(setting)
    for name, python in found.items():
        for ending, kind in (("", "BF16"), (f" {Q8}", Q8)):
            out[f"{name}{ending}"] = Engine(name, python, native, kind, room, PROMPT)
    return out


def partner(peer: str, names: Collection[str]) -> str:
    """Return our side that a peer is compared with: that of its number of bits, if there is one."""
    if peer.endswith(Q8):
        return FP8 if FP8 in names else OURS
    return LOW if peer != THEIRS and LOW in names else OURS


@torch.inference_mode()
def decode(
    context: int, setting: Setting, config: ModelConfig, make: Make, shape: Mapping[str, Value]
) -> Iterator[Figure]:
    all_sides, case = make(), {"what": "decode", "context": context, **shape}
    for side in all_sides.values():
        side.fill(random_tokens(config, 1, context, setting.device), _room(setting))
    taken: dict[str, list[float]] = {name: [] for name in all_sides}
    for i in range(_size(setting).rounds + 1):
        for name, side in all_sides.items():
            tokens = random_tokens(config, TURN, 1, setting.device)[:, None]
            seconds = [timed(side, token, setting.device) for token in tokens]
            taken[name] += [statistics.median(seconds[1:])] if i else []
    pairs = [(partner(name, all_sides), name) for name in all_sides if not name.startswith(OURS)]
    yield from speeds(case, taken, 1, pairs=pairs)
    for name, side in all_sides.items():
        held = side.bytes_per_token()
        if held is not None:
            expected = accounting.kv_bytes_per_token(config, setting.dtype.itemsize) if name == OURS else None
            note = f"of a token, in all {config.n_layers} layers; read off the storage"
            checked = {"predicted": expected, "exact": name == OURS, "note": note}
            yield figure("cache_bytes_per_token", {**case, "who": name}, held, **checked)


def timed(side: Side, tokens: Tensor, device: torch.device) -> float:
    """Return the seconds in which a side appends tokens, by its own clock if it has one."""
    own: list[float | None] = []
    seconds = once(lambda: own.append(side.feed(tokens)), device)
    return own[0] or seconds


@torch.inference_mode()
def prefill(setting: Setting, config: ModelConfig, make: Make, shape: Mapping[str, Value]) -> Iterator[Figure]:
    def read(side: Side) -> None:
        side.start(PROMPT)
        side.feed(random_tokens(config, 1, PROMPT, setting.device))

    # our other sides only decode: they read a prompt as the first does, or far slower
    runs = {name: partial(read, side) for name, side in make().items() if name not in (LOW, FP8)}
    taken = interleaved(runs, setting.device, _size(setting).rounds)
    yield from speeds({"what": "prefill", "tokens": PROMPT, **shape}, taken, PROMPT)


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
    case: Mapping[str, Value],
    taken: Mapping[str, Sequence[float]],
    tokens: int,
    note: str = "",
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Iterator[Figure]:
    """Yield the tokens a second of each side, and ours over each other side's, round by round.

    Args:
        pairs: our side and the other one of each ratio; None: all pairs.
    """
    for name, seconds in taken.items():
        yield figure("tokens_per_s", {**case, "who": name}, [tokens / t for t in seconds], note=note)
    mine = [name for name in taken if name.startswith(OURS)]
    for ours, peer in itertools.product(mine, [n for n in taken if n not in mine]) if pairs is None else pairs:
        beside = {**case, "who": ours, "beside": peer}
        yield figure("speed_ratio", beside, ratios(taken, peer, ours), note=note)


def finding(figures: list[Figure]) -> str:
    told = []
    for peer in PEERS:
        faster = [f for f in pick(figures, "speed_ratio", beside=peer) if f.measured is not None]
        if faster:
            told.append(f"{peer}: {', '.join(compared(f, words=f'in {_label(f)}', decimals=1) for f in faster)}")
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
    drawn: list[Plot] = []
    for title, wide in (("Decoding", False), ("Decoding with DeepSeek's widths of heads", True)):
        some = [f for f in decoded if ("shape" in f.case) == wide]
        drawn += lines(some, "tokens_per_s", x="context", by="who", title=title, label=str)
    groups = {
        f"compared with {peer}": {_label(f): f for f in pick(figures, "speed_ratio", beside=peer)} for peer in PEERS
    }
    line = ("equal", 1.0)
    return drawn + over_labels("Speed compared with others", "times theirs", groups, line=line, log_y=True)
