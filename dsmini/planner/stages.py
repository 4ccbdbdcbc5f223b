"""Stages of a pipeline: which layers each has, and which of its GPUs is the slowest.

The first stage has the embedding; the last has the head, multi-token prediction and its copy of the embedding, and as
many layers as make the slowest stage fastest. The others have equally many, the first stages one more. With DualPipe a
GPU has the stages i and PP - 1 - i, and works half of its time in each. Only some GPUs can hold most or be the slowest:
the first, the second with dense layers that the first has no room for, one in the middle, and the last.

In flight, with PP stages: 1F1B PP less the stages before, ZB1P PP, DualPipe PP + 1 in both of a GPU's stages together
(V3, table 2).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsmini.accounting.tensors import blocks
from dsmini.config import ModelConfig
from dsmini.planner.figure import kept
from dsmini.planner.model import PARTS_OF_A_MODEL, Contents, ModelFigures


class Stage(NamedTuple):
    """Pipeline stage."""

    contents: Contents
    vocabulary: int
    """Matrices of the size of the vocabulary."""
    in_flight: float
    """Micro-batches whose activations it holds."""


@dataclass(frozen=True, eq=False)
class GpuStages:
    """Stages of one GPU."""

    name: str
    """Place in the pipeline: only, first, second, middle or last."""
    stages: Sequence[Stage]

    @functools.cached_property
    def held(self) -> Contents:
        """Parts of the model that the GPU holds."""
        return {part: sum(stage.contents.get(part, 0) for stage in self.stages) for part in PARTS_OF_A_MODEL}

    @functools.cached_property
    def worked(self) -> Contents:
        """Parts that a micro-batch passes in it: it works an equal part of its time in each stage."""
        return {part: n / len(self.stages) for part, n in self.held.items()}

    @functools.cached_property
    def in_flight(self) -> Contents:
        """Parts whose activations it holds, once for each micro-batch."""
        return {part: sum(s.in_flight * s.contents.get(part, 0) for s in self.stages) for part in PARTS_OF_A_MODEL}

    @kept
    def numbers(self, m: ModelFigures, tensor: int) -> tuple[float, float]:
        """Return the numbers that the GPU has: of matrices but routed experts, and of what is never FP8."""
        matrices, others = m.local(tensor)
        vocabulary = sum(stage.vocabulary for stage in self.stages) * m.numbers("embedding") / tensor
        return (
            sum(n * matrices[part] for part, n in self.held.items()),
            sum(n * others[part] for part, n in self.held.items()) + vocabulary,
        )


class Pipeline(NamedTuple):
    """Places of a pipeline whose slowest GPU is fastest."""

    places: Sequence[GpuStages]
    slowest: GpuStages
    most_layers: float
    """Layers of the fullest stage, with those of multi-token prediction."""
    most_moe: float
    """MoE layers that a micro-batch passes in the GPU with most of them."""


def places(c: ModelConfig, pipeline: int, schedule: str, last_layers: int) -> list[GpuStages]:
    """Return the GPUs that can hold most or be the slowest, if the last stage has this many layers without MTP."""
    dense, moe, mtp_dense, _ = blocks(c)
    dual, mtp = schedule == "dualpipe", c.n_mtp_layers

    def stage(layers: int, dense: int, in_flight: float, vocabulary: int = 0, **ends: int) -> Stage:
        return Stage({"dense": dense, "moe": layers - dense, **ends}, vocabulary, in_flight)  # pyright: ignore

    if pipeline == 1:
        return [GpuStages("only", [stage(c.n_layers + mtp, dense + mtp_dense, 1, 2, embedding=1, head=1, mtp=mtp)])]
    most = math.ceil((c.n_layers - last_layers) / (pipeline - 1))
    first = stage(most, min(dense, most), pipeline, 1, embedding=1)
    dense_last = max(0, dense - (c.n_layers - last_layers)) + mtp_dense
    copy = 1 if dual or not mtp else 2  # of the embedding, which with DualPipe is there
    last = stage(last_layers + mtp, dense_last, pipeline if schedule == "zb1p" else 1, copy, head=1, mtp=mtp)
    in_flight = {"1f1b": pipeline - 1, "zb1p": pipeline, "dualpipe": (pipeline + 1) / 2}[schedule]
    middle = stage(most, most - min(moe, most), in_flight)
    found = [GpuStages("first", [first, last] if dual else [first])]
    if pipeline > 2 and c.n_dense_layers > 1:
        second = stage(most, max(0, min(dense - most, most)), in_flight)
        found.append(GpuStages("second", [second, middle] if dual else [second]))
    if pipeline > 2:
        found.append(GpuStages("middle", [middle, middle] if dual else [middle]))
    return found if dual else [*found, GpuStages("last", [last])]


@kept
def fastest_pipeline(m: ModelFigures, pipeline: int, schedule: str, seconds: tuple[float, ...]) -> Pipeline:
    """Return the pipeline with the number of layers in the last stage that makes the slowest GPU fastest.

    Args:
        seconds: of a token in each part of a model.
    """

    def time(place: GpuStages) -> float:
        return sum(n * s for n, s in zip(place.worked.values(), seconds, strict=True))

    def divided(last: int) -> tuple[float, int, list[GpuStages], GpuStages]:
        found = places(m.config, pipeline, schedule, last)
        slowest = max(found, key=lambda place: (time(place), place.name))
        return time(slowest), -last, found, slowest

    lasts = range(m.config.n_layers // pipeline + 1) if pipeline > 1 else [m.config.n_layers]
    _, _, found, slowest = min(map(divided, lasts), key=lambda one: one[:2])
    most = max(s.contents.get("dense", 0) + s.contents.get("moe", 0) for place in found for s in place.stages)
    return Pipeline(found, slowest, most, max(place.worked["moe"] for place in found))
