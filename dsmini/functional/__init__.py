"""Faster versions of the model's operations, in plain PyTorch. They are registered under the operations' names.

The model, training and generation run without this package, slower. No other package looks into it.
"""

from dsmini.functional import attention, cross_entropy, experts, layers, sparse_attention, streams

__all__ = ["attention", "cross_entropy", "experts", "layers", "sparse_attention", "streams"]
