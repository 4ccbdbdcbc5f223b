"""Operations on tiles as Triton kernels, for tensors on a GPU. Inside this package `import triton` means Triton itself.

With TRITON_INTERPRET=1 set before Triton's first import, its interpreter runs the same kernels, slowly, and on tensors
in main memory too. The tests use it where there is no GPU.
"""

import functools
import importlib.metadata
import importlib.util

import torch

from dsmini_kernels import Unserved as Unserved

OPERATIONS = ("quantize", "dequantize", "quantize_dequantize")
_FOUND = importlib.util.find_spec("triton") is not None

if _FOUND:
    from dsmini_kernels.triton.tiles import dequantize as dequantize
    from dsmini_kernels.triton.tiles import quantize as quantize
    from dsmini_kernels.triton.tiles import quantize_dequantize as quantize_dequantize


def why_not(operation: str = "") -> str | None:
    """Return in one sentence why these kernels cannot run; None if they can, which all do then."""
    if not _FOUND:
        return "Triton is not installed; pip install triton"
    from dsmini_kernels.triton import tiles

    if tiles.halfway():
        return "TRITON_INTERPRET=1 was set after Triton's first import; set it before Python starts"
    if not tiles.interpreting() and not torch.cuda.is_available():
        return "Triton needs a GPU that torch can use, or TRITON_INTERPRET=1 in the environment from the start"
    return None if tiles.interpreting() else _why_no_launch()


@functools.cache
def _why_no_launch() -> str | None:
    """Return in one sentence why no kernel runs on this GPU; None if one does.

    Triton compiles a part of each kernel with the system's C compiler, which many containers lack, and knows no GPUs
    older than its own release supports. It says so in the first launch.
    """
    try:
        with torch._C._DisableTorchDispatch():  # no counter counts it
            _launch_one()
    except Exception as error:  # of the compiler, of the driver, or of a missing file
        words = (str(error).splitlines() or ["no message"])[0]
        return f"Triton cannot run a kernel on this GPU: {type(error).__name__}: {words}"
    return None


def _launch_one() -> None:
    from dsmini_kernels.triton import tiles

    tiles.dequantize(torch.zeros(1, 1, dtype=torch.uint8, device="cuda"), torch.ones(1, 1, device="cuda"), (1, 1))


def prepare() -> dict[str, str | None]:
    """Return nothing: Triton compiles a kernel for the shapes of its first call."""
    return {}


def expect(*operations: str) -> None:
    """Do nothing, for the same reason."""


def expected() -> bool:
    """Return True if a user of this machine wants to know that these kernels are missing."""
    return torch.cuda.is_available()


def describe() -> str:
    """Return Triton's version, and the GPU or the interpreter that runs the kernels."""
    from dsmini_kernels.triton import tiles

    where = "interpreted" if tiles.interpreting() else f"on {torch.cuda.get_device_name()}"
    return f"Triton {importlib.metadata.version('triton')}, {where}"
