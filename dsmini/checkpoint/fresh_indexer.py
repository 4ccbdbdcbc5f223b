"""A dense model as the start of a sparse one: DeepSeek-V3 becomes V3.2 with indexers that have learnt nothing yet."""

import dataclasses

import torch

from dsmini.config.fields import require
from dsmini.nn import DSA, MLA, Indexer, Transformer


def add_indexers(
    model: Transformer, *, n_heads: int = 64, head_dim: int = 128, topk: int = 2048, seed: int = 0
) -> None:
    """Give every attention layer of a model, those of multi-token prediction too, a random indexer, in place.

    All other weights stay as they are, codes of FP8 included. With no more than topk tokens the model answers as
    before; with more it picks at random until its indexers are trained.

    Args:
        n_heads, head_dim, topk: index_n_heads, index_head_dim and index_topk of the model; left out: V3.2's.

    Raises: ValueError for a model whose attention is not plain MLA, and sizes that ModelConfig refuses.
    """
    old = model.config
    require(
        old.attention == "mla" and all(type(part) is MLA for part in _attentions(model)),
        f"an indexer belongs to MLA, and this model has attention='{old.attention}'; use a model of DeepSeek-V3",
    )
    sizes = {"index_n_heads": n_heads, "index_head_dim": head_dim, "index_topk": topk}
    model.config = dataclasses.replace(old, attention="dsa", **sizes)
    generator = torch.Generator().manual_seed(seed)
    dtype = model.embed.weight.dtype
    for attention in _attentions(model):
        indexer = Indexer(model.config)
        for part in indexer.children():
            part.reset_parameters(generator)  # pyright: ignore[reportCallIssue]
        plain: object = attention
        plain.__class__ = DSA  # in place, so that no weight is copied
        attention.indexer = indexer.to(device=model.device, dtype=dtype).train(attention.training)


def _attentions(model: Transformer) -> list[MLA]:
    return [part for part in model.modules() if isinstance(part, MLA)]
