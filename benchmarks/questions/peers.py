"""The same shapes elsewhere, in turns: transformers' DeepSeek-V3, and llama.cpp where it is installed."""

import functools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.peer_models.llamacpp_model import write_gguf
from benchmarks.peer_models.transformers_model import deepseek_v3
from benchmarks.question import Case, Figure, Plot, Question, Series, Setting, Value, pick
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer, accounting
from dsmini.data.corpus import load_corpus
from dsmini.measure.timing import built, interleaved, once, random_tokens, spread
from dsmini.training.trainer import Trainer

NAME = "peers"
CORPUS = Path("runs/corpus")
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


class Side(Protocol):
    """A model that reads tokens into a cache."""

    def start(self, room: int) -> None:
        """Forget what was read; make room."""
        ...

    def feed(self, tokens: Tensor) -> None:
        """Read tokens [1, s] behind the others, and make the logits of the last at the least."""
        ...

    def bytes_per_token(self) -> float | None:
        """Of the cache, read off the storage, where that can be seen."""
        ...


class Ours:
    def __init__(self, config: ModelConfig, setting: Setting) -> None:
        self.model = built(config, setting)

    def start(self, room: int) -> None:
        self.cache = self.model.new_cache(1, room)

    def feed(self, tokens: Tensor) -> None:
        self.model(tokens, self.cache)

    def bytes_per_token(self) -> float:
        return self.cache.nbytes_per_token


class Theirs:
    """transformers'."""

    def __init__(self, config: ModelConfig, setting: Setting) -> None:
        torch.manual_seed(0)
        self.model = deepseek_v3(config).to(setting.dtype).to(setting.device).eval()

    def start(self, room: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def feed(self, tokens: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name for it
            self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)

    def bytes_per_token(self) -> float:
        layers: list[Any] = list(self.cache.layers)
        held = [t for layer in layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in held) / held[0].shape[-2]


class LlamaCpp:
    """llama.cpp's, with our weights."""

    def __init__(self, model: Transformer, room: int) -> None:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, "BF16" if model.embed.weight.dtype == torch.bfloat16 else "F32")
            self.llama = Llama(
                str(path),
                n_ctx=room,
                n_batch=PROMPT,
                n_threads=threads,
                n_threads_batch=threads,
                use_mmap=False,
                verbose=False,
            )

    def start(self, room: int) -> None:
        self.llama.reset()

    def feed(self, tokens: Tensor) -> None:
        self.llama.eval(tokens[0].tolist())

    def bytes_per_token(self) -> None:
        return None


def sides(setting: Setting) -> dict[str, Side]:
    config = _decoded(setting)
    ours = Ours(config, setting)
    out: dict[str, Side] = {OURS: ours, THEIRS: Theirs(config, setting)}
    if setting.device.type == "cpu" and find_spec("llama_cpp") and find_spec("gguf"):
        out[LLAMA] = LlamaCpp(ours.model, max(_contexts(setting)) + _room(setting))
    return out


def _decoded(setting: Setting) -> ModelConfig:
    return shapes.QUICK if setting.quick else shapes.BIG


def _contexts(setting: Setting) -> tuple[int, ...]:
    return QUICK_CONTEXTS if setting.quick else CONTEXTS


def _rounds(setting: Setting) -> int:
    return QUICK_ROUNDS if setting.quick else ROUNDS


def _room(setting: Setting) -> int:
    return (_rounds(setting) + 1) * TURN + PROMPT


@torch.inference_mode()
def _decode(context: int, setting: Setting, make: Callable[[], dict[str, Side]]) -> Iterator[Figure]:
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
    yield from _speeds({"what": "decode", "context": context}, taken, 1)
    for name, side in all_sides.items():
        held = side.bytes_per_token()
        if held is not None:
            number = setting.dtype.itemsize
            yield Figure(
                question=NAME,
                case={"what": "decode", "context": context, "who": name},
                metric="cache_bytes_per_token",
                unit="bytes",
                measured=held,
                predicted=accounting.kv_bytes_per_token(config, number) if name == OURS else None,
                exact=name == OURS,
                better="lower",
                note="read off the storage",
            )


@torch.inference_mode()
def _prefill(setting: Setting, make: Callable[[], dict[str, Side]]) -> Iterator[Figure]:
    config = _decoded(setting)

    def read(side: Side) -> Callable[[], None]:
        def run() -> None:
            side.start(PROMPT)
            side.feed(random_tokens(config, 1, PROMPT, setting.device))

        return run

    taken = interleaved({name: read(side) for name, side in make().items()}, setting.device, _rounds(setting))
    yield from _speeds({"what": "prefill", "tokens": PROMPT}, taken, PROMPT)


def _speeds(
    case: Mapping[str, Value], taken: Mapping[str, Sequence[float]], tokens: int, note: str = ""
) -> Iterator[Figure]:
    """Each one's tokens a second; and ours over each other's, round by round."""
    for name, times in taken.items():
        yield Figure(
            question=NAME,
            case={**case, "who": name},
            metric="tokens_per_s",
            unit="tokens/s",
            better="higher",
            note=note,
            **spread([tokens / t for t in times]),
        )
    for ours in (name for name in taken if name.startswith(OURS)):
        for peer in (name for name in taken if not name.startswith(OURS)):
            ratios = [b / a for a, b in zip(taken[ours], taken[peer], strict=True)]
            yield Figure(
                question=NAME,
                case={**case, "who": ours, "beside": peer},
                metric="speed_ratio",
                unit="x",
                better="higher",
                note=note,
                **spread(ratios),
            )


# --- training


def _train(dtype: torch.dtype, setting: Setting) -> Iterator[Figure]:
    batch = QUICK_BATCH if setting.quick else BATCH
    ours = _our_trainer(dtype, False, batch, setting)
    trainers = [ours]
    steps: dict[str, Callable[[], object]] = {OURS: ours.step, THEIRS: _their_step(dtype, batch, setting)}
    if dtype == torch.bfloat16 and not setting.quick:
        trainers.append(_our_trainer(dtype, True, batch, setting))
        steps[f"{OURS} compiled"] = trainers[-1].step
    taken = interleaved(steps, setting.device, _rounds(setting))
    for trainer in trainers:
        trainer.loader.close()
    tokens = batch * ours.config.seq_len
    case = {"what": "train", "dtype": str(dtype).removeprefix("torch.")}
    note = "whole steps with AdamW: ours with batch, clipping and routing bias, theirs without"
    yield from _speeds(case, taken, tokens, note)


def _our_trainer(dtype: torch.dtype, compiled: bool, batch: int, setting: Setting) -> Trainer:
    torch.manual_seed(0)
    train = TrainConfig(batch_size=batch, steps=1000, compile=compiled, optimizer="adamw")
    config = RunConfig(model=shapes.TRAINED, train=train)
    corpus = load_corpus(config.data, config.seq_len, config.model.vocab_size, CORPUS)
    with torch.device(setting.device):
        model = Transformer(config.model, compute_dtype=dtype)
    return Trainer(model, corpus, config, setting.device)


def _their_step(dtype: torch.dtype, batch: int, setting: Setting) -> Callable[[], object]:
    config = shapes.TRAINED
    torch.manual_seed(0)
    model: Any = deepseek_v3(config).to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = random_tokens(config, batch, config.max_seq_len, setting.device)

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- the question


def cases(setting: Setting) -> list[Case]:
    make = functools.cache(lambda: sides(setting))
    quick = setting.quick

    def prefill() -> Iterator[Figure]:
        yield from _prefill(setting, make)
        make.cache_clear()  # the last that needs the models

    trained = [
        Case(
            key=f"train dtype={str(dtype).removeprefix('torch.')}",
            seconds=4 if quick else 15 if dtype == torch.float32 else 60,
            run=lambda dtype=dtype: _train(dtype, setting),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    decoded = [
        Case(
            key=f"decode context={context}",
            seconds=ESTIMATES.get(context, context / 150),
            run=lambda context=context: _decode(context, setting, make),
        )
        for context in _contexts(setting)
    ]
    last = Case(key=f"prefill tokens={PROMPT}", seconds=3 if quick else 10, run=prefill)
    return [*trained, *decoded, last]


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
    drawn: list[Plot] = []
    decoded = pick(figures, "tokens_per_s", what="decode")
    if decoded:
        series = []
        for who in dict.fromkeys(str(f.case["who"]) for f in decoded):
            found = sorted(pick(decoded, "tokens_per_s", who=who), key=lambda f: f.case["context"])
            series.append(
                Series(
                    label=who,
                    x=[float(f.case["context"]) for f in found],
                    y=[f.measured or 0.0 for f in found],
                    low=[f.low or 0.0 for f in found],
                    high=[f.high or 0.0 for f in found],
                )
            )
        drawn.append(Plot(title="Decoding", x="context", y="tokens/s", series=series, log_x=True, log_y=True))
    ratios = [f for f in pick(figures, "speed_ratio") if f.measured is not None]
    if ratios:
        labels = list(dict.fromkeys(f"{_where(f)}{str(f.case['who']).removeprefix(OURS)}" for f in ratios))
        series = []
        for peer in dict.fromkeys(str(f.case["beside"]) for f in ratios):
            found = pick(ratios, "speed_ratio", beside=peer)
            x = [labels.index(f"{_where(f)}{str(f.case['who']).removeprefix(OURS)}") for f in found]
            y = [f.measured or 0.0 for f in found]
            low, high = [f.low or 0.0 for f in found], [f.high or 0.0 for f in found]
            series.append(Series(label=f"beside {peer}", x=x, y=y, low=low, high=high, kind="points"))
        series.append(Series(label="equal", x=[0, max(1, len(labels) - 1)], y=[1, 1], dashed=True))
        drawn.append(
            Plot(title="Speed beside others", x="", y="times theirs", series=series, labels=labels, log_y=True)
        )
    return drawn


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
