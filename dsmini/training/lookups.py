"""The tables and ids that a model looks up by tokens, made of the text and the tokenizer that it is trained on."""

from collections.abc import Callable
from typing import Any

import torch

from dsmini.config import RunConfig
from dsmini.config.fields import require
from dsmini.data.corpus import Corpus
from dsmini.nn import Transformer
from dsmini.nn.engram import Engram
from dsmini.nn.gate import make_tables
from dsmini.text.tokenizer import compressed_ids, load_tokenizer


def make_lookups(
    model: Transformer,
    config: RunConfig,
    corpus: Corpus,
    *,
    trained: bool = False,
    first: Callable[[Callable[[], Any]], Any] = lambda make: make(),
) -> None:
    """Make tables of hash layers of the text's token counts, and Engram's compressed ids of the tokenizer.

    Args:
        trained: the model has weights, and with them its lookups.
        first: has one process of several do something for all.

    Raises: ValueError for a trained Engram of another tokenizer.
    """
    c = model.config
    if c.n_hash_layers and not trained:  # to count tokens is to read the whole text
        make_tables(model.gates(), first(lambda: torch.from_numpy(corpus.token_counts(c.vocab_size))))
    if c.engram_layer_ids is None:
        return
    ids = first(lambda: torch.from_numpy(compressed_ids(load_tokenizer(config.data.tokenizer), c.vocab_size)))
    for engram in (module for module in model.modules() if isinstance(module, Engram)):
        if not trained:
            engram.make_hash(ids)
        require(
            torch.equal(engram.compressed.cpu(), ids),
            f"the weights have tables of n-grams of another tokenizer than {config.data.tokenizer or 'bytes'}; use the "
            "one they were trained with, which lies next to them",
        )
