"""Variants of a model that decode the same tokens with other attention, other feed-forwards, or other weights.

A variant shares every module with its model but those that differ, so that it takes little memory, and the model stays
as it is.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from dsmini.accounting.kv_cache import mha_twin
from dsmini.diagnosis.interventions.algorithm import uniformly
from dsmini.nn import Block, FeedForward, MoE, Rope, Transformer
from dsmini.nn.attention import Attention
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.mtp import MTPChain

M = TypeVar("M", bound=nn.Module)


def shallow(module: M) -> M:
    """Return a copy that shares parameters and inner modules, of which each may be replaced."""
    made = copy.copy(module)
    for part in ("_modules", "_parameters", "_buffers"):
        made.__dict__[part] = dict(module.__dict__[part])
    return made


def with_blocks(model: Transformer, change: Callable[[Block], None]) -> Transformer:
    """Return a variant of which `change` gets a copy of each block, to put other modules into."""
    variant, blocks = shallow(model), [shallow(block) for block in model.layers if isinstance(block, Block)]
    for block in blocks:
        change(block)
    variant.layers = nn.ModuleList(blocks)
    return variant


def with_mha(model: Transformer) -> Transformer:
    """Return a variant with multi-head attention of as many heads and the same widths, and random weights in it."""
    config, like = mha_twin(model.config), model.embed.weight

    def change(block: Block) -> None:
        block.attn = Attention(config).to(like.device, like.dtype)

    variant = with_blocks(model, change)
    variant.config, variant.rope = config, Rope.from_config(config)
    return variant


def with_dense(model: Transformer) -> Transformer:
    """Return a variant with a dense feed-forward for each mixture of experts, with as many active parameters."""
    c, like = model.config, model.embed.weight
    width = (c.n_activated_experts + c.n_shared_experts) * c.moe_inter_dim

    def change(block: Block) -> None:
        if isinstance(block.ffn, MoE):
            block.ffn = FeedForward(c, inter_dim=width).to(like.device, like.dtype)

    return with_blocks(model, change)


def with_uniform_routing(model: Transformer) -> Transformer:
    """Return a variant whose tokens visit all experts in turn."""

    def change(block: Block) -> None:
        if isinstance(block.ffn, MoE):
            block.ffn = shallow(block.ffn)
            gate = block.ffn.gate = shallow(block.ffn.gate)
            gate.forward = partial(uniformly, gate, gate.forward)

    return with_blocks(model, change)


def with_weights_in(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Return a variant whose matrices are held, and multiplied, in a dtype; without multi-token prediction."""
    variant = shallow(model)
    for name in ("embed", "layers", "norm", "head"):
        setattr(variant, name, copy.deepcopy(getattr(model, name)).to(dtype))
    variant.mtp = MTPChain(replace(model.config, n_mtp_layers=0), Block)
    variant.compute_dtype = dtype
    return variant


def with_fp8_weights(model: Transformer) -> Transformer:
    """Return a variant whose matrices in the blocks are held as E4M3 codes with scales, and the rest in BF16."""
    return hold_all_fp8(with_weights_in(model, torch.bfloat16))
