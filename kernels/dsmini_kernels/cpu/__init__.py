"""Kernels in C++ for tensors in main memory, compiled on first use."""

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.build import BuildError, library
from dsmini_kernels.cpu.calls import without_running
from dsmini_kernels.cpu.muon import muon_update
from dsmini_kernels.cpu.norms import normed
from dsmini_kernels.cpu.panels import experts, quantized_experts, trained_experts, trained_experts_gradients
from dsmini_kernels.cpu.steps import (
    attention_step,
    blocks_step,
    feed_forward_step,
    grouped_attention_step,
    linear,
    quantized_linear,
)
from dsmini_kernels.cpu.tiles import dequantize, quantize, quantize_dequantize
from dsmini_kernels.cpu.topk import topk_attention, topk_keys

OPERATIONS = (
    *("quantize", "dequantize", "quantize_dequantize"),
    *("linear", "quantized_linear", "normed"),
    *("attention_step", "grouped_attention_step", "feed_forward_step", "blocks_step"),
    *("experts", "quantized_experts", "trained_experts", "trained_experts_gradients", "muon_update"),
    *("topk_keys", "topk_attention"),
)
__all__ = [
    "OPERATIONS",
    "Unserved",
    "attention_step",
    "blocks_step",
    "dequantize",
    "describe",
    "expected",
    "experts",
    "feed_forward_step",
    "grouped_attention_step",
    "linear",
    "muon_update",
    "normed",
    "quantize",
    "quantize_dequantize",
    "quantized_experts",
    "quantized_linear",
    "topk_attention",
    "topk_keys",
    "trained_experts",
    "trained_experts_gradients",
    "why_not",
    "without_running",
]


def why_not() -> str | None:
    """Compile and load the library; return in one sentence why that failed, or None.

    Raises: ValueError if DSMINI_CPU_ISA is unknown or names instructions that this CPU lacks.
    """
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def expected() -> bool:
    """Return True: users of this backend want to know that it is missing."""
    return True


def describe() -> str:
    """Return the instruction set, the threads and the library's path."""
    loaded = library()
    tiles = "torch's own threads" if loaded.parallel else "one thread, as torch has no GOMP_parallel here"
    return f"{loaded.isa}, tiles and many rows on {tiles}, steps on a team of their own, {loaded.path}"
