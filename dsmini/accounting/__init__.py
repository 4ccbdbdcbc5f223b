"""Counts from a ModelConfig alone, no model is built: parameters, floating-point operations, bytes.

    parameters     parameters
    FLOPs          flops_per_token, decode_flops_per_token, step_flops
    bytes held     weight_bytes, gradient_bytes, optimizer_bytes, activation_bytes, training_bytes, cache_bytes,
                   kv_bytes_per_token, fixed_cache_bytes
    bytes moved    decode_bytes_per_token, prefill_bytes_per_token, training_bytes_per_token

Each is exact, or a lower bound that says so: what must be held or moved. dsmini.measure counts what was.
All of them are sums over one list, `tensors.tensors`, which says of every tensor what shape it has and what a token
does with it.

    >>> v3 = ModelConfig.from_file("configs/deepseek-v3.toml")
    >>> parameters(v3).main
    671026404352
    >>> kv_bytes_per_token(v3)
    70272
"""

from dsmini.accounting.flops import Flops, decode_flops_per_token, flops_per_token, step_flops
from dsmini.accounting.memory import (
    activation_bytes,
    cache_bytes,
    fixed_cache_bytes,
    gradient_bytes,
    kv_bytes_per_token,
    mha_kv_bytes_per_token,
    mha_twin,
    optimizer_bytes,
    training_bytes,
    weight_bytes,
)
from dsmini.accounting.tensors import Bytes, Parameters, parameters
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
    "fixed_cache_bytes",
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
