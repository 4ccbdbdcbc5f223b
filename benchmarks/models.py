"""Models to measure: sizes, models that are trained first, and steps of decoding that can take turns."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.question import Setting
from benchmarks.results import ROOT
from dsmini import ModelConfig, RunConfig, Transformer, accounting
from dsmini.data.corpus import cache_next_to, load_corpus
from dsmini.measure.workloads import ROOM, Step, StepShape, decoding_step, random_cache
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
CORPUS = cache_next_to(None)


def decoded(quick: bool) -> ModelConfig:
    """Return the model for decoding and prefill."""
    return QUICK if quick else BIG


def sparse(config: ModelConfig, topk: int) -> ModelConfig:
    """Return a config of dense MLA with an indexer of V3.2's proportions."""
    return dataclasses.replace(
        config,
        attention="dsa",
        index_n_heads=max(1, config.n_heads // 2),
        index_head_dim=max(config.kv_lora_rank // 4, config.qk_rope_head_dim),
        index_topk=topk,
    )


def compressed(config: ModelConfig) -> ModelConfig:
    """Return a config with V4's attention, layers of CSA and HCA in turn, whose rows are as wide as MLA's latent."""
    return dataclasses.replace(
        sparse(config, 512),
        attention="compressed",
        compress_ratios=tuple(4 if layer % 2 == 0 else 128 for layer in range(config.n_layers)),
        head_dim=config.kv_lora_rank,
        window_size=128,
        o_groups=2,
        o_lora_rank=config.dim // 4,
    )


def recipe(name: str) -> RunConfig:
    """Return configs/NAME.toml."""
    return RunConfig.from_file(ROOT / "configs" / f"{name}.toml")


def trainer(config: RunConfig, setting: Setting, steps: int = 0) -> Trainer:
    """Return a trainer of this run on the setting's device and dtype, after this many steps.

    The text is the default corpus unless the run names another. Its seed changes weights and data.
    """
    corpus = load_corpus(config.data, config.seq_len, config.model.vocab_size, CORPUS, config.train.seed)
    torch.manual_seed(config.train.seed)
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
    models: Mapping[str, Transformer], setting: Setting, batch: int, context: int
) -> tuple[dict[str, Step], dict[str, float]]:
    """Return steps that decode random tokens from caches of random rows, and their predicted seconds, by model."""

    shape: dict[str, Any] = {"work": "decode", "dtype": setting.dtype_name, "batch": batch, "tokens": context}
    predicted = setting.predicted({name: StepShape(config=model.config, **shape) for name, model in models.items()})
    steps = {name: decoding_step(model, random_cache(model, batch, context, ROOM)) for name, model in models.items()}
    return steps, predicted
