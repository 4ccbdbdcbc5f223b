"""The EMA of the parameters over the steps."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class ParameterAverage:
    """An exponential moving average of a model's parameters, on the CPU in FP32.

    V3 has one to estimate the model after the decay of the learning rate (report, section 3.2.3). It starts as a copy
    of the parameters. Its decay grows from 0.1 as min(decay, (1 + t) / (10 + t)), so the start is soon forgotten.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in named}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Add the parameters after one more step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, p in named:
            self.tensors[name].lerp_(p.detach().to("cpu", torch.float32), 1 - decay)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Load a saved average."""
        for name, mean in self.tensors.items():
            mean.copy_(tensors[name])
        self.updates = updates
