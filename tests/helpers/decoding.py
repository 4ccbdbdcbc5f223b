"""Models for decoding steps, whose weights are held in FP32, BF16 or FP8 codes, and their caches."""

import functools
import operator
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.nn import Cache
from dsmini.nn.fp8 import fp8_weights, hold_all_fp8, hold_fp8
from dsmini.numerics import FP4_BLOCK, WEIGHT_TILE, quantize
from tests.conftest import MODELS as SIZES
from tests.conftest import SMALL, randomise

WEIGHTS = ("float32", "bfloat16", "fp8")
EXPERTS = (*WEIGHTS, "fp4")
"""Numbers of all matrices; with "fp4" those of the routed experts, whose model has FP8 elsewhere."""
CACHES = (torch.float32, torch.bfloat16, "fp8")
ROOM = 400
ODD = SMALL | {"n_mtp_layers": 0, "max_seq_len": ROOM}


def _models(kind: str) -> dict[str, dict[str, Any]]:
    """Return the models of a kind in decoding.toml by name."""
    rows = tomllib.loads(Path(__file__).with_name("decoding.toml").read_text())[kind]
    for row in rows.values():
        bases = [SIZES[base] for base in row.pop("of", ())]
        own = {key: None if value == "none" else value for key, value in row.items()}
        row |= functools.reduce(operator.or_, [ODD, *bases, own])
    return rows


MODELS, GROUPED, SPARSE, COMPRESSED = map(_models, ("models", "grouped", "sparse", "compressed"))
"""Models of MLA; of MHA, GQA and MQA; of DSA; and of V4's attention."""


def model_of(name: str, weights: str = "float32", **changes: Any) -> Transformer:
    """Make a model, with changes of its config, whose matrices are held so; it computes in FP32."""
    model = randomise(
        Transformer(
            ModelConfig(**((MODELS | GROUPED | SPARSE | COMPRESSED)[name] | changes)), compute_dtype=torch.float32
        )
    ).eval()
    if weights == "bfloat16":
        return model.to(torch.bfloat16)
    if weights == "fp4":
        for name in fp8_weights(model):
            if ".experts." in name:
                hold_fp4(model, name)
            else:
                q = quantize(model.get_parameter(name), WEIGHT_TILE, "ue8m0")
                hold_fp8(model, name, q.codes, q.scales)
    return hold_all_fp8(model, "ue8m0") if weights == "fp8" else model


def hold_fp4(model: Transformer, name: str) -> None:
    """Let the parameter of that name be E2M1 codes with a scale of a byte for each 32 numbers of a row."""
    q = quantize(model.get_parameter(name), (1, FP4_BLOCK), "ue8m0", "e2m1")
    hold_fp8(model, name, q.codes, q.scales.to(torch.float8_e8m0fnu), tile=(1, FP4_BLOCK), format="e2m1")


def index_stores(cache: Cache) -> list[Any]:
    """Return the keys of each layer's indexer."""
    return [store.index for store in cache.stores if store.index is not None]


def filled(model: Transformer, lengths: list[int], dtype: Any) -> Cache:
    """Return a cache whose rows have these lengths and random content."""
    cache = model.new_cache(len(lengths), ROOM, dtype)
    c = model.config
    grouped = c.kv_heads * (c.qk_nope_head_dim + c.v_head_dim)
    width = c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else grouped
    numbers = torch.randn(len(model.layers), len(lengths), ROOM, width)
    for store, rows in zip(cache.stores, numbers, strict=True):
        store.data.copy_(store.codec.encode(rows))
    for store in index_stores(cache):
        store.data.copy_(store.codec.encode(torch.randn(len(lengths), ROOM, c.index_head_dim or 0)))
    cache.lengths = torch.tensor(lengths)
    return cache


def rows_of(cache: Cache) -> list[Tensor]:
    """Return what each layer stores, as FP32 numbers."""
    return [store.read(cache.max_seq_len, torch.float32) for store in cache.stores]
