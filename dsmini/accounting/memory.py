"""Bytes that are held from step to step: weights, gradients, the optimizer's state."""

from collections.abc import Iterator
from typing import Literal

from dsmini.accounting.table import Bytes
from dsmini.accounting.tensors import SIZES, Dtype, Part, parts
from dsmini.config import ModelConfig

WeightDtype = Literal["float32", "bfloat16", "fp8"]
"""fp8: the matrices of attention and feed-forwards as E4M3 codes with an FP32 scale for each block of 128x128."""
Optimizer = Literal["adamw", "muon"]


def weight_bytes(config: ModelConfig, dtype: WeightDtype = "bfloat16", mtp: bool = True) -> Bytes:
    """Bytes of a model's parameters and routing biases as dsmini holds them. V3 without MTP in FP8: 673.3 GB.

    Norms, gates and routing biases are FP32 whatever dtype says. In FP8 the embedding, the head and MTP's projection
    are BF16, and the scales a part of their own; the released folders are smaller by the norms and gates, which they
    have in BF16.

    Args:
        mtp: with the multi-token prediction blocks.

    Source: the shapes and dtypes of the released checkpoints. Exact.
    """
    check_dtype(dtype, ("float32", "bfloat16", "fp8"))

    def amounts(part: Part) -> Iterator[tuple[str, int]]:
        yield part.module, part.parameters * held_size(part, dtype)
        yield "routing biases", 4 * part.buffers
        if dtype == "fp8" and part.form == "fp8":
            yield "scales", 4 * part.scales

    return Bytes.of(a for part in parts(config) if mtp or not part.module.startswith("mtp ") for a in amounts(part))


def gradient_bytes(config: ModelConfig) -> Bytes:
    """Bytes of the gradients: FP32, as the parameters of training are; a stack of experts has one whole."""
    return Bytes.of((part.module, 4 * part.parameters) for part in parts(config))


def optimizer_bytes(config: ModelConfig, optimizer: Optimizer = "adamw", moments: Dtype = "float32") -> Bytes:
    """Bytes that the optimizers remember of FP32 parameters after a step.

    AdamW: two moments of every parameter, and a count of steps, 4 bytes, of every tensor. Muon: one FP32 momentum of
    the matrices inside the blocks, MTP's projection among them; embedding, head, gates and norms are AdamW's then too.
    V3's two moments in BF16 are 4 bytes a parameter for 8 (report, section 3.3.3).

    Args:
        moments: of AdamW's.

    Exact; a step's own temporary tensors are not in it.
    """
    check_dtype(moments, ("float32", "bfloat16"))
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer={optimizer!r} is unknown; use adamw or muon")

    def amount(part: Part) -> int:
        if optimizer == "muon" and (part.form == "fp8" or part.name == "eh_proj"):
            return 4 * part.parameters
        return 2 * SIZES[moments] * part.parameters + (4 if part.parameters else 0)

    return Bytes.of((part.module, amount(part)) for part in parts(config))


def held_size(part: Part, dtype: WeightDtype) -> int:
    """Bytes of one of the part's numbers, scales apart."""
    if part.form == "fp32":
        return 4
    return {"float32": 4, "bfloat16": 2, "fp8": 1 if part.form == "fp8" else 2}[dtype]


def check_dtype(dtype: str, known: tuple[str, ...]) -> None:
    """Refuse others than the known."""
    if dtype not in known:
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")
