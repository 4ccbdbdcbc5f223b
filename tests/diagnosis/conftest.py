"""A small run whose steps take milliseconds, the same run with a clock of its own, and an invented machine."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.diagnosis import training
from dsmini.diagnosis.arms import Step
from dsmini.diagnosis.contention import Contention
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.training import Subject
from dsmini.measure.price import Prices
from dsmini.nn import MoE
from dsmini.training.trainer import StepResult, Trainer
from tests.helpers.corpora import TEXTS, load
from tests.helpers.questions import InventedPrices

SIZES: dict[str, Any] = dict(dim=32, inter_dim=40, moe_inter_dim=16, n_layers=2, n_heads=2, q_lora_rank=16)
SIZES |= dict(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8)
SIZES |= dict(n_activated_experts=2, n_expert_groups=1, n_limited_groups=1, n_mtp_layers=1)
MODEL = ModelConfig(**SIZES, max_seq_len=8)


@pytest.fixture(scope="package")
def default(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Load the default corpus."""
    return load_corpus(DataConfig(), 256, 256, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Return a subject of the small model, with multi-token prediction, in FP32; every test leaves it as it was."""
    place = tmp_path_factory.mktemp("subject")
    (place / "texts").mkdir()
    for name, text in TEXTS.items():
        (place / "texts" / name).write_bytes(text)
    torch.manual_seed(0)
    config = RunConfig(model=MODEL, train=TrainConfig(batch_size=4, dtype="float32", device="cpu"))
    trainer = Trainer(Transformer(MODEL, compute_dtype=torch.float32), load(place), config, torch.device("cpu"))
    yield Subject(trainer)
    trainer.loader.close()


@pytest.fixture(scope="session")
def prices() -> Prices:
    """Return an invented machine whose process takes 1,000 bytes besides its tensors."""
    return InventedPrices(process=1000)


@pytest.fixture
def decoding() -> DecodingSubject:
    """Return a subject of the small model that decodes 2 sequences after 64 tokens, in FP32."""
    return decoding_subject(dataclasses.replace(MODEL, max_seq_len=160), batch=2)


def decoding_subject(config: ModelConfig, batch: int = 1, context: int = 64) -> DecodingSubject:
    """Return a subject that decodes with random weights, in FP32."""
    torch.manual_seed(0)
    model = Transformer(config, compute_dtype=torch.float32).eval()
    return DecodingSubject(model, batch, context)


def idle() -> AbstractContextManager[Step]:
    """Return the context of an arm that takes no time."""
    return nullcontext(lambda base: base)


def step_of(seconds: float = 0.1, wait: float = 0.0, counts: Any = None, tokens: int = 32) -> StepResult:
    """Return a step that took these seconds, and waited for a share of them."""
    losses: dict[str, Any] = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
    load = None if counts is None else torch.tensor(counts)
    return StepResult(step=1, tokens=tokens, seconds=seconds, data_wait=wait, counts=load, skipped=False, **losses)


@dataclasses.dataclass(kw_only=True)
class World:
    """A machine on which steps of a run take what the run's state costs, by a clock that only they move.

    The state is seen from outside: who gives batches, what gates choose, which layers are there, threads and dtype.
    """

    subject: Subject
    computing: float = 0.1
    """Seconds of a step on one thread, without anything below."""
    row: float = 0.0
    """Seconds more for each sequence of a batch."""
    batch: float = 0.0
    """Seconds of a worker to prepare a batch, while steps compute."""
    workers: int = 1
    stalls: tuple[float, ...] = ()
    """Seconds that the loader blocks each step, step by step, again and again."""
    preparing: float = 0.0
    """CPU seconds of preparing a batch, which a step takes longer."""
    routing: float = 0.0
    """Seconds more where there are experts at all."""
    cores: int = 1
    slow_dtype: float = 1.0
    """Factor by which FP32 is slower than BF16."""
    others: float = 0.0
    """Cores that other programs keep busy, which slows the probes by as much."""
    counts: Any = None
    """Loads of experts that steps report."""
    noise: Callable[[], float] = lambda: 0.0
    """Seconds that a step takes besides."""
    jitter: float = 0.01
    """Share of a step that is chance."""
    now: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.loader, self.draw = self.subject.trainer.loader, np.random.default_rng(0)
        self.free, self.queue, self.blocked = (
            [0.0] * self.workers,
            list[float](),
            itertools.cycle(self.stalls or (0.0,)),
        )

    def enter(self, patch: pytest.MonkeyPatch) -> "World":
        """Let steps of the subject take their time from here."""
        fastest = "bfloat16" if self.slow_dtype > 1 else "float32"
        trainer, config, prepared = self.subject.trainer, self.subject.config, self.loader.prepared
        data = dataclasses.replace(config.data, workers=self.workers)
        patch.setattr(trainer, "config", dataclasses.replace(config, data=data))
        patch.setattr(time, "perf_counter", lambda: self.now)
        patch.setattr(time, "thread_time", lambda: self.cpu)
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(self.cores)), raising=False)
        patch.setattr(training, "fastest_dtype", lambda _: fastest)
        seen = Contention(others=self.others, steadiness=1 - self.others / self.cores)
        patch.setattr(training, "watch", lambda *_: lambda: seen)
        patch.setattr(trainer, "step", self.step)
        patch.setattr(trainer, "forward_backward", lambda rows: self.spend(self.compute()))
        patch.setattr(self.loader, "prepared", lambda request: (self.prepare(), prepared(request))[1])
        patch.setattr(self.subject, "turns", [])
        return self

    def spend(self, seconds: float) -> float:
        """Let a time pass, with its chance and the noise."""
        seconds = seconds * (1 + self.jitter * self.draw.standard_normal()) + self.noise()
        self.now += seconds
        return seconds

    def prepare(self) -> None:
        self.cpu += self.preparing

    def compute(self) -> float:
        """Return the seconds of a forward and backward in the state that the run has now."""
        model = self.subject.trainer.model
        seconds = self.computing + self.row * self.subject.config.train.batch_size
        if any(isinstance(m, MoE) for m in model.modules()):
            seconds += self.routing
        seconds /= min(torch.get_num_threads(), self.cores)
        return float(seconds * (self.slow_dtype if model.compute_dtype == torch.float32 else 1.0))

    def wait(self) -> float:
        """Return the seconds until the next batch is there. Each worker prepares one of the next, as a Loader does."""
        while len(self.queue) < 1 + self.workers:
            worker = self.free.index(min(self.free))
            self.free[worker] = max(self.now, self.free[worker]) + self.batch
            self.queue.append(self.free[worker])
        return max(0.0, self.queue.pop(0) - self.now) + next(self.blocked)

    def step(self) -> StepResult:
        """Take a step."""
        waited = taken = 0.0
        if self.subject.trainer.loader is self.loader:
            self.loader.prepared((0, 1))
            waited, taken = self.wait(), self.preparing
            self.now += waited
        seconds = waited + self.spend(self.compute() + taken)
        return step_of(seconds, waited / seconds, self.counts)


@pytest.fixture
def world(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """Return the maker of a world that the subject's steps are in until the test ends."""
    return lambda **costs: World(subject=subject, **costs).enter(monkeypatch)
