"""Count parameters, FLOPs and bytes of every file in configs/, as plain numbers."""

from pathlib import Path
from typing import Any

import dsmini

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))


def counts(name: str) -> dict[str, Any]:
    """Return the counts of one config, without predictions of this implementation's overhead."""
    config, count = dsmini.ModelConfig.from_file(CONFIGS / f"{name}.toml"), dsmini.accounting
    parameters = count.parameters(config)
    context = min(4096, config.max_seq_len)
    forward = count.flops_per_token(config, context)
    training = count.flops_per_token(config, context, training=True)
    whole = count.flops_per_token(config, context, causal=False, training=True, mtp=False)
    found = {
        "parameters": {key: getattr(parameters, key) for key in ("total", "main", "mtp", "active", "buffers")},
        "parameters by module": dict(parameters.by_module),
        "active by module": dict(parameters.active_by_module),
        "flops": [forward.total, training.total, whole.total],
        "flops by module": dict(training.by_module),
        "kv bytes": [count.kv_bytes_per_token(config, size) for size in (1, 2, 4)],
        "decode bytes": [
            count.decode_bytes_per_token(config, context=at, batch=batch, dtype=dtype).total
            for at in (1, context)
            for batch in (1, 8)
            for dtype in ("bfloat16", "float32", "fp8")
        ],
    }
    if config.attention == "mla":  # "auto" takes the expanded or the absorbed form
        found["fp8 kv bytes"] = count.kv_bytes_per_token(config, dtype="fp8")
        found["fp8 cache decode bytes"] = count.decode_bytes_per_token(config, context=context, cache_dtype="fp8").total
    return found


def count_values() -> dict[str, Any]:
    """Return the counts of every config by name."""
    return {name: counts(name) for name in NAMES}
