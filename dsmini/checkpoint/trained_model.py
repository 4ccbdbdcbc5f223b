"""The saved model of a training run, to evaluate it or to start another run."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsmini.checkpoint.held_experts import Holding, held_experts, hold_experts
from dsmini.checkpoint.manifest import NO_CHECKSUMS
from dsmini.checkpoint.memory import refuse_more_parts, refuse_too_large
from dsmini.checkpoint.run_folder import run_config
from dsmini.checkpoint.training_state import Checkpoint, check_tensors, last_checkpoint, read_checkpoint
from dsmini.config import RunConfig
from dsmini.nn import Transformer
from dsmini.reading import check_path


def load_run(
    path: Path,
    compute_dtype: torch.dtype | None = None,
    *,
    average: bool = False,
    say: Callable[[str], None] = warnings.warn,
    holding: Holding | None = None,
    verified: bool = False,
) -> tuple[Transformer, RunConfig]:
    """Return the model of a run folder's last whole checkpoint, or of one checkpoint folder, and the run's config.

    Args:
        average: load the parameters' average over the steps instead of the last ones.
        say: told about each damaged checkpoint that is passed over.
        holding: the experts that this process holds. Only their rows are read. None: all.
        verified: another process has compared this checkpoint with its checksums.

    Raises: ValueError for a folder that is not a run, has no checkpoint, or whose tensors do not fit the config.
    """
    checkpoint = model_checkpoint(path, average=average, say=say, verified=verified)
    with torch.device("meta"):  # weights that are drawn first would be overwritten
        model = Transformer(checkpoint.config.model, compute_dtype=compute_dtype)
    if holding is not None:
        hold_experts(model, holding(model))
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    refuse_too_large(nbytes, f"the model of {path}", torch.device("cpu"))
    held = held_experts(model)

    def here(name: str, tensor: Tensor) -> Tensor:
        own = held.get(name.rpartition(".")[0])
        # copies, because the tensors are views of the file
        return tensor.clone() if own is None or isinstance(own, range) else tensor[list(own)]

    model.load_state_dict({name: here(name, t) for name, t in model_tensors(checkpoint).items()}, assign=True)
    return model.eval(), checkpoint.config


def model_checkpoint(
    path: Path, *, average: bool = False, say: Callable[[str], None] = warnings.warn, verified: bool = False
) -> Checkpoint:
    """Read the checkpoint that load_run takes, with only the tensors of a model. See load_run."""
    check_path(path, "run")
    single = re.fullmatch(r"step-\d+", path.resolve().name) is not None and path.is_dir()
    parts = ["model", "average"] if average else ["model"]
    if average and run_config(path).train.ema_decay is None:
        raise ValueError(f"{path} stored no average of its parameters; train with --train.ema-decay 0.99 to have one")

    def fits(checkpoint: Checkpoint) -> None:
        parts = sum(len(t) if t.dim() == 3 else 1 for t in checkpoint.tensors["model"].values())
        refuse_more_parts(checkpoint.config.model, parts, "model.safetensors")
        with torch.device("meta"):
            want = Transformer(checkpoint.config.model).state_dict()
        check_tensors(model_tensors(checkpoint), want, "model.safetensors")

    if not single:
        return last_checkpoint(path, parts, fits, say)
    try:
        checkpoint = read_checkpoint(path, parts, NO_CHECKSUMS if verified else (0, 1))
        fits(checkpoint)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}; name another checkpoint") from None
    return checkpoint


def model_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return a model's state dict, with the average in place of the last parameters where that was read."""
    return checkpoint.tensors["model"] | checkpoint.tensors.get("average", {})
