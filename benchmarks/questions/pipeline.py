"""Bubbles of pipeline schedules on two processes, next to V3's formulas.

Two processes of one thread each, on the CPU and in FP32, train a small model of eight equal MoE blocks through each
schedule, with eight micro-batches a step. The schedules take turns. Processes send by gloo on the loopback interface.
A bubble is the share of the passes of a step in which a rank computes nothing: its thread has no time of the processor.
So another program that takes a core counts as a bubble too. The formulas are those of table 2 of the
DeepSeek-V3 report, for forwards and both halves of backwards that take equally long. Folder pipeline/ has a trace of a
step of each schedule and rank, for ui.perfetto.dev.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.claims.study import run_module
from benchmarks.question import Case, Figure, Question, Setting, drawing, figure, left_out, pick
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config.run import CHUNKS, ParallelConfig, ScheduleName
from dsmini.data.corpus import Corpus
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.pipeline import Pipeline
from dsmini.distributed.world import World, joined
from dsmini.machine import cores
from dsmini.training.trainer import Trainer

RANKS, PARTS = 2, 8
"""Number of ranks, and of micro-batches of a step."""
MODEL = ModelConfig(dim=128, n_layers=8, n_dense_layers=0, n_mtp_layers=0)
"""All blocks are alike, so that the stages are."""
TIMEOUT = 60.0
"""Seconds after which a rank gives up waiting for the other."""


def formula(name: ScheduleName, n_ranks: int, n_microbatches: int) -> float:
    """Return the share of the published bubble where a forward F and both halves of a backward, I and W, take 1 each.

    For ZBV this is the formula of ZB1P, and for DualPipeV that of DualPipe on 2 * n_ranks.

    Source: DeepSeek-V3 report, table 2: (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W), with PP stages and B = I + W.
    """
    units = {"1f1b": 3, "interleaved1f1b": 3, "zero_bubble": 1, "zbv": 1, "dualpipev": 2}[name]
    bubble = (n_ranks - 1) * units
    return bubble / (bubble + n_microbatches * CHUNKS[name] * 3)


# --- the processes: `python -m benchmarks.questions.pipeline FOLDER SIZE` on each rank


class Size(NamedTuple):
    """Sizes of the steps."""

    sequences: int
    """Sequences of a micro-batch."""
    tokens: int
    """Tokens of a sequence."""
    warm: int
    """Steps before those that count."""
    steps: int


FULL, QUICK = Size(2, 256, 2, 5), Size(1, 128, 1, 5)


class Passes(NamedTuple):
    """Times of the forwards and backwards of a step, in seconds."""

    whole: float
    busy: float
    """Time that the rank's thread had of the processor."""


def bubble_share(ranks: list[Passes]) -> float:
    """Return the share of the ranks' time in which they compute nothing."""
    return 1 - sum(rank.busy for rank in ranks) / (len(ranks) * max(rank.whole for rank in ranks))


def train_in_turns(folder: Path, size: Size) -> dict[ScheduleName, list[tuple[float, float]]]:
    """Return the bubble and the seconds of each step by schedule, and save a trace of one more step of each.

    Raises: RuntimeError with the messages of a process that fails.
    """
    launch = ("--standalone", "--nproc-per-node", str(RANKS), "-m", "benchmarks.questions.pipeline")
    said = run_module("torch.distributed.run", *launch, str(folder), json.dumps(size), OMP_NUM_THREADS="1")
    found: dict[ScheduleName, list[tuple[float, float]]] = json.loads(said.splitlines()[-1])
    return found


def run_steps(world: World, folder: Path, size: Size) -> dict[ScheduleName, list[tuple[float, float]]]:
    """Be one rank: train with each schedule in turns. Return the bubble and the seconds of each step."""
    taken: list[Passes] = []

    def timed(run: Any, *args: Any, **kwargs: Any) -> Any:
        start, busy = time.perf_counter(), time.thread_time()
        result = run(*args, **kwargs)
        taken.append(Passes(time.perf_counter() - start, time.thread_time() - busy))
        return result

    trainers: dict[ScheduleName, Trainer] = {
        name: _trainer(ParallelConfig(pp=RANKS, schedule=name), size) for name in CHUNKS
    }
    for trainer in trainers.values():
        assert isinstance(trainer.pipeline, Pipeline), "pp is 2"
        schedule = trainer.pipeline.schedule(size.sequences, size.tokens, PARTS)
        schedule.step = partial(timed, schedule.step)
    found: dict[ScheduleName, list[tuple[float, float]]] = {name: [] for name in CHUNKS}
    for turn in range(-size.warm, size.steps):
        for name, trainer in trainers.items():
            world.gather(None)  # both ranks start together
            start = time.perf_counter()
            trainer.step()
            both = world.gather((taken.pop(), time.perf_counter() - start))
            if turn >= 0:
                found[name].append((bubble_share([passes for passes, _ in both]), max(seconds for _, seconds in both)))
    for name, trainer in trainers.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer.step()
        profile.export_chrome_trace(str(folder / f"{name}-rank{world.rank}.json"))
    return found


def _trainer(parallel: ParallelConfig, size: Size) -> Trainer:
    """Return a trainer of random text, in FP32."""
    batch: Any = {"batch_size": size.sequences * PARTS, "grad_accum": PARTS, "seq_len": size.tokens}
    train = TrainConfig(steps=100, optimizer="adamw", dtype="float32", threads=1, **batch)
    config = RunConfig(model=MODEL, train=train, parallel=parallel)
    parallel.check(config.model, config.train, RANKS)
    text = np.random.default_rng(0).integers(0, 256, 64 * size.tokens * PARTS, np.uint8)
    corpus = Corpus(train=text, val=text[: 4 * size.tokens], source="", files=1, split="", sha256="")
    torch.manual_seed(0)
    model = Transformer(config.model, compute_dtype=torch.float32)
    return Trainer(model, corpus, config, torch.device("cpu"), Mesh(parallel))


def main() -> None:
    """Be one rank. Rank 0 prints what was measured."""
    torch.set_num_threads(1)
    with joined(TIMEOUT) as world:
        found = run_steps(world, Path(sys.argv[1]), Size(*json.loads(sys.argv[2])))
        if world.rank == 0:
            print(json.dumps(found), flush=True)
        world.gather(None)
        os._exit(0)  # without gloo's destructors, which now and then abort after the other rank has left


# --- the question


def cases(setting: Setting) -> list[Case]:
    size = QUICK if setting.quick else FULL
    words = " ".join(f"{name}={value}" for name, value in size._asdict().items())
    seconds = 25.0 if setting.quick else 60.0
    return [Case(key=f"ranks={RANKS} {words}", seconds=seconds, run=partial(measure, setting, size))]


def why_not() -> str:
    """Return the reason why no pipeline runs here; empty if it does."""
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch has no torch.distributed with gloo"
    return f"{RANKS} ranks need {RANKS} processor cores, and there is {cores()}" if cores() < RANKS else ""


def measure(setting: Setting, size: Size) -> Iterator[Figure]:
    """Train on two processes, and yield the bubbles and the seconds of whole steps."""
    if reason := why_not():
        yield from (left_out("bubble", {"schedule": name}, reason) for name in CHUNKS)
        return
    folder = setting.out.resolve() / "pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    for name, steps in train_in_turns(folder, size).items():
        bubbles, seconds = zip(*steps, strict=True)
        note = f"trace: pipeline/{name}-rank0.json"
        yield figure("bubble", {"schedule": name}, bubbles, predicted=formula(name, RANKS, PARTS), note=note)
        yield figure("step_seconds", {"schedule": name}, seconds, note="with the loader and the optimizer")


def answer(figures: list[Figure]) -> str:
    bubbles = [f for f in pick(figures, "bubble") if f.measured is not None]
    told = [f"{f.case['schedule']} {f.measured:.0%} (formula {f.predicted or 0.0:.0%})" for f in bubbles]
    if seconds := {str(f.case["schedule"]): f.measured for f in pick(figures, "step_seconds") if f.measured}:
        fastest = min(seconds, key=lambda name: seconds[name])
        told.append(f"the fastest step is that of {fastest}, {seconds[fastest]:.3g} s")
    return f"Bubbles on {RANKS} ranks: {'; '.join(told)}." if told else ""


QUESTION = Question(
    name="pipeline",
    title="How large are the bubbles of pipeline schedules, next to the published formulas?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(drawing("bubble", "Bubbles, measured and by the formulas", "{schedule}", predicted=True),),
    on_request=True,
)

if __name__ == "__main__":
    main()
