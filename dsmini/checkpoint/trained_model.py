"""The model of a training run or of a folder: to evaluate it, to write texts with it, or to start another run."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from dsmini.checkpoint.load import Holding, held_experts, hold_experts, load_pretrained
from dsmini.checkpoint.memory import refuse_more_parts, refuse_too_large
from dsmini.checkpoint.run_folder import is_model_folder, run_config, run_tokenizer
from dsmini.checkpoint.training_state import (
    NO_CHECKSUMS,
    Checkpoint,
    check_tensors,
    last_checkpoint,
    read_checkpoint,
)
from dsmini.config import RunConfig
from dsmini.console.command import speaks
from dsmini.console.messages import say as print_line
from dsmini.machine import DTYPES, pick_device, pick_dtype
from dsmini.nn import Transformer
from dsmini.reading import check_path
from dsmini.text.chat import Dialogue
from dsmini.text.text_side import TextSide, read_text_side


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


def load_text_model(
    path: Path,
    dtype: str,
    device: str,
    average: bool,
    tokenizer: str | None,
    chat: bool,
    fp8: Literal["keep", "dequantize"],
    *,
    holding: Holding | None = None,
    verified: bool = False,
) -> tuple[Transformer, TextSide, bool]:
    """Load a model; return it, its text side, and whether it is a training run's. The arguments are the flags of
    python -m dsmini.generate. Damaged checkpoints that are passed over and warnings are lines on the standard error.

    Args:
        holding, verified: as in load_run.

    Raises: ValueError for a path that is neither a run nor a folder, and for a flag of the other kind.
    """
    note = partial(print_line, Console(stderr=True, quiet=not speaks()))
    place = pick_device(device)
    if is_model_folder(path):
        if average:
            raise ValueError(f"--average is for a training run, and {path} is a model's folder; leave it out")
        side = read_text_side(path, tokenizer=tokenizer, chat=chat)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: note(str(message))
            stored_or = None if dtype == "auto" else DTYPES[dtype]
            model = load_pretrained(path, dtype=stored_or, fp8=fp8, device=place, holding=holding)
        got, want = side.tokenizer.vocab_size, model.config.vocab_size
        if got > want:
            file = tokenizer or path / "tokenizer.json"
            note(f"{file} has token ids up to {got - 1}, the model of {path} only to {want - 1}")
        return model, side, False
    for flag, wanted in (("--tokenizer", tokenizer), ("--fp8 keep", fp8 == "keep")):
        if wanted:
            raise ValueError(
                f"{flag} is for a DeepSeek or Hugging Face folder, and {path} is a training run; leave it out"
            )
    model, config = load_run(
        path, pick_dtype(dtype, place), average=average, say=note, holding=holding, verified=verified
    )
    own = run_tokenizer(path, config)
    talk = {"chat": Dialogue(own), "stops": Dialogue.stops} if chat else {}
    return model.to(place), TextSide(tokenizer=own, ends=(own.end_of_document,), **talk), True
