"""Faster versions of the model's operations, in plain PyTorch. They are registered under the operations' names.

Nothing imports these modules but `ops.load_eager`, and without this package everything runs, slower.
"""

from dsmini.functional import attention, cross_entropy, experts, rms_norm, sparse_attention

__all__ = ["attention", "cross_entropy", "experts", "rms_norm", "sparse_attention"]
