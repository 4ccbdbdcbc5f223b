"""From which context on does DeepSeek Sparse Attention pay, and how much?

The same weights run with dense MLA and with an indexer, in turns. The indexer has V3.2's proportions: half the heads
of MLA, a quarter of the latent's width, a seventeenth of the operations of dense attention to a cached token.
Decoding reads one token of one sequence after a cache of random rows, with all layers. A prompt is read by two layers,
in parts as dsmini.generate reads it. Dense MLA also reads it in one call, and the faster way is compared. Weights and
rows are random, so picks are spread over the context. Bytes are those of the whole model for a decoded token.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, pick
from benchmarks.steps import LEAST, decode_in_turns, distinct_experts
from dsmini import ModelConfig, Transformer, accounting
from dsmini.inference.fused.decoder import Decoder
from dsmini.inference.generation import prefill
from dsmini.measure import prediction
from dsmini.measure.counting import count
from dsmini.measure.timing import interleaved, ratios
from dsmini.measure.workloads import ROOM, dtype_name, prefill_step, random_cache, random_model, random_tokens
from dsmini.nn import Cache
from dsmini.nn.transformer import States
from dsmini.report.charts import lines

NAME = "sparse"
TOPK, QUICK_TOPK = 2048, 256
PROMPT_LAYERS = 2
DENSE, WHOLE, SPARSE = "dense", "dense, one call", "sparse"

figure = Figures(
    NAME,
    higher={"decode_gain": "", "prompt_gain": ""},
    lower={"decode_seconds": "s", "prompt_seconds": "s", "bytes_per_token": "bytes"},
)


def cases(setting: Setting) -> list[Case]:
    contexts = [128, 512, 2048] if setting.quick else [1024, 2048, 4096, 8192, 16384, 32768]
    prompts = [512] if setting.quick else [2048, 4096, 8192, 16384]
    decoding, reading = (partial(measure, setting) for measure in (measure_decoding, measure_prompt))
    work = {n: accounting.flops_per_token(base(setting, PROMPT_LAYERS), n, causal=False).total * n for n in prompts}
    seconds = 2.0 if setting.quick else 15.0
    return [
        *cases_over("decode context={}", ((n,) for n in contexts), seconds, decoding),
        # two rounds to warm up and to count, then all others; attention is far below the peak rate
        *(Case(key=f"prompt={n}", seconds=2.0, flops=20 * work[n], run=partial(reading, n)) for n in prompts),
    ]


def base(setting: Setting, layers: int | None = None) -> ModelConfig:
    """Return the dense config, with room for tokens after the longest context."""
    config = shapes.decoded(setting.quick)
    return dataclasses.replace(config, n_layers=layers or config.n_layers, max_seq_len=config.max_seq_len + ROOM)


def models(config: ModelConfig, setting: Setting) -> dict[str, Transformer]:
    """Return a dense model, and a sparse one with the same weights."""
    dense = random_model(config, setting.device, setting.dtype)
    sizes = {
        "index_n_heads": max(1, config.n_heads // 2),
        "index_head_dim": max(config.kv_lora_rank // 4, config.qk_rope_head_dim),
    }
    topk = QUICK_TOPK if setting.quick else TOPK
    sparse = random_model(
        dataclasses.replace(config, attention="dsa", index_topk=topk, **sizes), setting.device, setting.dtype
    )
    sparse.load_state_dict(dense.state_dict(), strict=False, assign=True)
    return {DENSE: dense, SPARSE: sparse}


@torch.no_grad()
def measure_decoding(setting: Setting, context: int) -> Iterator[Figure]:
    """Yield time and bytes of a decoded token, dense and sparse."""
    both = models(base(setting), setting)
    decoders = {model: Decoder(model) for model in both.values()}
    token = random_tokens(base(setting), 1, 1, setting.device)

    def decode(model: Transformer, cache: Cache) -> States:
        states = decoders[model].states(token, cache)
        model.head(states.normed)
        return states

    rounds = 15 if setting.quick else 40
    timed = decode_in_turns(both, setting, 1, context, rounds, decode)
    for kind, (predicted, taken) in timed.items():
        yield figure("decode_seconds", {"kind": kind, "context": context}, taken, predicted=predicted)
    faster = ratios({kind: taken for kind, (_, taken) in timed.items()}, DENSE, SPARSE)
    predicted = timed[DENSE][0] / timed[SPARSE][0]
    yield figure("decode_gain", {"context": context}, faster, predicted=predicted)
    for kind, model in both.items():
        cache = random_cache(model, 1, context, ROOM)
        experts = distinct_experts(decode(model, cache).routing)
        cache.truncate(context)
        moved = count(partial(decode, model, cache)).bytes
        new = {"context": context + 1, "dtype": dtype_name(setting.dtype), "experts": experts}
        least = accounting.decode_bytes_per_token(model.config, **new).total
        case = {"kind": kind, "context": context}
        yield figure("bytes_per_token", case, moved, predicted=least, bound=True, note=LEAST)


@torch.no_grad()
def measure_prompt(setting: Setting, tokens: int) -> Iterator[Figure]:
    """Yield the time of a prompt, dense in parts and in one call, and sparse in parts."""
    both = models(base(setting, PROMPT_LAYERS), setting)
    prompt = random_tokens(base(setting), 1, tokens, setting.device)[0].tolist()
    runs: dict[str, Callable[[], object]] = {
        kind: partial(_read, model, model.new_cache(1, tokens), prompt) for kind, model in both.items()
    }
    runs[WHOLE] = prefill_step(both[DENSE], 1, tokens)
    predicted = {kind: prediction.predicted_seconds(run, setting.roofs) for kind, run in runs.items()}
    taken = interleaved(runs, setting.device, 3)
    for kind in runs:
        case = {"kind": kind, "tokens": tokens}
        yield figure("prompt_seconds", case, taken[kind], predicted=predicted[kind])
    faster = min((ratios(taken, kind, SPARSE) for kind in (DENSE, WHOLE)), key=statistics.median)
    expected = min(predicted[DENSE], predicted[WHOLE]) / predicted[SPARSE]
    yield figure("prompt_gain", {"tokens": tokens}, faster, predicted=expected)


def _read(model: Transformer, cache: Cache, prompt: list[int]) -> None:
    cache.truncate(0)
    prefill(model, cache, [prompt])


def finding(figures: list[Figure]) -> str:
    told = []
    for metric, key, what in (("decode_gain", "context", "decodes"), ("prompt_gain", "tokens", "reads a prompt")):
        gains = sorted((f for f in pick(figures, metric) if f.measured), key=lambda f: f.case[key])
        if gains:
            last = gains[-1]
            predicted = f" (predicted: {last.predicted:.2f})" if last.predicted else ""
            told.append(f"at {last.case[key]:,} tokens it {what} {last.measured:.2f} times as fast{predicted}")
        if len(gains) > 1:
            measured, expected = (break_even(gains, key, part) for part in ("measured", "predicted"))
            told.append(f"from {measured} on (predicted: {expected})")
    return f"Sparse attention, next to dense: {', '.join(told)}." if told else ""


def break_even(gains: list[Figure], key: str, part: str) -> str:
    """Return the number of tokens where the gain passes 1, between the cases on a logarithmic scale."""
    points = [(float(f.case[key]), value) for f in gains if (value := getattr(f, part))]
    for (low, before), (high, after) in itertools.pairwise(points):
        if before < 1 <= after:
            share = math.log(1 / before) / math.log(after / before)
            return f"{low * (high / low) ** share:,.0f} tokens"
    return "every length" if all(gain >= 1 for _, gain in points) else "no length"


def plots(figures: list[Figure]) -> list[Plot]:
    return [
        *lines(figures, "decode_seconds", x="context", by="kind", title="Time of a decoded token", label=str),
        *lines(figures, "bytes_per_token", x="context", by="kind", title="Bytes of a decoded token", label=str),
        *lines(figures, "prompt_seconds", x="tokens", by="kind", title="Time of a prompt", label=str),
    ]
