"""Weights of a published or converted folder as the start of a training run."""

from pathlib import Path
from typing import NamedTuple

from dsmini.checkpoint.pretrained import PretrainedTensors
from dsmini.reading import is_there, read_text
from dsmini.text.tokenizer import byte_tokenizer_json


class InitialWeights(NamedTuple):
    """The start of a training run from a DeepSeek or Hugging Face folder."""

    tensors: PretrainedTensors
    """Its model, of which nothing is read yet."""
    tokenizer: Path | None
    """The folder's tokenizer.json; None if it has none, or that of bytes, which dsmini.convert writes."""


def find_initial_weights(folder: Path) -> InitialWeights:
    """Find the weights of a folder that training may start from.

    Raises: ValueError for a folder that load_pretrained refuses.
    """
    tokenizer = folder / "tokenizer.json"
    own = is_there(tokenizer) and read_text(tokenizer) != byte_tokenizer_json()
    return InitialWeights(PretrainedTensors(folder), tokenizer if own else None)
