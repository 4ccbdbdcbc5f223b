"""Dtypes that this machine multiplies fast enough to be worth using.

Many CPUs have no BF16 units (AVX2 without AVX-512 or AMX). torch's BF16 matrix product is a plain loop there:
0.3 GFLOP/s where FP32 reaches 170. A step that takes a second in FP32 takes ten minutes in BF16, so whoever forces BF16
asks first.
"""

from collections.abc import Mapping

import torch

LEAST_SHARE = 0.2
"""Share of FP32's rate that a usable dtype reaches."""


def why_unusable(dtype: torch.dtype, rates: Mapping[str, float]) -> str | None:
    """Return why a dtype is too slow here to be used, in words, or None if it is not.

    Args:
        rates: FLOP/s of a large product by name of the dtype, such as Roofs.peak. One that is missing is not judged.
    """
    name = str(dtype).removeprefix("torch.")
    here, plain = rates.get(name), rates.get("float32")
    if here is None or plain is None or here >= LEAST_SHARE * plain:
        return None
    return f"{name} products run at {here / 1e9:.3g} GFLOP/s here, float32 at {plain / 1e9:.3g}"
