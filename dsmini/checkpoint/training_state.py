"""Checkpoints of a training run: everything it needs to continue.

runs/NAME/checkpoints/step-000030/
    model.safetensors       parameters and routing biases
    optimizer.safetensors   the optimizers' states, as PARAMETER/KEY
    average.safetensors     the parameters' average over the steps, if there is one
    rng.safetensors         the states of the random number generators
    config.toml             the run's config at that step
    state.json              RunState: the progress of the run
    manifest.json           size and checksum of the files above
"""

import dataclasses
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmini.atomic import as_json, remove_folders
from dsmini.checkpoint.load import meta_model, refuse_more_parts
from dsmini.checkpoint.run_folder import check_run, run_config
from dsmini.checkpoint.tensor_files import SafetensorsReader
from dsmini.config import RunConfig
from dsmini.config.fields import build, check_types
from dsmini.machine import refuse_too_large
from dsmini.nn import Transformer
from dsmini.reading import UnreadableError, brief, check_path, is_there, open_regular, parse_json, read_table, read_text

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of a checkpoint's manifest."""
Tensors = dict[str, dict[str, Tensor]]
"""Tensors by the stem of their file, and by name."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The progress of a run apart from its tensors and its rows in metrics.jsonl; the content of state.json."""

    step: int
    """Number of optimizer steps done."""
    sequences: int
    """Number of training sequences taken from the corpus: the place where the data continues."""
    average_updates: int
    """Number of steps in the parameters' average."""
    skipped_in_a_row: int
    """Number of steps in a row at the end that were skipped because the loss or the gradient was not finite."""
    corpus_sha256: str
    """Hash of the corpus that was trained on."""
    row: dict[str, Any]
    """Line of the last step in metrics.jsonl; a validation due at this step is not yet in it."""
    rewinds: int = 0
    """Number of times that the run went back to a checkpoint after a spike of the loss."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint's folder, verified and read."""

    folder: Path
    config: RunConfig
    tensors: Tensors
    state: RunState

    def rows(self, name: str, rows: slice) -> Tensor:
        """Return rows of a tensor of the model's state dict."""
        return self.tensors["model"][name][rows]


def checkpoint_folder(config: RunConfig, step: int) -> Path:
    """Return the folder of a run's checkpoint after this many steps."""
    assert config.out is not None
    return config.out / "checkpoints" / f"step-{step:06d}"


def prune(config: RunConfig, state: RunState, before: int | None) -> None:
    """Remove all checkpoints but the newest train.keep up to one of this state.

    Later ones are removed too, and those after `before`: they are damaged, since the run did not continue from them.
    While steps are skipped all earlier ones stay, because the run may have to return to one of them.

    Args:
        before: step of the checkpoint before this one, or of the one that the run continued from; None: unknown.
    """
    assert config.out is not None
    there = checkpoint_folders(config.out)
    keep = None if state.skipped_in_a_row else config.train.keep
    last = state.step if before is None else before
    kept = [one for one in there if checkpoint_step(one) <= last or checkpoint_step(one) == state.step][:keep]
    remove_folders(one for one in there if one not in kept)


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the manifest of these files of a folder, as they are now."""
    manifest = {"format": FORMAT, "files": {name: _fingerprint(folder / name) for name in names}}
    (folder / MANIFEST).write_text(as_json(manifest), encoding="utf-8")


def verify(folder: Path, names: Iterable[str]) -> None:
    """Check these files against the manifest, which must list them.

    Raises: ValueError naming the file and what is wrong with it; UnreadableError if that is not known.
    """
    listed = _read_manifest(folder / MANIFEST)
    for name in names:
        if name not in listed:
            raise ValueError(f"{MANIFEST} does not list {name}")
        if not is_there(folder / name):
            raise ValueError(f"{name} is missing")
        want, got = listed[name], _fingerprint(folder / name)
        if got["bytes"] != want["bytes"]:
            raise ValueError(f"{name} has {got['bytes']} bytes, {MANIFEST} says {want['bytes']}")
        if got["sha256"] != want["sha256"]:
            says = brief(want["sha256"], 12)
            raise ValueError(f"{name} has sha256 {got['sha256'][:12]}..., {MANIFEST} says {says}")


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not is_there(path):
        raise ValueError(f"{MANIFEST} is missing")
    raw = parse_json(read_text(path), MANIFEST)
    form, files = (raw.get("format"), raw.get("files")) if isinstance(raw, dict) else (None, None)
    if type(form) is int and form > FORMAT:
        raise UnreadableError(f"{MANIFEST} has format {form}, this dsmini reads {FORMAT}")
    if (
        type(form) is not int
        or form != FORMAT
        or not isinstance(files, dict)
        or any(not isinstance(of, dict) or of.keys() != {"bytes", "sha256"} for of in files.values())
    ):
        raise ValueError(f"{MANIFEST} is damaged: want format {FORMAT}, and bytes and sha256 for every file")
    return files


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            return {"bytes": nbytes, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise UnreadableError(f"cannot read {path.name}: {error.strerror}") from None


def last_checkpoint(
    run: Path,
    parts: Sequence[str],
    fits: Callable[[Checkpoint], None],
    say: Callable[[str], None],
) -> Checkpoint:
    """Return the newest checkpoint that is whole and fits; name newer ones with what is wrong with them.

    Args:
        parts: the stems of the tensor files to read.
        fits: raises ValueError for tensors that do not fit.
        say: told about each checkpoint that is passed over.

    Raises: ValueError if there is none, with all the reasons; and for one that may be whole, but cannot be read now, or
        by this version of dsmini.
    """
    check_run(run)
    found = checkpoint_folders(run)
    if not found:
        raise ValueError(f"{run} has no checkpoint; name a folder that dsmini.train wrote and finished or saved")
    reasons = []
    for folder in found:
        try:
            checkpoint = read_checkpoint(folder, parts)
            fits(checkpoint)
        except UnreadableError as error:  # it may be whole, and a later save would remove it
            before = ", or move that folder away to continue from the one before" if folder != found[-1] else ""
            raise ValueError(f"cannot read {folder}: {error}; try again{before}") from None
        except ValueError as error:
            there = checkpoint_folders(run)
            if folder not in there and there and checkpoint_step(there[0]) > checkpoint_step(folder):
                return last_checkpoint(run, parts, fits, say)  # training has replaced it meanwhile
            reasons.append(f"cannot read {folder}: {error}")
            continue
        for reason in reasons:
            say(f"{reason}; using {folder.name}, the one before")
        return checkpoint
    raise ValueError(f"{'; '.join(reasons)}; {run} has no other checkpoint, so start a new run")


def read_checkpoint(folder: Path, parts: Sequence[str], verified: bool = False) -> Checkpoint:
    """Verify and read a checkpoint's folder. A tensor is a view of its file, so only the rows that are used are read.

    Args:
        parts: the stems of the tensor files to read; other files are ignored.
        verified: another process has compared its files with their checksums.

    Raises: ValueError naming the file and what is wrong with it.
    """
    if not verified:
        verify(folder, [*(f"{part}.safetensors" for part in parts), "config.toml", "state.json"])
    config = RunConfig.from_file(folder / "config.toml")
    tensors = {part: SafetensorsReader(folder / f"{part}.safetensors").read_all() for part in parts}
    known = {f.name for f in dataclasses.fields(RunState)}  # earlier versions wrote totals of the rows too
    raw = {key: value for key, value in read_table(folder / "state.json").items() if key in known}
    try:
        state = build(RunState, raw, "state.json", "")
    except (ValueError, TypeError) as error:  # the last: a field is missing
        raise ValueError(f"state.json is not understood: {error}") from None
    if state.step != checkpoint_step(folder):
        raise ValueError(f"state.json is of step {state.step}, the folder's name says {checkpoint_step(folder)}")
    return Checkpoint(folder=folder, config=config, tensors=tensors, state=state)


def check_tensors(got: Mapping[str, Tensor], want: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError for the first tensor whose name, shape or dtype is not the one of `want`."""
    for name in sorted(got.keys() | want.keys()):
        if name not in got or name not in want:
            raise ValueError(f"{source} {'lacks' if name in want else 'has an unknown'} tensor {name}")
        g, w = ((tensor.dtype, list(tensor.shape)) for tensor in (got[name], want[name]))
        if g != w:
            raise ValueError(f"{source}: {name} is {g[0]} {g[1]}, want {w[0]} {w[1]}")


def checkpoint_step(folder: Path) -> int:
    """Return the number of steps that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the checkpoints' folders, newest first."""
    found = [p for p in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def newest_run(runs: Path = Path("runs")) -> Path | None:
    """Return the run in a folder that saved a checkpoint last; None if none has one."""
    runs_there = [run for run in runs.glob("*/") if is_there(run / "config.toml")]
    saved = [(last.stat().st_mtime_ns, run) for run in runs_there for last in checkpoint_folders(run)[:1]]
    return max(saved)[1] if saved else None


# --- the model of a run: to evaluate it, to write texts with it, or to start another run


def load_run(
    path: Path,
    compute_dtype: torch.dtype | None = None,
    *,
    average: bool = False,
    say: Callable[[str], None] = warnings.warn,
    verified: bool = False,
) -> tuple[Transformer, RunConfig]:
    """Return the model of a run folder's last whole checkpoint, or of one checkpoint folder, and the run's config.

    Args:
        average: load the parameters' average over the steps instead of the last ones.
        say: told about each damaged checkpoint that is passed over.
        verified: another process has compared this checkpoint with its checksums.

    Raises: ValueError for a folder that is not a run, has no checkpoint, or whose tensors do not fit the config.
    """
    checkpoint = model_checkpoint(path, average=average, say=say, verified=verified)
    model = meta_model(checkpoint.config.model, compute_dtype)  # weights that are drawn first would be overwritten
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    refuse_too_large(nbytes, f"the model of {path}", torch.device("cpu"))
    # copies, because the tensors are views of the file
    model.load_state_dict({name: tensor.clone() for name, tensor in model_tensors(checkpoint).items()}, assign=True)
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
        want = meta_model(checkpoint.config.model).state_dict()
        check_tensors(model_tensors(checkpoint), want, "model.safetensors")

    if not single:
        return last_checkpoint(path, parts, fits, say)
    try:
        checkpoint = read_checkpoint(path.resolve(), parts, verified)
        fits(checkpoint)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}; name another checkpoint") from None
    return checkpoint


def model_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return a model's state dict, with the average in place of the last parameters where that was read."""
    return checkpoint.tensors["model"] | checkpoint.tensors.get("average", {})
