"""A model with its text side, from a training run, one of its checkpoints, or a model's folder."""

import warnings
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from dsmini.checkpoint.held_experts import Holding
from dsmini.checkpoint.pretrained import load_pretrained
from dsmini.checkpoint.run_folder import is_model_folder, run_tokenizer
from dsmini.checkpoint.trained_model import load_run
from dsmini.console.command import speaks
from dsmini.console.messages import say
from dsmini.machine import DTYPES, pick_device, pick_dtype
from dsmini.nn import Transformer
from dsmini.text.text_side import TextSide, read_text_side


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
    note = partial(say, Console(stderr=True, quiet=not speaks()))
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
    for flag, wanted in (("--chat", chat), ("--tokenizer", tokenizer), ("--fp8 keep", fp8 == "keep")):
        if wanted:
            raise ValueError(
                f"{flag} is for a DeepSeek or Hugging Face folder, and {path} is a training run; leave it out"
            )
    model, config = load_run(
        path, pick_dtype(dtype, place), average=average, say=note, holding=holding, verified=verified
    )
    own = run_tokenizer(path, config)
    return model.to(place), TextSide(tokenizer=own, ends=(own.end_of_document,)), True
