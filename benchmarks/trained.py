"""Models that are trained first, for questions that random weights cannot answer."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Figure, Plot, Setting, pick
from dsmini import ModelConfig, RunConfig, Transformer, accounting
from dsmini.data.corpus import load_corpus
from dsmini.report.charts import over_labels
from dsmini.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
CORPUS = Path("runs/corpus")


def recipe(name: str) -> RunConfig:
    """Return configs/NAME.toml."""
    return RunConfig.from_file(ROOT / "configs" / f"{name}.toml")


def trainer(config: RunConfig, setting: Setting, steps: int = 0) -> Trainer:
    """Return a trainer of this run on the setting's device and dtype, after this many steps.

    The text is the default corpus unless the run names another.
    """
    corpus = load_corpus(config.data, config.seq_len, config.model.vocab_size, CORPUS)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = Transformer(config.model, compute_dtype=setting.dtype)
    made = Trainer(model, corpus, config, setting.device)
    for _ in range(steps):
        made.step()
    return made


def training_flops(config: ModelConfig, sequences: int) -> float:
    """Return the FLOPs of training on this many sequences of length max_seq_len."""
    length = config.max_seq_len
    return sequences * length * accounting.flops_per_token(config, length, training=True).total


def run_module(module: str, *arguments: str) -> str:
    """Run python -m module from this checkout and return what it printed.

    Raises: RuntimeError with its messages if it fails.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -m {module} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def run_command(module: str, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Run python -m module as run_module does. Return its seconds and the JSON of its last line."""
    start = time.perf_counter()
    printed = run_module(module, *arguments)
    return time.perf_counter() - start, json.loads(printed.splitlines()[-1])


def run_recipe(setting: Setting, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Run dsmini.train with configs/shakespeare.toml on this setting. Return its seconds and its summary."""
    dtype, threads = str(setting.dtype).removeprefix("torch."), str(torch.get_num_threads())
    where = ["--train.device", str(setting.device), "--train.dtype", dtype, "--train.threads", threads]
    with tempfile.TemporaryDirectory() as out:
        quiet = ["--train.sample-tokens", "0", "--json", "--out", f"{out}/run"]
        whole = ["--train.final-eval-tokens", str(10**12)]  # of the held-out split, however short the training
        return run_command("dsmini.train", "configs/shakespeare.toml", *where, *quiet, *whole, *arguments)


def plots_by_seed(
    figures: list[Figure], by: str, names: Iterable[str], metrics: Mapping[str, tuple[str, str]]
) -> list[Plot]:
    """Draw each metric, given with title and unit, over the seeds, with a group for each value of the key `by`."""
    return [
        plot
        for metric, (title, unit) in metrics.items()
        for plot in over_labels(
            title, unit, {n: {f"seed {f.case['seed']}": f for f in pick(figures, metric, **{by: n})} for n in names}
        )
    ]
