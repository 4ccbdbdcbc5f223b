"""load_pretrained and load_run on several ranks: each holds all of a model but the experts of the other ranks.

Each rank checks the whole folder's headers and config. It makes and reads its own experts alone, so no rank holds the
model, and what is wrong is said once. The experts of the other ranks are reached through `SharedTokens`: all ranks must
call the model together, with the same tokens.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from dsmini.checkpoint import pretrained, trained_model
from dsmini.checkpoint.run_folder import is_model_folder
from dsmini.config import RunConfig
from dsmini.distributed.shared_tokens import ExpertShare
from dsmini.distributed.world import World
from dsmini.nn import Transformer


def load_pretrained(
    world: World,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    fp8: Literal["dequantize", "keep"] = "dequantize",
    device: str | torch.device = "cpu",
    *,
    placement: Sequence[Sequence[int]] | None = None,
    say: Callable[[str], None] | None = None,
) -> Transformer:
    """Return this rank's part of the model of a DeepSeek or Hugging Face folder. All ranks call it together.

    Args:
        placement: expert at each place, [layers, places], as EPLB makes it; None: each expert once, in order.
        say: told by rank 0 alone.
        The others are as in dsmini.load_pretrained.

    Warns: as dsmini.load_pretrained, on rank 0.

    Raises: ValueError on all ranks, for what dsmini.load_pretrained refuses, and for a model or a placement that the
        ranks do not fit.
    """
    share = ExpertShare(world, placement)
    say = say if world.rank == 0 else None

    def load() -> Transformer:
        with _quiet_but_first(world):
            return pretrained.load_pretrained(folder, dtype, fp8, device, say=say, holding=share)

    model = world.together(load)
    share.connect(model)
    return model


def load_run(
    world: World,
    path: Path,
    compute_dtype: torch.dtype | None = None,
    *,
    average: bool = False,
    placement: Sequence[Sequence[int]] | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> tuple[Transformer, RunConfig]:
    """Return this rank's part of the model of a run or a checkpoint, and the run's config. All ranks call it together.

    See load_pretrained for `placement`, and dsmini.checkpoint.trained_model.load_run for all else.
    """
    share = ExpertShare(world, placement)
    folder = world.first(lambda: whole_checkpoint(path, average, say))

    def load() -> tuple[Transformer, RunConfig]:
        return trained_model.load_run(folder, compute_dtype, average=average, holding=share, verified=True)

    model, config = world.together(load)
    share.connect(model)
    return model, config


def whole_checkpoint(path: Path, average: bool, say: Callable[[str], None]) -> Path:
    """Return the checkpoint of a run that load_run reads, compared with its checksums; a model's folder as it is."""
    if is_model_folder(path):
        return path
    return trained_model.model_checkpoint(path, average=average, say=say).folder


@contextlib.contextmanager
def _quiet_but_first(world: World) -> Iterator[None]:
    """Let rank 0 alone warn."""
    with warnings.catch_warnings():
        if world.rank:
            warnings.simplefilter("ignore")
        yield
