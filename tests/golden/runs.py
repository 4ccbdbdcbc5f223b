"""Training runs of 20 steps by the public commands: losses, and hashes of tensors."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.fingerprint import THREADS
from tests.golden.text import text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXT = HERE / "old_run/text.txt"

# --data.val-fraction: the validation at the end reads the whole held-out part, a tenth of 8 MB by default
# --train.newton-schulz: version 0.1.0 had these coefficients alone
EVERY = f"--train.device cpu --train.threads {THREADS} --train.sample-tokens 0 --train.newton-schulz jordan"
TRAIN = {
    "default": "--train.steps 20 --train.batch-size 2 --train.dtype float32 --data.val-fraction 0.0002",
    "fp8": f"{HERE}/configs/fp8.toml --data.path book.txt --train.dtype float32",
    "bf16": f"{HERE}/configs/bf16.toml --data.path book.txt",
    "schedule": f"{HERE}/configs/schedule.toml --data.path book.txt --train.dtype float32",
    "shakespeare": f"{ROOT}/configs/shakespeare.toml --data.path book.txt --train.dtype float32 "
    "--train.steps 20 --train.batch-size 4",
}
"""Arguments of python -m dsmini.train by the name of the run."""
RUNS = (*TRAIN, "resumed")
FIGURES = ("loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens", "val_loss")
"""Keys of metrics.jsonl to record: those that depend on the numbers alone."""
GENERATE = {
    "sampled": "--temperature 0.8 --top-p 0.9 --seed 3",
    "greedy speculative": "--temperature 0 --speculative",
    "averaged": "--temperature 0 --average",
}
"""Arguments of python -m dsmini.generate, which continues two prompts with the resumed run."""

# python -m for each command, all in one process: importing torch takes longer than 20 steps of a small model.
# A run ends by measuring the rate of large products, which takes as long again; those into a given tensor are left out.
ALL_IN_ONE = """
import contextlib, io, json, runpy, shlex, sys, traceback
import torch
multiply = torch.mm
def multiply_small(a, b, *, out=None):
    return out if out is not None and len(a) == 2048 else multiply(a, b, out=out)
torch.mm = multiply_small
answers = []
for module, arguments in json.load(sys.stdin):
    sys.argv, out, status = [module, *shlex.split(arguments)], io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
            status = 1
    answers.append((status, out.getvalue()))
print(json.dumps(answers))
"""


def run_commands(commands: list[tuple[str, str]], folder: Path) -> list[str]:
    """Run each command (module, arguments) in the folder and return what it prints on the standard output.

    Plain code replaces the kernels, which give the same bits, so that a test compiles nothing.
    Raises: RuntimeError with the output of a command that fails.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "DSMINI_BACKEND": "eager", "OMP_NUM_THREADS": str(THREADS)}
    args = [sys.executable, "-c", ALL_IN_ONE]
    done = subprocess.run(args, cwd=folder, env=env, input=json.dumps(commands), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answers = json.loads(done.stdout)
    for (module, arguments), (status, _) in zip(commands, answers, strict=True):
        if status:
            raise RuntimeError(f"python -m {module} {arguments} ended with {status}:\n{done.stderr}")
    return [out for _, out in answers]


def run_all(folder: Path, bf16: bool) -> dict[str, Any]:
    """Train all runs in an empty folder, continue prompts with one, and return the values by name.

    Args:
        bf16: also train the run in BF16, which takes minutes on CPUs that emulate BF16 products.
    """
    (folder / "book.txt").write_text(text(), encoding="utf-8")
    shutil.copytree(HERE / "old_run/run", folder / "resumed")
    names = [name for name in TRAIN if bf16 or name != "bf16"]
    commands = [("dsmini.train", f"{TRAIN[name]} {EVERY} --out {name}") for name in names]
    commands.append(("dsmini.train", f"--resume resumed --data.path {shlex.quote(str(TEXT))}"))
    commands += [("dsmini.generate", f"resumed {_PROMPTS} {arguments}") for arguments in GENERATE.values()]
    said = run_commands(commands, folder)
    values: dict[str, Any] = {name: run_values(folder / name) for name in (*names, "resumed")}
    answers = said[-len(GENERATE) :]
    values["generate"] = {
        name: [answer["text"] for answer in json.loads(out.splitlines()[-1])["answers"]]
        for name, out in zip(GENERATE, answers, strict=True)
    }
    return values


_PROMPTS = "--prompt 'the river ' 'a quiet' --json --max-new-tokens 48 --dtype float32 --device cpu"


def run_values(run: Path) -> dict[str, Any]:
    """Return the hashes of a finished run's last checkpoint, and its figures by step.

    The other files of the checkpoint are hashed by content alone, so that a file may change its name.
    """
    folder = run / "checkpoints/step-000020"
    files = sorted(folder.glob("*.safetensors"))
    hashes = {path.name: hash_tensors(load_file(path)) for path in files}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "corpus": json.loads((run / "corpus.json").read_text())["sha256"],
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
