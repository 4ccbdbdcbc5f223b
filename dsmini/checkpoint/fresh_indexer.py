"""A dense model as the start of a sparse one: DeepSeek-V3 becomes V3.2 with indexers that have learnt nothing yet."""

import dataclasses

import torch

from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.nn import DSA, MLA, Indexer, Transformer


def add_indexers(
    model: Transformer,
    *,
    n_heads: int | None = None,
    head_dim: int | None = None,
    topk: int | None = None,
    seed: int = 0,
) -> None:
    """Give every attention layer of a model, those of multi-token prediction too, a random indexer, in place.

    All other weights stay as they are, codes of FP8 included. With no more than topk tokens the model answers as
    before; with more it picks at random until its indexers are trained.

    Args:
        n_heads, head_dim, topk: index_n_heads, index_head_dim and index_topk of the model; None: as `fresh_sizes` says.

    Raises: ValueError for a model whose attention is not plain MLA, and sizes that ModelConfig refuses.
    """
    old = model.config
    require(
        old.attention == "mla" and all(type(part) is MLA for part in _attentions(model)),
        f"an indexer belongs to MLA, and this model has attention='{old.attention}'; use a model of DeepSeek-V3",
    )
    given = {"index_n_heads": n_heads, "index_head_dim": head_dim, "index_topk": topk}
    sizes = fresh_sizes(old) | {name: size for name, size in given.items() if size is not None}
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


def fresh_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of an indexer for a model. For V3 they are V3.2's own.

    It has half of attention's heads, each as wide as one without its rotary part or the next power of two, and picks a
    quarter of the context, 2,048 keys at most.
    """
    width = max(config.qk_nope_head_dim, config.qk_rope_head_dim)
    return {
        "index_n_heads": max(1, config.n_heads // 2),
        "index_head_dim": 1 << (width - 1).bit_length(),
        "index_topk": max(1, min(2048, config.max_seq_len // 4)),
    }


def _attentions(model: Transformer) -> list[MLA]:
    return [part for part in model.modules() if isinstance(part, MLA)]
