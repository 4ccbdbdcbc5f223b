"""The model: the layers of the papers, one idea per file, with its equation.

Each works alone, from a ModelConfig or from plain arguments. They import config, numerics and ops alone; functional
and the kernels have faster versions of some functions.
"""

import importlib.util

from dsmini.nn.attention import Attention, Context, cached_attention, causal_attention
from dsmini.nn.block import Aux, Block
from dsmini.nn.cache import Cache, LayerCache
from dsmini.nn.compressed_attention import CompressedAttention
from dsmini.nn.dsa import DSA, Indexer, IndexerLoss, dsa_layers
from dsmini.nn.fp8 import FP8Experts, FP8Linear, QuantizedExperts, QuantizedLinear
from dsmini.nn.gate import Gate, Routing, max_violation, route, sequence_balance_loss
from dsmini.nn.layers import Embedding, Linear, Projection, RMSNorm
from dsmini.nn.mla import MLA
from dsmini.nn.moe import Experts, FeedForward, MoE
from dsmini.nn.mtp import MTP
from dsmini.nn.rope import Rope, apply_rope
from dsmini.nn.transformer import Losses, Output, Transformer, linear_cross_entropy

__all__ = [
    "DSA",
    "MLA",
    "MTP",
    "Attention",
    "Aux",
    "Block",
    "Cache",
    "CompressedAttention",
    "Context",
    "Embedding",
    "Experts",
    "FP8Experts",
    "FP8Linear",
    "FeedForward",
    "Gate",
    "Indexer",
    "IndexerLoss",
    "LayerCache",
    "Linear",
    "Losses",
    "MoE",
    "Output",
    "Projection",
    "QuantizedExperts",
    "QuantizedLinear",
    "RMSNorm",
    "Rope",
    "Routing",
    "Transformer",
    "apply_rope",
    "cached_attention",
    "causal_attention",
    "dsa_layers",
    "linear_cross_entropy",
    "max_violation",
    "route",
    "sequence_balance_loss",
]

if importlib.util.find_spec("dsmini.functional") is not None:  # faster versions; the model runs without them
    import dsmini.functional  # noqa: F401
