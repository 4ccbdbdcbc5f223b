"""Tiny model and invented machine for the tests of measurements."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.question import Setting
from benchmarks.questions.pipeline import PARTS, RANKS, Row, Step
from dsmini import ModelConfig
from dsmini.measure.kernels import TORCH
from dsmini.measure.rates import Curve, Roofs
from dsmini.measure.step_rates import OTHERS, SHAPES, Rates, StepRates

SIZES: dict[str, Any] = dict(dim=128, inter_dim=144, moe_inter_dim=64, n_layers=2, n_heads=2, q_lora_rank=64)
SIZES |= dict(kv_lora_rank=64, n_routed_experts=8, n_activated_experts=2, n_mtp_layers=0, max_seq_len=128)
TINY = ModelConfig(**SIZES)


def made_up_roofs(point: Curve, product: Curve, cold: float = 1.0, **given: Any) -> Roofs:
    """Return a machine with one curve for all operations that move bytes and one for all products.

    Args:
        cold: factor by which operations from memory are slower.
        given: other fields of Roofs.
    """

    def slower(curve: Curve, by: float) -> Curve:
        return Curve(sizes=curve.sizes, costs=[cost * by for cost in curve.costs])

    curves = {
        f"{where} {kind} {dtype}": slower(product, 1 / by) if TORCH[kind].is_product else slower(point, by)
        for where, by in (("warm", 1.0), ("cold", cold))
        for kind in TORCH
        for dtype in ("float32", "bfloat16")
    }
    usual = dict(card={}, peak={"float32": 1e11, "bfloat16": 3e11}, bandwidth=2e10, copy=2e10, call=1e-6)
    return Roofs(**{**usual, "cache_bytes": 1 << 20, "probes": {}, "curves": curves, **given})


def plain_roofs(kernels: Mapping[str, float] | None = None, **given: Any) -> Roofs:
    """Return a machine that moves a byte in 1 ns and multiplies at 1 GFLOP/s.

    Args:
        kernels: FLOP/s of kernels in FP32, by their curve.
        given: other fields of Roofs.
    """
    point, product = Curve(sizes=(1.0, 1e9), costs=(1e-9, 1.0)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e9))
    usual = {"peak": {"float32": 1e9, "bfloat16": 1e9}, "bandwidth": 1e9, "copy": 1e9}
    roofs = made_up_roofs(point, product, **{**usual, **given})
    own = {
        f"{where} kernel {kind} float32": Curve(sizes=(1.0, 1e5), costs=(rate, rate))
        for where in ("warm", "cold")
        for kind, rate in (kernels or {}).items()
    }
    return dataclasses.replace(roofs, curves={**roofs.curves, **own})


def usual_roofs(**given: Any) -> Roofs:
    """Return a machine whose products reach 100 GFLOP/s with many rows."""
    point, product = Curve(sizes=(1.0, 1e9), costs=(1e-6, 0.1)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e11))
    return made_up_roofs(point, product, **{"cache_bytes": 32 << 20, **given})


def invented_rates(process: int = 300 << 20) -> Rates:
    """Return invented rates of a machine where an operation takes as long in a step as alone."""
    each = StepRates(factors={OTHERS: 1.0}, call=1e-6)
    names = [f"{work} {dtype}" for work in SHAPES for dtype in ("float32", "bfloat16", "fp8")]
    roofs = usual_roofs(card={"processor": "A processor"})
    return Rates(roofs=roofs, steps=dict.fromkeys(names, each), process=process)


def setting(**given: Any) -> Setting:
    """Return a quick setting on an invented machine, with these fields of Roofs."""
    roofs = usual_roofs(**given)
    return Setting(quick=True, device=torch.device("cpu"), dtype=torch.bfloat16, roofs=roofs, text=Path("book.txt"))


def invented_steps(steps: int = 3) -> list[Step]:
    """Return steps in which each rank does nothing in a ninth of the time: F takes 1, and B twice as long."""
    found: list[Step] = []
    for n in range(steps):
        long = 1.0 + 0.01 * n
        rows = [
            Row(rank, kind, rank, i, 9 + long * (rank + 3 * i + at), 9 + long * (rank + 3 * i + end))
            for rank in range(RANKS)
            for i in range(PARTS)
            for kind, at, end in (("F", 0, 1), ("B", 1, 3))
        ]
        found.append(Step(30.0 * long, rows))
    return found
