"""Bubbles of pipeline schedules on two processes, next to V3's formulas.

Two processes of one thread each, on the CPU and in FP32, train a small model of eight equal MoE blocks through each
schedule, with eight micro-batches a step. They send by gloo on the loopback interface. A bubble is the share of the
time in which a rank computes nothing. The formulas are those of table 2 of the DeepSeek-V3 report, with the median
seconds of forwards and backwards from the record. The first stage's backward of the input computes nothing, because
tokens have no gradient. pipeline/schedules.json has the median step of each schedule, for ui.perfetto.dev or
chrome://tracing.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.claims.study import run_module
from benchmarks.question import Case, Figure, Question, Setting, drawing, figure, left_out, pick
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.atomic import write_text
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


class Row(NamedTuple):
    """An action of a rank with its start and its end, in any unit of time."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


def bubble_share(rows: Iterable[Row]) -> float:
    """Return the time in which ranks compute nothing, of the time of all ranks."""
    ranks, _, _, _, starts, ends = zip(*rows, strict=True)
    busy = sum(ends) - sum(starts)
    return 1 - busy / ((max(ranks) + 1) * (max(ends) - min(starts)))


def formula(name: ScheduleName, n_ranks: int, n_microbatches: int, f: float, i: float, w: float) -> float:
    """Return the share of the published bubble, with the times of a forward, and of both parts of a backward.

    Times are of one stage and micro-batch. For ZBV this is the formula of ZB1P, and for DualPipeV that of DualPipe on
    twice as many ranks. Both hold where F, I and W are equal; otherwise the bubble may be shorter.

    Source: DeepSeek-V3 report, table 2: (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W), with PP stages.
    """
    bubble = {
        "1f1b": (n_ranks - 1) * (f + i + w),
        "interleaved1f1b": (n_ranks - 1) * (f + i + w),
        "zero_bubble": (n_ranks - 1) * (f + i - w),
        "zbv": (n_ranks - 1) * (f + i - w),
        "dualpipev": (n_ranks - 1) * (f + 2 * i - w),
    }[name]
    return bubble / (bubble + n_microbatches * CHUNKS[name] * (f + i + w))


KINDS = {"F": "forward", "B": "backward, whole", "I": "backward of the input", "W": "backward of the weights"}
"""Words of each kind of action."""


def trace(steps: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return steps by name in the format of Chrome's traces: a process for each, a thread for each rank."""
    events: list[dict[str, Any]] = []
    for pid, (name, rows) in enumerate(steps.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        begun = min(row.start for row in rows)
        for row in rows:
            at = {"ts": 1e6 * (row.start - begun), "dur": 1e6 * (row.end - row.start), "pid": pid, "tid": row.rank}
            args = {"stage": row.stage, "microbatch": row.microbatch}
            events.append({"ph": "X", "name": f"{KINDS[row.kind]} {row.microbatch}", **at, "args": args})
    return {"traceEvents": events}


# --- the processes: `python -m benchmarks.questions.pipeline SIZE` on each rank; schedules take turns step by step


class Size(NamedTuple):
    """Sizes of the steps."""

    sequences: int
    """Sequences of a micro-batch."""
    tokens: int
    """Tokens of a sequence."""
    warm: int
    """Steps before those that are recorded."""
    steps: int


FULL, QUICK = Size(2, 256, 2, 5), Size(1, 128, 1, 5)


class Step(NamedTuple):
    """A step of a schedule."""

    seconds: float
    """Time of the whole step, with the loader and the optimizer: that of the slower rank."""
    rows: list[Row]
    """Actions of all ranks."""


@contextmanager
def record_timeline(schedule: Any) -> Iterator[list[Row]]:
    """Yield a list that gets a row for each action of this rank's stages, in order, in seconds.

    Times include none of the communication. The processes of one machine have one clock.
    """
    rows: list[Row] = []
    stages: list[Any] = getattr(schedule, "_stages", None) or [schedule._stage]
    kinds = {"forward_one_chunk": "F", "backward_one_chunk": "", "backward_weight_one_chunk": "W"}

    def watched(stage: Any, method: str, kind: str) -> Callable[..., Any]:
        run = getattr(stage, method)

        def timed(part: int, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = run(part, *args, **kwargs)
            what = kind or ("B" if kwargs.get("full_backward", True) else "I")
            rows.append(Row(stage.group_rank, what, stage.stage_index, part, start, time.perf_counter()))
            return result

        return timed

    for stage, (method, kind) in itertools.product(stages, kinds.items()):
        setattr(stage, method, watched(stage, method, kind))
    try:
        yield rows
    finally:
        for stage, method in itertools.product(stages, kinds):
            delattr(stage, method)


def record(size: Size) -> dict[ScheduleName, list[Step]]:
    """Return the recorded steps of each schedule.

    Raises: RuntimeError with the messages of a process that fails.
    """
    launch = ("--standalone", "--nproc-per-node", str(RANKS), "-m", "benchmarks.questions.pipeline")
    said = run_module("torch.distributed.run", *launch, json.dumps(size), OMP_NUM_THREADS="1")
    found: dict[ScheduleName, list[Any]] = json.loads(said.splitlines()[-1])
    return {name: [Step(seconds, list(map(Row._make, rows))) for seconds, rows in of] for name, of in found.items()}


def run_steps(world: World, size: Size) -> dict[ScheduleName, list[Step]]:
    """Train with each schedule in turns. Return the recorded steps, on every rank."""
    trainers: dict[ScheduleName, Trainer] = {}
    for name in CHUNKS:
        trainers[name] = _trainer(ParallelConfig(pp=RANKS, schedule=name), size)
    found: dict[ScheduleName, list[Step]] = {name: [] for name in CHUNKS}
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
    config = RunConfig(model=MODEL, train=train, parallel=parallel)
    parallel.check(config.model, config.train, RANKS)
    text = np.random.default_rng(0).integers(0, 256, 64 * size.tokens * PARTS, np.uint8)
    corpus = Corpus(train=text, val=text[: 4 * size.tokens], source="", files=1, skipped=0, split="", sha256="")
    torch.manual_seed(0)
    model = Transformer(config.model, compute_dtype=torch.float32)
    return Trainer(model, corpus, config, torch.device("cpu"), Mesh(parallel))


def main() -> None:
    """Be one rank. Rank 0 prints the steps."""
    torch.set_num_threads(1)
    with joined(TIMEOUT) as world:
        found = run_steps(world, Size(*json.loads(sys.argv[1])))
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
    """Train on two processes, yield the bubbles of the record and the seconds of whole steps, and save time lines."""
    if reason := why_not():
        yield from (left_out("bubble", {"schedule": name}, reason) for name in CHUNKS)
        return
    lines: dict[str, list[Row]] = {}
    for name, steps in record(size).items():
        taken: dict[str, list[float]] = {}
        for row in (row for step in steps for row in step.rows):
            taken.setdefault(row.kind, []).append(row.end - row.start)
        middle = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
        # a schedule with whole backwards alone has no halves; all is backward of the input then
        times = middle["F"], middle.get("I", middle.get("B", 0.0)), middle.get("W", 0.0)
        shares, note = [bubble_share(step.rows) for step in steps], "time lines: pipeline/schedules.json"
        yield figure("bubble", {"schedule": name}, shares, predicted=formula(name, RANKS, PARTS, *times), note=note)
        whole = [step.seconds for step in steps]
        yield figure("step_seconds", {"schedule": name}, whole, note="with the loader and the optimizer")
        lines[name] = min(steps, key=lambda step: abs(step.seconds - statistics.median_low(whole))).rows
    folder = setting.out / "pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "schedules.json", json.dumps(trace(lines)))


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
