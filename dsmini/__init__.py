"""dsmini: the DeepSeek architecture in plain PyTorch, small enough to read in an evening.

Names are imported when they are first used: `import dsmini` and the --help of a command load no torch.
"""

import os
import sys
from importlib import import_module
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmini import accounting, nn, numerics, ops
    from dsmini.checkpoint.load import load_pretrained
    from dsmini.checkpoint.save import save_pretrained
    from dsmini.config import DataConfig, ModelConfig, RunConfig, TrainConfig
    from dsmini.inference import generate
    from dsmini.nn import (
        DSA,
        MLA,
        MTP,
        Attention,
        Block,
        Experts,
        FeedForward,
        Gate,
        Indexer,
        Linear,
        MoE,
        RMSNorm,
        Transformer,
    )
    from dsmini.numerics import QuantizedTensor, fp8_matmul, quantize
    from dsmini.ops import prepare

if sys.platform == "win32":
    raise ImportError("dsmini locks files as Linux and macOS do, and cannot run on Windows; use WSL")

__version__ = "0.2.0"
__all__ = [
    "DSA",
    "MLA",
    "MTP",
    "Attention",
    "Block",
    "DataConfig",
    "Experts",
    "FeedForward",
    "Gate",
    "Indexer",
    "Linear",
    "MoE",
    "ModelConfig",
    "QuantizedTensor",
    "RMSNorm",
    "RunConfig",
    "TrainConfig",
    "Transformer",
    "__version__",
    "accounting",
    "fp8_matmul",
    "generate",
    "load_pretrained",
    "nn",
    "numerics",
    "ops",
    "prepare",
    "quantize",
    "save_pretrained",
]

HOMES = ("config", "ops", "numerics", "nn")
"""Modules that the names are from, each after those that it imports itself: the first that has a name is its home."""
HOME_OF = {"generate": "inference", "load_pretrained": "checkpoint.load", "save_pretrained": "checkpoint.save"}
"""The homes of the others."""
PACKAGES = (
    *("accounting", "checkpoint", "config", "functional", "inference", "machine", "measure", "nn", "numerics", "ops"),
    "text",
)
"""Modules that need no import of their own: `import dsmini` is enough for dsmini.nn."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in PACKAGES:
        return import_module(f"dsmini.{name}")
    homes = [HOME_OF[name]] if name in HOME_OF else HOMES
    for module in (import_module(f"dsmini.{home}") for home in homes if name in __all__):
        if hasattr(module, name):
            value = globals()[name] = getattr(module, name)
            return value
    raise AttributeError(f"module 'dsmini' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *PACKAGES})


class _Package(ModuleType):
    """The package itself, in which dsmini.generate stays the function when the command dsmini/generate.py is loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "generate" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def _stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command that Ctrl-C stops while its modules load as one that runs; show other errors as usual."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped", file=sys.stderr, flush=True)
    os._exit(130)


sys.modules[__name__].__class__ = _Package
if sys.argv[:1] == ["-m"]:  # python -m dsmini.NAME, which imports the package before the command
    sys.excepthook = _stopped
