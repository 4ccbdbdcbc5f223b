"""A training run on disk: its folder, what is written to it, and the model that can be read back.

runs/NAME/
    config.toml           the whole config, with the device, dtype and threads that were really used
    corpus.json           what was trained on: size, hash, how the held-out part was chosen
    tokenizer.json        a copy of the tokenizer, if it was not bytes
    metrics.jsonl         a line a step
    checkpoints/step-000030/model.safetensors
    summary.json, sample.txt, loss.png, expert_load.png     at the end
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dsmini.config import RunConfig
from dsmini.nn import Transformer
from dsmini.tokenizer import Tokenizer, load_tokenizer


def new_run_folder(out: Path | None, name: str, base: Path = Path("runs")) -> Path:
    """Make the folder of a new run: `out`, or the first free base/NAME-001, -002, ...

    Raises: ValueError if the folder holds anything already; nothing is overwritten.
    """
    if out is None:
        return _next_folder(base, name)
    refuse_taken(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {out}: {error.strerror}; choose another with --out") from None
    return out


def refuse_taken(out: Path | None) -> None:
    """Raises: ValueError if the folder of a new run holds anything already."""
    try:
        taken = out is not None and out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise ValueError(f"cannot make the folder {out}: {error.strerror}; choose another with --out") from None
    if out is not None and taken:
        held = "another run" if (out / "config.toml").exists() else "other files"
        raise ValueError(f"--out {out} holds {held}; choose a new folder, or remove that one")


def _next_folder(base: Path, name: str) -> Path:
    """The first number after all that are taken; where two runs start at once, each gets its own."""
    while True:
        taken = [int(m[1]) for p in base.glob(f"{name}-*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
        out = base / f"{name}-{max(taken, default=0) + 1:03d}"
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"cannot make the folder {out}: {error.strerror}; name another with --out") from None
        return out


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: a temporary file, renamed once it is complete."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """write_text of a readable JSON object."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_model(run: Path, step: int, model: Transformer) -> Path:
    """Save the model's state dict after `step` steps; the file appears only when it is complete."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    temporary = folder / "model.safetensors.partial"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, temporary, metadata={"step": str(step)})
    except SafetensorError as error:  # what a full disk is called there
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot save {path}: {error}") from None
    os.replace(temporary, path)
    return path


def load_run(path: Path, compute_dtype: torch.dtype | None = None) -> tuple[Transformer, RunConfig]:
    """The model of a run folder's last checkpoint, or of one checkpoint folder, and the run's config.

    Raises: ValueError for a folder that is no run, has no checkpoint, or whose tensors are not the config's.
    """
    checkpoint = path if (path / "model.safetensors").is_file() else _last_checkpoint(path)
    run = checkpoint.parent.parent
    if not (run / "config.toml").is_file():
        raise ValueError(f"{run} has no config.toml, so it is no training run; name a folder that dsmini.train wrote")
    config = RunConfig.from_file(run / "config.toml")
    model = Transformer(config.model, compute_dtype=compute_dtype)
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"cannot read {checkpoint / 'model.safetensors'}: {error}") from None
    return model.eval(), config


def load_run_tokenizer(path: Path, config: RunConfig) -> Tokenizer:
    """What the run, named as for load_run, was trained with: the tokenizer.json in its folder, or bytes.

    Raises: ValueError if that file is gone.
    """
    if config.data.tokenizer is None:
        return load_tokenizer(None)
    run = path if (path / "config.toml").is_file() else path.parent.parent
    if not (run / "tokenizer.json").is_file():
        raise ValueError(f"{run} has no tokenizer.json, which it was trained with; copy {config.data.tokenizer} there")
    return load_tokenizer(run / "tokenizer.json")


def _last_checkpoint(run: Path) -> Path:
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}; name a run that dsmini.train wrote, such as runs/toy-001")
    found = [p.parent for p in run.glob("checkpoints/step-*/model.safetensors")]
    if not found:
        raise ValueError(f"{run} has no checkpoint; name a folder that dsmini.train wrote and finished or saved")
    return max(found, key=lambda folder: int(folder.name.removeprefix("step-")))
