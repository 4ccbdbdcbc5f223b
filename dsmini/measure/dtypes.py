"""Dtypes that this machine multiplies fast enough to be worth using.

Many CPUs have no BF16 units (AVX2 without AVX-512 or AMX). torch's BF16 matrix product is a plain loop there:
0.3 GFLOP/s where FP32 reaches 170. A step that takes a second in FP32 takes ten minutes in BF16, so whoever forces BF16
asks first.
"""

from collections.abc import Mapping

import torch

from dsmini.measure.machine import DTYPES, matmul_rate

LEAST_SHARE = 0.1
"""Share of FP32's rate that a usable dtype reaches. Below it a case takes more than ten times its estimate."""


def product_rates(device: torch.device) -> dict[str, float]:
    """Measure the FLOP/s of a matrix product in each dtype, by its name, in about 0.2 s.

    A dtype that the device does not multiply at all has 0.
    """
    rates: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        try:
            rates[name] = matmul_rate(device, dtype)
        except RuntimeError:
            rates[name] = 0.0
    return rates


def why_unusable(dtype: torch.dtype, rates: Mapping[str, float]) -> str | None:
    """Return why a dtype is too slow here to be used, in words, or None if it is not.

    Args:
        rates: FLOP/s of a large product by dtype: product_rates, or the peak of this machine's kept Roofs.
    """
    name = str(dtype).removeprefix("torch.")
    here, plain = rates.get(name), rates.get("float32")
    if here is None or plain is None or here >= LEAST_SHARE * plain:
        return None
    return f"{name} products run at {here / 1e9:.3g} GFLOP/s here, float32 at {plain / 1e9:.3g}"


def usable_dtypes(device: torch.device) -> list[torch.dtype]:
    """Measure which dtypes this machine multiplies at a tenth of FP32's rate or faster."""
    rates = product_rates(device)
    return [dtype for dtype in DTYPES.values() if why_unusable(dtype, rates) is None]
