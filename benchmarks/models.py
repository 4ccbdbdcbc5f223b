"""Models to measure: sizes, models that are trained first, and steps of decoding that can take turns."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.question import Setting
from benchmarks.results import ROOT
from dsmini import ModelConfig, RunConfig, Transformer, accounting
from dsmini.data.corpus import load_corpus
from dsmini.measure.prediction import predicted_seconds
from dsmini.measure.turns import Run
from dsmini.measure.workloads import random_cache
from dsmini.nn import Cache
from dsmini.training.trainer import Trainer

BIG = ModelConfig.from_file(Path(__file__).with_name("big.toml"))
QUICK = dataclasses.replace(BIG, vocab_size=8192, n_layers=3, n_routed_experts=32)
"""85M parameters, 170 MB in BF16."""
WIDE: Mapping[str, int] = {
    **{"n_heads": 8, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_expert_groups": 1, "n_limited_groups": 1},
}
"""DeepSeek's own widths of heads and latent, in a model of the same size. All groups of experts may be chosen."""
TRAINED = ModelConfig.from_file(Path(__file__).with_name("trained.toml"))
CORPUS = Path("runs/corpus")


def decoded(quick: bool) -> ModelConfig:
    """Return the model for decoding and prefill."""
    return QUICK if quick else BIG


def recipe(name: str) -> RunConfig:
    """Return configs/NAME.toml."""
    return RunConfig.from_file(ROOT / "configs" / f"{name}.toml")


def trainer(config: RunConfig, setting: Setting, steps: int = 0) -> Trainer:
    """Return a trainer of this run on the setting's device and dtype, after this many steps.

    The text is the default corpus unless the run names another.
    """
    corpus = load_corpus(config.data, config.seq_len, config.model.vocab_size, CORPUS)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = Transformer(config.model, compute_dtype=setting.dtype)
    made = Trainer(model, corpus, config, setting.device)
    for _ in range(steps):
        made.step()
    return made


def training_flops(config: ModelConfig, sequences: int) -> float:
    """Return the FLOPs of training on this many sequences of length max_seq_len."""
    length = config.max_seq_len
    return sequences * length * accounting.flops_per_token(config, length, training=True).total


def decoding(
    models: Mapping[str, Transformer],
    setting: Setting,
    batch: int,
    context: int,
    decode: Callable[[Transformer, Cache], object],
) -> tuple[dict[str, Run], dict[str, float]]:
    """Return steps that decode from caches of random rows, and their predicted seconds, by model."""

    def step(model: Transformer, cache: Cache) -> None:
        cache.truncate(context)
        decode(model, cache)

    runs: dict[str, Run] = {n: partial(step, m, random_cache(m, batch, context, 8)) for n, m in models.items()}
    return runs, {name: predicted_seconds(run, setting.roofs) for name, run in runs.items()}
