"""Models of one shape with a common interface, ours and others', so that they can take turns."""

import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.case import Setting
from benchmarks.peer_models.llamacpp_model import write_gguf
from dsmini import ModelConfig, Transformer
from dsmini.config.huggingface import config_to_json
from dsmini.inference.decoding import Decoder
from dsmini.measure.workloads import random_model


class Side(Protocol):
    """Model that reads tokens into a cache."""

    def start(self, room: int) -> None:
        """Empty the cache and make room for this many tokens."""

    def feed(self, tokens: Tensor) -> None:
        """Append tokens [1, s] and compute at least the logits of the last one."""

    def bytes_per_token(self) -> float | None:
        """Return the bytes of a token in the cache's storage; None where the storage is hidden."""


class Ours:
    """Model of dsmini with random weights."""

    def __init__(self, config: ModelConfig, setting: Setting) -> None:
        self.model = random_model(config, setting.device, setting.dtype)
        self.decoder = Decoder(self.model)

    def start(self, room: int) -> None:
        self.cache = self.model.new_cache(1, room)

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


class LlamaCpp:
    """Model of llama.cpp with our weights."""

    def __init__(self, model: Transformer, room: int, at_once: int) -> None:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, "BF16" if model.embed.weight.dtype == torch.bfloat16 else "F32")
            sizes = {"n_ctx": room, "n_batch": at_once, "n_threads": threads, "n_threads_batch": threads}
            self.llama = Llama(str(path), **sizes, use_mmap=False, verbose=False)

    def start(self, room: int) -> None:
        self.llama.reset()

    def feed(self, tokens: Tensor) -> None:
        self.llama.eval(tokens[0].tolist())

    def bytes_per_token(self) -> None:
        return None
