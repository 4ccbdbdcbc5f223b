"""Weights of a published or converted folder as the start of a training run."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsmini.checkpoint.pretrained import read_pretrained
from dsmini.config import ModelConfig
from dsmini.reading import is_there, read_text
from dsmini.text.tokenizer import byte_tokenizer_json


class InitialWeights(NamedTuple):
    """The start of a training run from a DeepSeek or Hugging Face folder."""

    config: ModelConfig
    """Config of the model, without multi-token prediction blocks that the folder does not hold."""
    tensors: dict[str, Tensor]
    """State dict of Transformer(config) in FP32; FP8 weights are dequantized."""
    tokenizer: Path | None
    """The folder's tokenizer.json; None if it has none, or that of bytes, which dsmini.convert writes."""


def read_initial_weights(folder: Path) -> InitialWeights:
    """Read the weights of a folder that training may start from.

    Raises: ValueError for a folder that load_pretrained refuses, and for one that does not fit into memory in FP32.
    """
    model = read_pretrained(folder, torch.float32, "dequantize")
    tokenizer = folder / "tokenizer.json"
    own = is_there(tokenizer) and read_text(tokenizer) != byte_tokenizer_json()
    return InitialWeights(model.config, model.state_dict(), tokenizer if own else None)
