"""The specification: the layers of the papers, one idea per file.

Each works alone, from a ModelConfig or from plain arguments. Fast code is in dsmini.functional and the kernels.
"""

from dsmini.functional.cached_attention import cached_attention
from dsmini.functional.causal_attention import causal_attention
from dsmini.functional.cross_entropy import linear_cross_entropy
from dsmini.functional.indexer_loss import IndexerFit
from dsmini.functional.rope import apply_rope
from dsmini.nn.attention import Attention
from dsmini.nn.balance import max_violation, sequence_balance_loss
from dsmini.nn.block import Block
from dsmini.nn.cache import Cache
from dsmini.nn.dsa import DSA, dsa_layers
from dsmini.nn.experts import Experts
from dsmini.nn.fp8 import FP8Experts, FP8Linear, QuantizedExperts, QuantizedLinear
from dsmini.nn.gate import Gate, Routing, route
from dsmini.nn.indexer import Indexer
from dsmini.nn.linear import Linear, Projection
from dsmini.nn.losses import Losses
from dsmini.nn.mla import MLA
from dsmini.nn.moe import FeedForward, MoE
from dsmini.nn.mtp import MTP
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope
from dsmini.nn.transformer import Embedding, Output, Transformer
from dsmini.numerics import grouped_linear

__all__ = [
    "DSA",
    "MLA",
    "MTP",
    "Attention",
    "Block",
    "Cache",
    "Embedding",
    "Experts",
    "FP8Experts",
    "FP8Linear",
    "FeedForward",
    "Gate",
    "Indexer",
    "IndexerFit",
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
    "grouped_linear",
    "linear_cross_entropy",
    "max_violation",
    "route",
    "sequence_balance_loss",
]
