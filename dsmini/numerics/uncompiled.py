"""Functions that run between two compiled graphs, for calls that torch.compile cannot trace.

torch cannot trace grouped_mm in FP32, nor products whose sizes are data. The module is imported while a model is
compiled: torch.compiler.disable loads the compiler, for which nobody else should wait 1.5 seconds.
"""

from typing import Any

import torch

uncompiled: Any = torch.compiler.disable(lambda run, *tensors: run(*tensors))
"""Returns what a function makes of tensors."""
