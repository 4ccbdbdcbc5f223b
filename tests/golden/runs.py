"""Training runs of 20 steps by the public commands: losses and hashes of tensors."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.fingerprint import THREADS
from tests.golden.text import text
from tests.helpers.commands import run

HERE = Path(__file__).parent

# --data.val-fraction: the validation at the end reads the whole held-out part, a tenth of 8 MB by default
# --train.newton-schulz: version 0.1.0 had these coefficients alone
EVERY = f"--train.device cpu --train.threads {THREADS} --train.sample-tokens 0 --train.newton-schulz jordan"
RECIPE = (
    "--train.lr 0.003 --train.muon-lr 0.01 --train.muon-momentum 0.95 --train.lr-schedule 'warmup 0.05' 'cosine to 0.1'"
)
"""The defaults when the runs were recorded."""
TRAIN = {
    "fp8": f"{HERE}/configs/fp8.toml --data.path book.txt --train.dtype float32 {RECIPE}",
    "bf16": f"{HERE}/configs/bf16.toml --data.path book.txt {RECIPE}",
    "schedule": f"{HERE}/configs/schedule.toml --data.path book.txt --train.dtype float32",
}
"""Arguments of python -m dsmini.train by the name of the run."""
RUNS = (*TRAIN, "resumed")
FIGURES = ("loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens", "val_loss")
"""Keys of metrics.jsonl to record: those that depend on the numbers alone."""


def prepared(folder: Path) -> Path:
    """Put the text and the run to resume into an empty folder."""
    (folder / "book.txt").write_text(text(), encoding="utf-8")
    shutil.copytree(HERE / "old_run/run", folder / "resumed")
    return folder


def trained(name: str, folder: Path) -> dict[str, Any]:
    """Train a run in a prepared folder, and return its values."""
    resume = f"--resume resumed --data.path {shlex.quote(str(HERE / 'old_run/text.txt'))} --train.newton-schulz jordan"
    succeed(resume if name == "resumed" else f"{TRAIN[name]} {EVERY} --out '{name}'", folder)
    return run_values(folder / name)


def succeed(arguments: str, folder: Path) -> None:
    """Train by the command with these arguments, to the end.

    A run ends by measuring the rate of large products, which takes as long as training. The largest are left out.
    Raises: RuntimeError with the output of a command that fails.
    """
    multiply = torch.mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda a, b, *, out=None: out if len(a) == 2048 else multiply(a, b, out=out))
        patch.setenv("OMP_NUM_THREADS", str(THREADS))
        done = run(f"dsmini.train {arguments}", folder)
    if done.returncode:
        raise RuntimeError(f"python -m dsmini.train {arguments} ended with {done.returncode}:\n{done.stderr}")


def run_values(folder: Path) -> dict[str, Any]:
    """Return the hashes of a finished run's last checkpoint, and its figures by step.

    The files of the checkpoint but the model's are known by content alone, so that they may change their names.
    """
    files = {path.name: load_file(path) for path in (folder / "checkpoints/step-000020").glob("*.safetensors")}
    hashes = {name: hash_tensors(tensors) for name, tensors in files.items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "corpus": json.loads((folder / "corpus.json").read_text())["sha256"],
        "weights": hashes.pop("model.safetensors"),
        "others": sorted(hashes.values()),
        **{figure: [row[figure] for row in rows] for figure in FIGURES},
    }


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(raw(tensors[name]))
    return digest.hexdigest()


def raw(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor of any dtype, in the order of its elements."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(dtype=torch.uint8).numpy().tobytes()
