"""dsmini: the DeepSeek architecture in plain PyTorch, small enough to read in an evening."""

from dsmini import accounting, nn, numerics, ops
from dsmini.checkpoint.export import save_pretrained
from dsmini.checkpoint.pretrained import load_pretrained
from dsmini.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dsmini.inference import generate
from dsmini.nn import MLA, MTP, Attention, Block, Experts, FeedForward, Gate, Linear, MoE, RMSNorm, Transformer
from dsmini.numerics import Accumulator, QuantizedTensor, fp8_matmul, quantize

__version__ = "0.1.0"
__all__ = [
    "MLA",
    "MTP",
    "Accumulator",
    "Attention",
    "Block",
    "DataConfig",
    "Experts",
    "FeedForward",
    "Gate",
    "Linear",
    "MoE",
    "ModelConfig",
    "QuantizedTensor",
    "RMSNorm",
    "RunConfig",
    "TrainConfig",
    "Transformer",
    "__version__",
    "accounting",
    "fp8_matmul",
    "generate",
    "load_pretrained",
    "nn",
    "numerics",
    "ops",
    "quantize",
    "save_pretrained",
]
