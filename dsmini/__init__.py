"""dsmini: the DeepSeek architecture in plain PyTorch, small enough to read in an evening."""

from dsmini import accounting, nn
from dsmini.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dsmini.generation import generate
from dsmini.nn import MLA, MTP, Attention, Block, Experts, FeedForward, Gate, Linear, MoE, RMSNorm, Transformer

__all__ = [
    "MLA",
    "MTP",
    "Attention",
    "Block",
    "DataConfig",
    "Experts",
    "FeedForward",
    "Gate",
    "Linear",
    "MoE",
    "ModelConfig",
    "RMSNorm",
    "RunConfig",
    "TrainConfig",
    "Transformer",
    "accounting",
    "generate",
    "nn",
]
