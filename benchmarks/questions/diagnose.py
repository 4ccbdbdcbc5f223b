"""Diagnoses of runs that have a fault, and of healthy ones.

Small training runs get a fault each: a loader that sleeps or unpacks, shuffled labels, a repeated text, a routing bias
that chooses the same experts, tiny experts, one thread, the slower dtype, another program. Others are healthy, or have
something that only looks guilty. Each is diagnosed with some seeds, which change weights, data and the fault itself.
Predictions are made before the experiments.
"""

import dataclasses
import math
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import trainer
from benchmarks.question import Case, Figure, Question, Setting, cases_over, drawing, figure, pick
from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig
from dsmini.diagnosis.arms import patched
from dsmini.diagnosis.diagnosis import Diagnosis, Plan, diagnose
from dsmini.diagnosis.training import Subject
from dsmini.machine import cores, pick_dtype
from dsmini.training.trainer import StepResult

SEEDS, QUICK_SEEDS = 5, 1
ROUNDS = 10
"""Rounds of a diagnosis, however long they take: a run on one thread is five times as slow as others."""
WITHIN = 0.10
"""Largest error of a predicted gain that counts as right."""
LARGE = 0.10
"""Gains above this are also counted by themselves: predicting that little changes is easy."""
LEAST_RIGHT = 4
"""Seeds of five in which a fault must be named rightly."""

# --- what is wrong with a run

SLEEP = 0.1
"""Seconds that a slow loader sleeps; a step takes less."""
PACKED = 24 << 20
"""Bytes that a slow loader unpacks for each batch."""
HOG = "import numpy as np; a = np.ones(1 << 25); b = np.empty_like(a)\nwhile True: np.copyto(b, a)"
"""Reads and writes 512 MB over and over."""
Batch = tuple[Tensor, Tensor]


def sleeping(batch: Batch, seed: int) -> Batch:
    time.sleep(SLEEP)
    return batch


def unpacking(batch: Batch, seed: int) -> Batch:
    zlib.decompress(packed(seed))
    return batch


@cache
def packed(seed: int) -> bytes:
    return zlib.compress(random.Random(seed).randbytes(1 << 16) * (PACKED >> 16), 1)


def shuffled(batch: Batch, seed: int) -> Batch:
    tokens, targets = batch
    draw = torch.Generator().manual_seed(seed)
    return tokens, targets.flatten()[torch.randperm(targets.numel(), generator=draw)].view_as(targets)


def asking() -> None:
    """Ask a tensor for its number many times, which looks slow and is not on a CPU."""
    for _ in range(100):
        torch.ones(1).item()


def printing() -> None:
    """Draw a progress bar into a file."""
    with open(os.devnull, "w") as file:
        print("\r" + "#" * 60, end="", file=file, flush=True)


def skewed(subject: Subject, seed: int) -> AbstractContextManager[object]:
    """Let the bias choose the same experts for all tokens."""
    draw = random.Random(seed)
    for gate in subject.trainer.model.gates():
        assert gate.bias is not None
        gate.bias[draw.sample(range(len(gate.bias)), gate.options["n_activated_experts"])] = 10.0
    return nullcontext()


@contextmanager
def hogged(subject: Subject, seed: int) -> Iterator[None]:
    """Let another program use a core and the memory."""
    hog = subprocess.Popen([sys.executable, "-c", HOG])
    time.sleep(1.0)
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


# --- the runs

FEW: dict[str, Any] = {"n_routed_experts": 4, "n_activated_experts": 2, "n_expert_groups": 1, "n_limited_groups": 1}
MODEL = ModelConfig(dim=96, inter_dim=384, moe_inter_dim=192, n_layers=2, n_mtp_layers=0, **FEW)
"""Few and wide experts, so that routing costs little."""
COMPUTING = dataclasses.replace(MODEL, dim=320, inter_dim=1280, moe_inter_dim=640)
"""Large products, which a second core makes faster."""
TINY_EXPERTS = dataclasses.replace(MODEL, moe_inter_dim=8, n_routed_experts=64, n_activated_experts=32)
"""The active parameters of MODEL's experts but one, in pieces of 8."""
TRAIN = TrainConfig(batch_size=4, optimizer="adamw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A run with something wrong, or nothing."""

    axis: str = ""
    """Axis to be named; "" for a healthy run and for a trap, which only looks guilty."""
    model: ModelConfig = MODEL
    train: TrainConfig = TRAIN
    repeated: bool = False
    """True to train on one page, again and again; False: on the default corpus."""
    loading: Callable[[Batch, int], Batch] = lambda batch, seed: batch
    """Changes each batch as a loader with this fault does, or takes its time."""
    stepping: Callable[[], None] = lambda: None
    """Work of each step besides its own."""
    wrong: Callable[[Subject, int], AbstractContextManager[object]] = lambda subject, seed: nullcontext()
    """Another fault, which lasts until the context ends."""
    slower_dtype: bool = False
    """Products run in FP32 on a machine that multiplies BF16 faster. On others neither dtype is slower."""

    @contextmanager
    def subject(self, seed: int, setting: Setting) -> Iterator[Subject]:
        """Yield a subject with the fault."""
        with ExitStack() as stack:
            data, device = DataConfig(), torch.device("cpu")
            if self.repeated:
                path = Path(stack.enter_context(TemporaryDirectory())) / "text.txt"
                path.write_text(Path(__file__).read_text()[:20_000] * 20)
                data = DataConfig(path=path)
            model, dtype = self.model, torch.float32 if self.slower_dtype else pick_dtype("auto", device)
            here = dataclasses.replace(setting, device=device, dtype=dtype)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.train.threads or cores())
            train = dataclasses.replace(self.train, seed=seed, dtype=here.dtype_name, device="cpu")
            made = Subject(trainer(RunConfig(model=model, data=data, train=train), here))
            stack.callback(made.trainer.loader.close)
            prepare, take = made.trainer.loader.prepared, made.trainer.step

            def step() -> StepResult:
                self.stepping()
                return take()

            loading = patched(made.trainer.loader, "prepared", lambda request: self.loading(prepare(request), seed))
            for changed in (loading, patched(made.trainer, "step", step), self.wrong(made, seed)):
                stack.enter_context(changed)
            yield made


FAULTS = {
    "loader sleeps": Fault(axis="Data", loading=sleeping),
    "loader unpacks": Fault(axis="Data", loading=unpacking),
    "shuffled labels": Fault(axis="Data", loading=shuffled),
    "duplicated text": Fault(axis="Data", repeated=True),
    "skewed router": Fault(axis="Algorithm", model=dataclasses.replace(MODEL, n_routed_experts=16), wrong=skewed),
    "tiny experts": Fault(axis="Algorithm", model=TINY_EXPERTS),
    "thread cap": Fault(axis="Machine", model=COMPUTING, train=dataclasses.replace(TRAIN, threads=1)),
    "slower dtype": Fault(axis="Machine", model=COMPUTING, slower_dtype=True),
    "memory hog": Fault(axis="Machine", wrong=hogged),
    "healthy": Fault(),
    "healthy, dense": Fault(model=dataclasses.replace(MODEL, n_dense_layers=2)),
    "healthy, wider": Fault(model=dataclasses.replace(MODEL, dim=192, inter_dim=768, moe_inter_dim=512)),
    "trap: item()": Fault(stepping=asking),
    "trap: progress bar": Fault(stepping=printing),
}

# --- the question


def cases(setting: Setting) -> list[Case]:
    fp32 = pick_dtype("auto", torch.device("cpu")) == torch.float32
    names = [name for name, fault in FAULTS.items() if not (fp32 and fault.slower_dtype)]
    points = [(name, seed) for seed in range(QUICK_SEEDS if setting.quick else SEEDS) for name in names]
    return cases_over("run={} seed={}", points, 30.0, partial(measure, setting))


def measure(setting: Setting, name: str, seed: int) -> Iterator[Figure]:
    """Yield whether the fault was named, and each gain with its prediction."""
    fault = FAULTS[name]
    with fault.subject(seed, setting) as subject:
        found: Diagnosis = diagnose(subject, Plan(seconds=math.inf, rounds=ROUNDS), setting.prices)
    want, got = fault.axis or "nothing", found.named or "nothing"
    case = {"run": name, "seed": seed, "want": want, "got": got}
    yield figure("right", case, float(want == got), note=found.verdict.outcome)
    for arm in found.compared.measured:
        predicted, gain = found.compared.predicted_gain(arm), found.gains[arm.name]
        if predicted is not None and gain.is_clear:
            gained = {"run": name, "seed": seed, "free": arm.name, "axis": arm.axis}
            yield figure("gain", gained, gain, predicted=predicted)


def answer(figures: list[Figure]) -> str:
    judged = pick(figures, "right")
    if not judged:
        return ""
    healthy = [f for f in judged if f.case["want"] == "nothing"]
    sick = [f for f in judged if f.case["want"] != "nothing"]
    right, runs = Counter(str(f.case["run"]) for f in sick if f.measured), Counter(str(f.case["run"]) for f in sick)
    named = sum(right[run] * SEEDS >= LEAST_RIGHT * n for run, n in runs.items())
    often = f" in at least {LEAST_RIGHT} of {SEEDS} seeds" if max(runs.values(), default=0) == SEEDS else ""
    text = f"{named} of {len(runs)} faults are named{often}, {sum(right.values())} of {len(sick)} runs; "
    text += f"{sum(f.measured == 0 for f in healthy)} false alarms in {len(healthy)} healthy runs and traps"
    gains = [(f.measured or 0.0, f.predicted or 0.0) for f in pick(figures, "gain")]
    for words, some in (("predicted gains", gains), ("of those above 10 points", [g for g in gains if g[0] > LARGE])):
        near = sum(abs(measured - predicted) <= WITHIN for measured, predicted in some)
        text += f"; {near} of {len(some)} {words} within {WITHIN:.0%} of a step" if some else ""
    return f"{text}."


QUESTION = Question(
    name="diagnose",
    title="Does a diagnosis name the fault that was put into a run, and nothing in a healthy one?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing(
            *("gain", "Gains, measured and predicted, first seed", "{run}: {free}"),
            by="axis",
            only=lambda f: f.case["seed"] == 0,
            predicted=True,
        ),
    ),
    on_request=True,
)
