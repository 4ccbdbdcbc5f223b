"""Models of one shape with a common interface, ours and others', so that they can take turns."""

import dataclasses
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.case import Setting
from dsmini import ModelConfig, Transformer
from dsmini.config.huggingface import config_to_json
from dsmini.inference.fused.decoder import Decoder
from dsmini.measure.workloads import random_cache
from dsmini.nn.cache import CacheDtype

PART = 512
"""Tokens of a long prompt that are read together."""


class Side(Protocol):
    """Model that reads tokens into a cache."""

    def fill(self, tokens: Tensor, room: int) -> None:
        """Fill the cache with rows for tokens [1, s], and make room for this many more."""

    def start(self, room: int) -> None:
        """Empty the cache and make room for this many tokens."""

    def feed(self, tokens: Tensor) -> float | None:
        """Append tokens [1, s] and compute at least the logits of the last one.

        Return the seconds by the side's own clock, or None if it has none.
        """

    def bytes_per_token(self) -> float | None:
        """Return the bytes of a token in the cache's storage; None where the storage is hidden."""


class Ours:
    """Model of dsmini that decodes, with weights and a cache in the dtype of the model or in FP8."""

    def __init__(self, model: Transformer, cache_dtype: CacheDtype | None = None) -> None:
        self.model = model
        self.cache_dtype: CacheDtype | None = cache_dtype
        self.decoder = Decoder(model)

    def fill(self, tokens: Tensor, room: int) -> None:
        # random rows: a CPU without BF16 units would take minutes to read a prompt in BF16
        self.cache = random_cache(self.model, 1, tokens.shape[1], room, self.cache_dtype)

    def start(self, room: int) -> None:
        self.cache = self.model.new_cache(1, room, self.cache_dtype)

    def feed(self, tokens: Tensor) -> None:
        self.decoder.logits(tokens, self.cache)

    def bytes_per_token(self) -> float:
        return self.cache.nbytes_per_token


def deepseek_v3(config: ModelConfig) -> Any:
    """Return transformers' DeepseekV3ForCausalLM of this shape, with random weights and SDPA attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields: dict[str, Any] = config_to_json(dataclasses.asdict(config)) | {"attn_implementation": "sdpa"}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields))


class Theirs:
    """Model of transformers with random weights."""

    def __init__(self, config: ModelConfig, setting: Setting) -> None:
        torch.manual_seed(0)
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

    def bytes_per_token(self) -> float:
        layers: list[Any] = list(self.cache.layers)
        held = [t for layer in layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in held) / held[0].shape[-2]
