"""Tiny model and invented machine for the tests of measurements."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.question import Setting
from dsmini import ModelConfig
from dsmini.measure.calls import Call
from dsmini.measure.price import Prices
from dsmini.measure.roofs import Roofs
from dsmini.measure.workloads import StepShape

SIZES: dict[str, Any] = dict(dim=128, inter_dim=144, moe_inter_dim=64, n_layers=2, n_heads=2, q_lora_rank=64)
SIZES |= dict(kv_lora_rank=64, n_routed_experts=8, n_activated_experts=2, n_mtp_layers=0, max_seq_len=128)
TINY = ModelConfig(**SIZES)


def invented_roofs(**given: Any) -> Roofs:
    """Return a machine whose products reach 100 GFLOP/s in FP32 and 300 in BF16. Args: other fields of Roofs."""
    usual = dict(card={"processor": "A processor"}, peak={"float32": 1e11, "bfloat16": 3e11}, bandwidth=2e10, copy=2e10)
    return Roofs(**{**usual, "cache_bytes": 32 << 20, "probes": {}, **given})


class InventedPrices(Prices):
    """A machine that takes 1 ns for a byte from memory, and multiplies at 1 GFLOP/s, in BF16 2; a call takes 1 us."""

    def __init__(self, **given: Any) -> None:
        super().__init__(roofs=invented_roofs(**given))

    def alone(self, call: Call) -> float:
        return 1e-9 * call.cold + call.flops / (2e9 if b"bfloat16" in call.arguments else 1e9)

    def between(self, shape: StepShape) -> float:
        return 1e-6


def setting(**given: Any) -> Setting:
    """Return a quick setting on an invented machine, with these fields of Roofs."""
    prices, usual = InventedPrices(**given), {"quick": True, "device": torch.device("cpu"), "dtype": torch.bfloat16}
    return Setting(**usual, roofs=prices.roofs, prices=prices, text=Path("book.txt"))
