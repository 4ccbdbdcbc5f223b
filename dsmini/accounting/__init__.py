"""Exact counts from a ModelConfig alone, no model is built: parameters, floating-point operations, bytes.

    how many          parameters
    how much work     flops_per_token, decode_flops_per_token; step_flops: what dsmini really multiplies
    bytes held        weight_bytes, gradient_bytes, optimizer_bytes, activation_bytes, training_bytes, cache_bytes
    bytes a token     kv_bytes_per_token (kept), decode_bytes_per_token, prefill_bytes_per_token,
                      training_bytes_per_token (moved)

All of them are sums over one list, `parts.parts`, which says of every tensor what shape it has and what a token does
with it.
"""

from dsmini.accounting.activations import activation_bytes, training_bytes
from dsmini.accounting.flops import decode_flops_per_token, step_flops
from dsmini.accounting.kv_cache import cache_bytes, kv_bytes_per_token, mha_kv_bytes_per_token, mha_twin
from dsmini.accounting.memory import gradient_bytes, optimizer_bytes, weight_bytes
from dsmini.accounting.parameters import Flops, Parameters, flops_per_token, parameters
from dsmini.accounting.table import Bytes
from dsmini.accounting.traffic import (
    Traffic,
    decode_bytes_per_token,
    expected_experts,
    prefill_bytes_per_token,
    training_bytes_per_token,
)

__all__ = [
    "Bytes",
    "Flops",
    "Parameters",
    "Traffic",
    "activation_bytes",
    "cache_bytes",
    "decode_bytes_per_token",
    "decode_flops_per_token",
    "expected_experts",
    "flops_per_token",
    "gradient_bytes",
    "kv_bytes_per_token",
    "mha_kv_bytes_per_token",
    "mha_twin",
    "optimizer_bytes",
    "parameters",
    "prefill_bytes_per_token",
    "step_flops",
    "training_bytes",
    "training_bytes_per_token",
    "weight_bytes",
]
