"""The layers, one idea a file. Each works alone, from a ModelConfig or from plain arguments."""

from dsmini.nn.attention import Attention, attend, causal_attention
from dsmini.nn.balance import max_violation, sequence_balance_loss
from dsmini.nn.block import Block
from dsmini.nn.cache import Cache
from dsmini.nn.gate import Gate, Routing, route
from dsmini.nn.linear import Linear
from dsmini.nn.losses import Losses, linear_cross_entropy
from dsmini.nn.mla import MLA
from dsmini.nn.moe import Experts, FeedForward, MoE
from dsmini.nn.mtp import MTP
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope, apply_rope
from dsmini.nn.transformer import Embedding, Output, Transformer
from dsmini.numerics import grouped_linear

__all__ = [
    "MLA",
    "MTP",
    "Attention",
    "Block",
    "Cache",
    "Embedding",
    "Experts",
    "FeedForward",
    "Gate",
    "Linear",
    "Losses",
    "MoE",
    "Output",
    "RMSNorm",
    "Rope",
    "Routing",
    "Transformer",
    "apply_rope",
    "attend",
    "causal_attention",
    "grouped_linear",
    "linear_cross_entropy",
    "max_violation",
    "route",
    "sequence_balance_loss",
]
