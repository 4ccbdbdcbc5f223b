"""A model that is small enough for the tests of what measures, and a machine that is made up."""

import dataclasses
from collections.abc import Mapping

from dsmini import ModelConfig
from dsmini.measure.kinds import POINTS, PRODUCTS
from dsmini.measure.rates import Curve, Roofs

TINY = ModelConfig(
    dim=128,
    inter_dim=144,
    moe_inter_dim=64,
    n_layers=2,
    n_heads=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    n_routed_experts=8,
    n_activated_experts=2,
    n_mtp_layers=0,
    max_seq_len=128,
)


def made_up_roofs(point: Curve, product: Curve, cold: float = 1.0, **given: object) -> Roofs:
    """Return a machine with one curve for all that moves bytes and one for all products.

    Args:
        cold: factor by which everything is slower from memory.
        given: fields of Roofs that differ.
    """
    curves: Mapping[str, Curve] = {
        f"{where} {kind} {dtype}": _slower(product, 1 / by) if kind in PRODUCTS else _slower(point, by)
        for where, by in (("warm", 1.0), ("cold", cold))
        for kind in (*POINTS, *PRODUCTS)
        for dtype in ("float32", "bfloat16")
    }
    peak = {"float32": 1e11, "bfloat16": 3e11}
    roofs = Roofs(
        card={}, peak=peak, bandwidth=2e10, copy=2e10, call=1e-6, cache_bytes=1 << 20, probes={}, curves=curves
    )
    return dataclasses.replace(roofs, **given)  # pyright: ignore[reportArgumentType]


def _slower(curve: Curve, by: float) -> Curve:
    return Curve(sizes=curve.sizes, costs=[cost * by for cost in curve.costs])
