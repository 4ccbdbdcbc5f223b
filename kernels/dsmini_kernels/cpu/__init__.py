"""Kernels in C++ for tensors in main memory, compiled on first use. Each module has those of its operations."""

from typing import TYPE_CHECKING, Any

from dsmini_kernels import Unserved as Unserved
from dsmini_kernels.cpu import muon, norms, panels, steps, streams, tiles, topk
from dsmini_kernels.cpu.build import FUNCTIONS, BuildError, library
from dsmini_kernels.cpu.calls import without_running as without_running

OPERATIONS = {
    **dict.fromkeys(("quantize", "dequantize", "quantize_dequantize"), "tiles"),
    **dict.fromkeys(("linear", "quantized_linear"), "linear"),
    **dict.fromkeys(("experts", "quantized_experts"), "experts"),
    **dict.fromkeys(("trained_experts", "trained_experts_gradients"), "trained_experts"),
    **dict.fromkeys(("trained_norm", "trained_norm_gradients"), "trained_norm"),
    **dict.fromkeys(("causal_attention", "cached_attention"), "heads_attention"),
    **dict.fromkeys(("trained_attention", "trained_attention_gradients"), "heads_attention"),
    **{"attention_step": "attention", "feed_forward_step": "feed_forward", "blocks_step": "blocks"},
    **{"normed": "norms", "muon_update": "muon"},
    **dict.fromkeys(("read_streams", "read_streams_gradients"), "streams"),
    **dict.fromkeys(("write_streams", "write_streams_gradients"), "streams"),
    **dict.fromkeys(("sinkhorn", "sinkhorn_gradients"), "sinkhorn"),
    **{"topk_keys": "topk_keys", "topk_attention": "topk_attention", "entry_attention": "entry_attention"},
}
"""Operations, and the function of a library that runs each."""
for module in (muon, norms, panels, steps, streams, tiles, topk):
    globals().update((name, kernel) for name, kernel in vars(module).items() if name in OPERATIONS)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


def why_not(operation: str | None = None) -> str | None:
    """Compile and load the library that has an operation; return in one sentence why that failed, or None.

    Args:
        operation: left out, one that is loaded or expected serves, so that nothing is compiled for the question alone.

    Raises: ValueError if DSMINI_CPU_ISA is unknown or names instructions that this CPU lacks.
    """
    if operation:
        return _why_not(OPERATIONS[operation])
    loaded = library()
    return _why_not(FUNCTIONS[next(iter((*loaded.paths, *loaded.expected, "rounding")))][0])


def _why_not(function: str) -> str | None:
    try:
        library().entry(function)
    except BuildError as error:
        return str(error)
    return None


def expected() -> bool:
    """Return True: users of this backend want to know that it is missing."""
    return True


def describe() -> str:
    """Return the instruction set, the threads and the paths of the libraries in use."""
    loaded = library()
    large = "torch's threads" if loaded.parallel else "one thread, as torch has no GOMP_parallel here"
    paths = ", ".join(map(str, loaded.paths.values()))
    return f"{loaded.isa}, many rows on {large}, decoding steps on threads of their own, built as {paths}"


def prepare() -> dict[str, str | None]:
    """Compile and load all libraries; return for each why that failed, or None."""
    library().expect(OPERATIONS.values())
    return {part: _why_not(names[0]) for part, names in FUNCTIONS.items()}


def expect(*operations: str) -> None:
    """Say which operations this process will want, so that one run of the compiler makes them all."""
    library().expect(OPERATIONS[name] for name in operations)
