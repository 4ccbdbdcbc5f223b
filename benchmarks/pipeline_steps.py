"""Steps of training through a pipeline of two processes, recorded action by action.

`record` starts the processes, one for each rank, on the loopback interface. Each has one thread. The schedules take
turns step by step, so that a machine that gets slower slows all of them.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.schedules import Row, record_timeline
from benchmarks.trained import ROOT
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config.parallel import CHUNKS, ParallelConfig
from dsmini.data.corpus import Corpus
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.pipeline import Pipeline
from dsmini.distributed.world import World, joined
from dsmini.training.trainer import Trainer

RANKS, PARTS = 2, 8
"""Number of ranks, and of micro-batches of a step."""
MODEL = ModelConfig(dim=128, n_layers=8, n_dense_layers=0, n_mtp_layers=0)
"""All blocks are alike, so that the stages are."""
TIMEOUT = 60.0
"""Seconds after which a rank gives up waiting for the other."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes of the steps."""

    model: ModelConfig = MODEL
    sequences: int = 2
    """Sequences of a micro-batch."""
    tokens: int = 256
    """Tokens of a sequence."""
    warm: int = 2
    """Steps before those that are recorded."""
    steps: int = 5


class Step(NamedTuple):
    """A step of a schedule."""

    seconds: float
    """Time of the whole step, with the loader and the optimizer: that of the slower rank."""
    rows: list[Row]
    """Actions of all ranks."""


def record(size: Size) -> dict[str, list[Step]]:
    """Return the recorded steps of each schedule.

    Raises: RuntimeError with the messages of a process that fails.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=TIMEOUT), wait_for_workers=False)
    command = [sys.executable, "-m", "benchmarks.pipeline_steps", json.dumps(dataclasses.asdict(size))]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(RANKS)]
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank, output in enumerate(outputs):
                env = os.environ | _environment(rank, store.port)
                with output.open("w") as out, output.with_suffix(".err").open("w") as err:
                    processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, text=True))
            failed = [rank for rank, process in enumerate(processes) if process.wait()]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            said = outputs[failed[0]].with_suffix(".err").read_text()[-2000:]
            raise RuntimeError(f"rank {failed[0]} of the pipeline ended with an error: {said}")
        found: dict[str, list[Any]] = json.loads(outputs[0].read_text().splitlines()[-1])
    return {name: [Step(seconds, list(map(tuple, rows))) for seconds, rows in of] for name, of in found.items()}


def _environment(rank: int, port: int) -> dict[str, str]:
    """Return what a rank finds in its environment. This process holds the store, as torchrun does."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "OMP_NUM_THREADS": 1}
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in ranks.items()} | at


def run_steps(world: World, size: Size) -> dict[str, list[Step]]:
    """Train with each schedule in turns. Return the recorded steps, on every rank."""
    trainers = {name: _trainer(ParallelConfig(pp=RANKS, schedule=name), size) for name in CHUNKS}
    for _ in range(size.warm):
        for trainer in trainers.values():
            trainer.step()
    found: dict[str, list[Step]] = {name: [] for name in CHUNKS}
    for _ in range(size.steps):
        for name, trainer in trainers.items():
            passes = trainer.pipeline
            assert isinstance(passes, Pipeline), "pp is 2"
            world.gather(None)  # both ranks start together
            start = time.perf_counter()
            with record_timeline(passes.schedule(size.sequences, size.tokens, PARTS)) as rows:
                trainer.step()
            both = world.gather((time.perf_counter() - start, rows))
            found[name].append(Step(max(seconds for seconds, _ in both), [row for _, rows in both for row in rows]))
    return found


def _trainer(parallel: ParallelConfig, size: Size) -> Trainer:
    """Return a trainer of random text, in FP32."""
    train = TrainConfig(
        steps=100,
        batch_size=size.sequences * PARTS,
        grad_accum=PARTS,
        seq_len=size.tokens,
        optimizer="adamw",
        dtype="float32",
        threads=1,
    )
    config = RunConfig(model=size.model, train=train, parallel=parallel)
    parallel.check(config.model, config.train, RANKS)
    text = np.random.default_rng(0).integers(0, 256, 64 * size.tokens * PARTS, np.uint8)
    corpus = Corpus(train=text, val=text[: 4 * size.tokens], source="", files=1, skipped=0, split="", sha256="")
    torch.manual_seed(0)
    model = Transformer(config.model, compute_dtype=torch.float32)
    return Trainer(model, corpus, config, torch.device("cpu"), Mesh(parallel))


def main() -> None:
    """Be one rank. Rank 0 prints the steps."""
    given = json.loads(sys.argv[1])
    size = Size(**given | {"model": ModelConfig(**given["model"])})
    torch.set_num_threads(1)
    with joined(TIMEOUT) as world:
        found = run_steps(world, size)
        if world.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
