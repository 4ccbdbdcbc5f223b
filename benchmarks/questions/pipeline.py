"""Bubbles of pipeline schedules on two processes.

Two processes of one thread each, on the CPU and in FP32, train a small model of eight equal MoE blocks through each
schedule, with eight micro-batches a step. They send by gloo on the loopback interface. The simulation takes the median
seconds of forwards and backwards from the record, and sends in no time. The formulas are those of table 2 of the
DeepSeek-V3 report, with the same seconds. A bubble is the share of the time in which a rank computes nothing. The first
stage's backward of the input computes nothing, because tokens have no gradient.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.claims.study import run_module
from benchmarks.question import Case, Figure, Question, Setting, drawing, figure, left_out, pick
from benchmarks.schedules import Row, Timeline, bubble_formula, draw, programs, record_timeline, simulate
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
PREDICTIONS = ("simulation", "formula")


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


FULL, QUICK = Size(), Size(sequences=1, tokens=128, warm=1)


class Step(NamedTuple):
    """A step of a schedule."""

    seconds: float
    """Time of the whole step, with the loader and the optimizer: that of the slower rank."""
    rows: list[Row]
    """Actions of all ranks."""


# --- the processes: `python -m benchmarks.questions.pipeline SIZE` on each rank; schedules take turns step by step


def record(size: Size) -> dict[str, list[Step]]:
    """Return the recorded steps of each schedule.

    Raises: RuntimeError with the messages of a process that fails.
    """
    launch = ("--standalone", "--nproc-per-node", str(RANKS), "-m", "benchmarks.questions.pipeline")
    said = run_module("torch.distributed.run", *launch, json.dumps(dataclasses.asdict(size)), OMP_NUM_THREADS="1")
    found: dict[str, list[Any]] = json.loads(said.splitlines()[-1])
    return {name: [Step(seconds, list(map(Row._make, rows))) for seconds, rows in of] for name, of in found.items()}


def run_steps(world: World, size: Size) -> dict[str, list[Step]]:
    """Train with each schedule in turns. Return the recorded steps, on every rank."""
    trainers = {name: _trainer(ParallelConfig(pp=RANKS, schedule=name), size) for name in CHUNKS}
    found: dict[str, list[Step]] = {name: [] for name in CHUNKS}
    for turn in range(-size.warm, size.steps):
        for name, trainer in trainers.items():
            passes = trainer.pipeline
            assert isinstance(passes, Pipeline), "pp is 2"
            world.gather(None)  # both ranks start together
            start = time.perf_counter()
            with record_timeline(passes.schedule(size.sequences, size.tokens, PARTS)) as rows:
                trainer.step()
            both = world.gather((time.perf_counter() - start, rows))
            if turn >= 0:
                found[name].append(Step(max(seconds for seconds, _ in both), [row for _, rows in both for row in rows]))
    return found


def _trainer(parallel: ParallelConfig, size: Size) -> Trainer:
    """Return a trainer of random text, in FP32."""
    batch: Any = {"batch_size": size.sequences * PARTS, "grad_accum": PARTS, "seq_len": size.tokens}
    train = TrainConfig(steps=100, optimizer="adamw", dtype="float32", threads=1, **batch)
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


# --- the question


def cases(setting: Setting) -> list[Case]:
    size = QUICK if setting.quick else FULL
    key = f"ranks={RANKS} parts={PARTS} dim={size.model.dim} layers={size.model.n_layers} "
    key += f"sequences={size.sequences} tokens={size.tokens} steps={size.steps}"
    return [Case(key=key, seconds=25.0 if setting.quick else 60.0, run=partial(measure, setting, size))]


def why_not() -> str:
    """Return the reason why no pipeline runs here; empty if it does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch has no torch.distributed with gloo"
    return f"{RANKS} ranks need {RANKS} processor cores, and there is {cores}" if cores < RANKS else ""


def measure(setting: Setting, size: Size) -> Iterator[Figure]:
    if reason := why_not():
        yield from (left_out("bubble", {"schedule": name}, reason) for name in CHUNKS)
        return
    folder = setting.out / "pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    for name, steps in record(size).items():
        simulated, formula = predicted(name, steps)
        lines = [Timeline.measured(step.rows) for step in steps]
        middle = sorted(lines, key=lambda line: line.total)[len(lines) // 2]
        draw({f"{name}, measured": middle, f"{name}, simulated": simulated}, folder / f"{name}.png")
        shares, note = [line.bubble_share for line in lines], f"time lines: {folder / name}.png"
        for of, share in zip(PREDICTIONS, (simulated.bubble_share, formula), strict=True):
            yield figure("bubble", {"schedule": name, "predicted by": of}, shares, predicted=share, note=note)
        yield figure("seconds", {"schedule": name}, [line.total for line in lines], predicted=simulated.total)
        whole = [step.seconds for step in steps]
        yield figure("step_seconds", {"schedule": name}, whole, note="with the loader and the optimizer")


def predicted(name: str, steps: Sequence[Step]) -> tuple[Timeline, float]:
    """Return the simulated time line, and the share of bubbles by the formula, from the median seconds of actions.

    A schedule with whole backwards alone has no halves; all is backward of the input then.
    """
    taken: dict[str, list[float]] = {}
    for row in (row for step in steps for row in step.rows):
        taken.setdefault(row.kind, []).append(row.end - row.start)
    middle = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
    times = middle["F"], middle.get("I", middle.get("B", 0.0)), middle.get("W", 0.0)
    line = simulate(programs(name, RANKS, PARTS), *times)
    formula = bubble_formula(name, RANKS, *times)
    busy = line.total - statistics.fmean(line.bubbles)
    return line, formula / (busy + formula)


def answer(figures: list[Figure]) -> str:
    told = []
    for name in CHUNKS:
        by = {str(f.case["predicted by"]): f for f in pick(figures, "bubble", schedule=name) if f.measured is not None}
        if by:
            expected = [f"{of} {f.predicted:.0%}" for of, f in by.items()]
            told.append(f"{name} {next(iter(by.values())).measured:.0%} ({', '.join(expected)})")
    seconds = {str(f.case["schedule"]): f.measured for f in pick(figures, "step_seconds") if f.measured}
    if seconds:
        fastest = min(seconds, key=lambda name: seconds[name])
        told.append(f"the fastest step is that of {fastest}, {seconds[fastest]:.3g} s")
    return f"Bubbles on {RANKS} ranks: {'; '.join(told)}." if told else ""


QUESTION = Question(
    name="pipeline",
    title="How large are the bubbles of pipeline schedules, next to the published formulas and to the simulation?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing(
            "bubble",
            "Bubbles, measured and predicted",
            by="predicted by",
            label="{schedule}",
            y="share of the time",
            predicted=True,
        ),
    ),
    on_request=True,
)

if __name__ == "__main__":
    main()
