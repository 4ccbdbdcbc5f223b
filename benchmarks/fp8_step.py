"""What does training in simulated FP8 cost and save, next to BF16?

    python -m benchmarks.fp8 [--config configs/fp8.toml] [--rounds 9]

The same model and batches in BF16, in simulated FP8, and in simulated FP8 without the kernels. A step is the one that
python -m dsmini.train takes: batch, losses, backward, clipping, optimizer. The steps take turns, so that a busy
neighbour slows all of them; reported are the median and the best, and the median of each round's ratio to BF16. What is
kept for backward is read off the storages, each once.

Simulated: values are rounded to FP8 and multiplied as BF16. It costs time where FP8 hardware gains some.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kept import kept_for_backward
from dsmini import RunConfig, Transformer, ops
from dsmini.data import load_corpus
from dsmini.trainer import Trainer

VARIANTS = {"bfloat16": "native", "simulated fp8": "fp8", "the same, plain PyTorch": "fp8"}


def trainer(config: RunConfig, precision: str) -> Trainer:
    torch.manual_seed(0)
    model_config = dataclasses.replace(config.model, precision=precision)  # pyright: ignore[reportArgumentType]
    config = dataclasses.replace(config, model=model_config)
    corpus = load_corpus(config.data, config.seq_len, config.model.vocab_size, Path("runs/corpus"))
    return Trainer(Transformer(model_config, compute_dtype=torch.bfloat16), corpus, config, torch.device("cpu"))


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/fp8.toml"), help="a run's TOML file")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that are timed (default 9)")
    options = parser.parse_args()
    config = RunConfig.from_file(options.config)
    trainers = {name: trainer(config, precision) for name, precision in VARIANTS.items()}
    console = Console(stderr=True)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for i in track(range(options.rounds + 1), "rounds", console=console):
        for name, t in trainers.items():
            with ops.use("reference" if "plain" in name else None):
                elapsed = seconds(t.step)
            if i:  # the first warms up
                times[name].append(elapsed)
    tokens = torch.randint(0, config.model.vocab_size, (config.train.batch_size, config.seq_len + 1))
    kept = {name: kept_for_backward(trainers[name].model, tokens) for name in ("bfloat16", "simulated fp8")}
    base = times["bfloat16"]
    rows = [
        {
            "variant": name,
            "step_s": statistics.median(t),
            "best_s": min(t),
            "ratio": statistics.median(a / b for a, b in zip(t, base, strict=True)),
            "kept_by_linears": kept.get(name, (None, None))[0],
            "kept": kept.get(name, (None, None))[1],
        }
        for name, t in times.items()
    ]
    show(console, rows)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "config": str(options.config)}
    print(json.dumps({"benchmark": "fp8", **about, "rows": rows}))


def show(console: Console, rows: list[dict]) -> None:
    table = Table("variant", "step", "best", "time", "Linears keep", "all keep", caption="time and bytes beside BF16's")
    table.columns[0].no_wrap = True
    base = rows[0]
    for row in rows:
        kept = ["", ""]
        if row["kept"]:
            kept = [f"{row[key] / 2**20:.0f} MiB {row[key] / base[key]:.2f} x" for key in ("kept_by_linears", "kept")]
        step, best = f"{row['step_s']:.3f} s", f"{row['best_s']:.3f} s"
        table.add_row(row["variant"], step, best, f"{row['ratio']:.2f} x", *kept)
    console.print(table)


if __name__ == "__main__":
    main()
