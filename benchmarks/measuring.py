"""What the questions share: models, times and their spread."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from benchmarks.question import Setting
from dsmini import ModelConfig, Transformer
from dsmini.machine import synchronize


def built(config: ModelConfig, setting: Setting) -> Transformer:
    """A model with random weights in the setting's dtype, ready to decode."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        return Transformer(config).to(setting.dtype).eval()


def random_tokens(config: ModelConfig, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), device=device)


def interleaved(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Of each the times of some rounds in which they take turns, after one that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            elapsed = once(run, device)
            if i:
                taken[name].append(elapsed)
    return taken


def once(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


class Spread(TypedDict):
    """What a Figure has of values that were measured several times."""

    measured: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) < 2:
        return {"measured": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"measured": middle, "low": low, "high": high}
