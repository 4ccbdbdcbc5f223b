"""Models of published figures: DeepSeek-V3 and V2, and the dense models that reports compare them with.

    >>> reference("deepseek-v3").kv_lora_rank
    kv_lora_rank = 512

A file in models/ has a source and the section [model] of dsmini's own configs. They are in the package, so that plans
can name published runs without the folder configs/.
"""

import dataclasses
from functools import cache
from pathlib import Path

from dsmini.config import ModelConfig
from dsmini.config.fields import build, refuse_unknown
from dsmini.config.model import NO_INDEXER
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.reading import read_toml

MODELS = Path(__file__).parent / "models"


@cache
def reference(name: str) -> ModelInputs:
    """Return a model of published figures by name."""
    raw = read_toml(MODELS / f"{name}.toml")
    refuse_unknown(raw, ["source", "model"], f"{name}.toml", "")
    return ModelInputs.of(build(ModelConfig, raw["model"], f"{name}.toml", "model."), raw["source"])


def same_sizes(a: ModelInputs, b: ModelInputs) -> bool:
    """Return True for two models with equal sizes, whatever their training, context and RoPE."""
    names = [field.name for field in dataclasses.fields(a) if field.name != "config"]
    equal = all(getattr(a, name).value == getattr(b, name).value for name in names)
    return equal and a.config.attention == b.config.attention


def is_v3_family(m: ModelInputs) -> bool:
    """Return True for a model with DeepSeek-V3's sizes, with indexers as V3.2 or without."""
    if m.config.attention != "dsa":
        return is_v3(m)
    dense = dataclasses.replace(m.config, attention="mla", **NO_INDEXER)
    return is_v3(ModelInputs.of(dense, m.n_layers.source))


def is_v3(m: ModelInputs) -> bool:
    """Return True for a model with DeepSeek-V3's sizes."""
    return same_sizes(m, reference("deepseek-v3"))
