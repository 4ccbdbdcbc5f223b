"""A small run whose steps take milliseconds, and a trainer of steps whose costs and clock are invented."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config import DataConfig
from dsmini.diagnosis import training
from dsmini.diagnosis.arms import Arm, Step
from dsmini.diagnosis.contention import Contention
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.findings import Finding
from dsmini.diagnosis.training import Subject
from dsmini.measure.price import Prices
from dsmini.nn import MoE
from dsmini.training.trainer import StepResult, Trainer
from tests.helpers.corpora import TEXTS, lay_out, load
from tests.helpers.questions import InventedPrices

CPU = torch.device("cpu")
SIZES: dict[str, Any] = dict(dim=32, inter_dim=40, moe_inter_dim=16, n_layers=2, n_heads=2, q_lora_rank=16)
SIZES |= dict(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8)
SIZES |= dict(n_activated_experts=2, n_expert_groups=1, n_limited_groups=1, n_mtp_layers=1)
MODEL = ModelConfig(**SIZES, max_seq_len=8)
QUIET = Contention(others=0.0)
RUN = RunConfig(model=MODEL, train=TrainConfig(batch_size=4, dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Return a subject of the small model, with multi-token prediction, in FP32; every test leaves it as it was."""
    place = tmp_path_factory.mktemp("subject")
    lay_out(place / "texts", TEXTS)
    torch.manual_seed(0)
    trainer = Trainer(Transformer(MODEL, compute_dtype=torch.float32), load(place), RUN, CPU)
    yield Subject(trainer)
    trainer.loader.close()


@pytest.fixture(scope="session")
def prices() -> Prices:
    """Return an invented machine."""
    return InventedPrices()


def arm_of(subject: Subject | DecodingSubject, name: str) -> Arm:
    return next(arm for arm in subject.arms(None) if arm.name == name)


def decoding_subject(batch: int = 1, context: int = 64, **changes: Any) -> DecodingSubject:
    """Return a subject that decodes with random weights, in FP32."""
    torch.manual_seed(0)
    config = dataclasses.replace(MODEL, **{"max_seq_len": 160, **changes})
    return DecodingSubject(Transformer(config, compute_dtype=torch.float32).eval(), batch, context)


def idle() -> AbstractContextManager[Step]:
    """Return the context of an arm that takes no time."""
    return nullcontext(lambda base: base)


def step_of(seconds: float = 0.1, wait: float = 0.0, counts: Any = None) -> StepResult:
    """Return a step that took these seconds, and waited for a share of them."""
    losses: dict[str, Any] = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
    load = None if counts is None else torch.tensor(counts)
    return StepResult(step=1, tokens=32, seconds=seconds, data_wait=wait, counts=load, skipped=False, **losses)


@dataclasses.dataclass(kw_only=True)
class World:
    """A trainer whose steps take what its state costs, by a clock that only they move.

    The state is seen from outside: who gives batches, which layers are there, threads and dtype.
    """

    computing: float = 0.1
    """Seconds of a step on one thread, without anything below."""
    row: float = 0.0
    """Seconds more for each sequence of a batch."""
    batch: float = 0.0
    """Seconds of a worker to prepare a batch, while steps compute."""
    workers: int = 1
    stalls: Sequence[float] = (0.0,)
    """Seconds that the loader blocks each step, step by step, again and again."""
    preparing: float = 0.0
    """CPU seconds of preparing a batch, which a step takes longer."""
    routing: float = 0.0
    """Seconds more where there are experts at all."""
    cores: int = 1
    crowding: float = 1.0
    """Factor by which a step is slower on several cores than it should be."""
    slow_dtype: float = 1.0
    """Factor by which FP32 is slower than BF16."""
    seen: Contention = QUIET
    """Load of other programs."""
    counts: Any = None
    """Loads of experts that steps report."""
    jitter: float = 0.01
    """Share of a step that is chance."""
    now: float = 0.0
    cpu: float = 0.0
    steps_done: int = 0
    sequences: int = 0

    def __post_init__(self) -> None:
        self.config = dataclasses.replace(RUN, data=DataConfig(workers=self.workers))
        self.model, self.device = Transformer(MODEL, compute_dtype=torch.float32), CPU
        self.own = self.loader = SimpleNamespace(prepared=self.prepare)
        self.corpus = SimpleNamespace(source="no text")
        self.free, self.queue = [0.0] * self.workers, list[float]()
        self.draw, self.blocked = np.random.default_rng(0), itertools.cycle(self.stalls)

    def prepare(self, request: tuple[int, int]) -> None:
        self.cpu += self.preparing

    def spend(self, seconds: float) -> float:
        """Let a time pass, with its chance."""
        seconds *= 1 + self.jitter * self.draw.standard_normal()
        self.now += seconds
        return seconds

    def compute(self) -> float:
        """Return the seconds of a forward and backward in the state that the run has now."""
        seconds = self.computing + self.row * self.config.train.batch_size
        seconds += self.routing * any(isinstance(m, MoE) for m in self.model.modules())
        used = min(torch.get_num_threads(), self.cores)
        seconds *= self.crowding if used > 1 else 1.0
        return seconds / used * (self.slow_dtype if self.model.compute_dtype == torch.float32 else 1.0)

    def forward_backward(self, rows: int) -> None:
        self.spend(self.compute())

    def wait(self) -> float:
        """Return the seconds until the next batch is there. Each worker prepares one of the next, as a Loader does."""
        while len(self.queue) < 1 + self.workers:
            worker = self.free.index(min(self.free))
            self.free[worker] = max(self.now, self.free[worker]) + self.batch
            self.queue.append(self.free[worker])
        return max(0.0, self.queue.pop(0) - self.now) + next(self.blocked)

    def step(self) -> StepResult:
        waited = taken = 0.0
        if self.loader is self.own:
            self.loader.prepared((0, 1))
            waited, taken = self.wait(), self.preparing
            self.now += waited
        seconds = waited + self.spend(self.compute() + taken)
        return step_of(seconds, waited / seconds, self.counts)


class Imagined(Subject):
    """A run in a world of its own, whose text has the findings that are given."""

    found: Sequence[Finding] = ()

    def look(self) -> list[Finding]:
        return [*self.found]

    @property
    def world(self) -> World:
        world: Any = self.trainer
        return world


Imagine = Callable[..., Imagined]


@pytest.fixture
def imagine(monkeypatch: pytest.MonkeyPatch) -> Imagine:
    """Return the maker of a run in a world of these costs, which has the clock and the machine until the test ends."""

    def make(**costs: Any) -> Imagined:
        world: Any = World(**costs)
        monkeypatch.setattr(time, "perf_counter", lambda: world.now)
        monkeypatch.setattr(time, "thread_time", lambda: world.cpu)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(world.cores), raising=False)
        monkeypatch.setattr("dsmini.machine._core_limits", lambda: ())
        monkeypatch.setattr(training, "fastest_dtype", lambda _: "bfloat16" if world.slow_dtype > 1 else "float32")
        monkeypatch.setattr(training, "watch", lambda *_: lambda: world.seen)
        return Imagined(world)

    return make
