"""Products by groups that run between two compiled graphs, for calls that torch.compile cannot trace.

torch cannot trace grouped_mm in FP32, nor products whose sizes are data. The module is imported while a model is
compiled: torch.compiler.disable loads the compiler, for which nobody else should wait 1.5 seconds.
"""

from typing import Any

import torch

from dsmini.numerics.dispatch import grouped_linear, grouped_outer

grouped_linear_uncompiled: Any = torch.compiler.disable(grouped_linear)
grouped_outer_uncompiled: Any = torch.compiler.disable(grouped_outer)
