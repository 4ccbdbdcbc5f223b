"""Faults that are put into a small training run on purpose, healthy runs, and traps that only look guilty.

Each yields a subject that has the fault until the context ends. The seed changes weights, data and the fault itself.
"""

import dataclasses
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import CORPUS
from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.data.corpus import Loader, load_corpus
from dsmini.diagnosis.contention import cores
from dsmini.diagnosis.training import Subject
from dsmini.machine import DTYPES, pick_dtype
from dsmini.training.trainer import Trainer

FEW: dict[str, Any] = {"n_routed_experts": 4, "n_activated_experts": 2, "n_expert_groups": 1, "n_limited_groups": 1}
MODEL = ModelConfig(dim=96, inter_dim=384, moe_inter_dim=192, n_layers=2, n_mtp_layers=0, **FEW)
"""Few and wide experts, so that routing costs little."""
DENSE = dataclasses.replace(MODEL, n_dense_layers=2)
LARGER = dataclasses.replace(MODEL, dim=192, inter_dim=768, moe_inter_dim=512)
COMPUTING = dataclasses.replace(MODEL, dim=320, inter_dim=1280, moe_inter_dim=640)
"""Large products, which a second core makes faster."""
TINY_EXPERTS = dataclasses.replace(MODEL, moe_inter_dim=8, n_routed_experts=64, n_activated_experts=32)
"""As many active parameters as in MODEL's experts less one, in pieces of 8."""
TRAIN = TrainConfig(batch_size=4, optimizer="adamw")
SLEEP = 0.1
"""Seconds that a slow loader sleeps; a step takes less."""
PACKED = 24 << 20
"""Bytes that a slow loader unpacks for each batch."""
HOG = "import numpy as np; a = np.ones(1 << 25); b = np.empty_like(a)\nwhile True: np.copyto(b, a)"
"""Reads and writes 512 MB over and over."""
Wrong = Callable[[Subject, int], AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A run with something wrong, or nothing."""

    name: str
    axis: str
    """Axis to be named; "" for a healthy run and for a trap."""
    model: ModelConfig = MODEL
    train: TrainConfig = TRAIN
    text: str = ""
    """Text to train on; "": the default corpus."""
    wrong: Wrong = lambda subject, seed: nullcontext()
    slower_dtype: bool = False
    """Products run in the one of FP32 and BF16 that this machine does not prefer."""

    @contextmanager
    def subject(self, seed: int) -> Iterator[Subject]:
        """Yield a subject with the fault."""
        with ExitStack() as stack:
            data = DataConfig()
            if self.text:
                folder = Path(stack.enter_context(TemporaryDirectory()))
                (folder / "text.txt").write_text(self.text)
                data = DataConfig(path=folder / "text.txt")
            device = torch.device("cpu")
            dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
            if self.slower_dtype:
                dtype = "bfloat16" if dtype == "float32" else "float32"
            before = torch.get_num_threads()
            stack.callback(torch.set_num_threads, before)
            torch.set_num_threads(self.train.threads or cores())
            train = dataclasses.replace(self.train, seed=seed, dtype=dtype, device="cpu")
            config = RunConfig(model=self.model, data=data, train=train)
            corpus = load_corpus(data, config.seq_len, config.model.vocab_size, CORPUS, seed)
            torch.manual_seed(seed)
            model = Transformer(config.model, compute_dtype=DTYPES[dtype])
            trainer = Trainer(model, corpus, config, device)
            stack.callback(trainer.loader.close)
            made = Subject(trainer)
            stack.enter_context(self.wrong(made, seed))
            yield made


@contextmanager
def _loader(subject: Subject, prepared: Callable[[Loader, tuple[int, int]], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the loader prepare its batches in another way, in its threads."""
    loader = subject.trainer.loader

    class Wrong(Loader):
        def prepared(self, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
            return prepared(loader, request)

    wrong = Wrong(loader.corpus, loader.seq_len, loader.seed, subject.config.data.workers)
    subject.trainer.loader = wrong
    try:
        yield
    finally:
        subject.trainer.loader = loader
        wrong.close()


def _sleeping(subject: Subject, seed: int) -> AbstractContextManager[object]:
    def prepared(loader: Loader, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        time.sleep(SLEEP)
        return loader.prepared(request)

    return _loader(subject, prepared)


def _unpacking(subject: Subject, seed: int) -> AbstractContextManager[object]:
    packed = zlib.compress(random.Random(seed).randbytes(1 << 16) * (PACKED >> 16), 1)

    def prepared(loader: Loader, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        zlib.decompress(packed)
        return loader.prepared(request)

    return _loader(subject, prepared)


def _shuffled(subject: Subject, seed: int) -> AbstractContextManager[object]:
    def prepared(loader: Loader, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        tokens, targets = loader.prepared(request)
        draw = torch.Generator().manual_seed(seed + request[0])
        return tokens, targets.flatten()[torch.randperm(targets.numel(), generator=draw)].view_as(targets)

    return _loader(subject, prepared)


@contextmanager
def _skewed(subject: Subject, seed: int) -> Iterator[None]:
    """Let the bias choose the same experts for all tokens."""
    draw = random.Random(seed)
    for gate in subject.trainer.model.gates():
        assert gate.bias is not None
        gate.bias[draw.sample(range(len(gate.bias)), gate.options["n_activated_experts"])] = 10.0
    yield


@contextmanager
def _hogged(subject: Subject, seed: int) -> Iterator[None]:
    """Let another program use a core and the memory."""
    hog = subprocess.Popen([sys.executable, "-c", HOG])
    time.sleep(1.0)
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


@contextmanager
def _asking(subject: Subject, seed: int) -> Iterator[None]:
    """Ask a tensor for its number many times in a step, which looks slow and is not on a CPU."""
    with _around_steps(subject, lambda: [torch.ones(1).item() for _ in range(100)]):
        yield


@contextmanager
def _printing(subject: Subject, seed: int) -> Iterator[None]:
    """Draw a progress bar in each step, into a file."""
    with TemporaryDirectory() as folder, (Path(folder) / "bar").open("w") as file:

        def draw() -> None:
            print("\r" + "#" * 60, end="", file=file, flush=True)

        with _around_steps(subject, draw):
            yield


@contextmanager
def _around_steps(subject: Subject, also: Callable[[], object]) -> Iterator[None]:
    step = subject.trainer.step

    def with_more() -> object:
        also()
        return step()

    subject.trainer.step = with_more  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del subject.trainer.step


def _repeated_text() -> str:
    """Return a page of this library's own source, again and again."""
    page = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))[:20_000]
    return page * 20


def faults() -> list[Fault]:
    """Return all faults, healthy runs and traps."""
    one_thread = dataclasses.replace(TRAIN, threads=1)
    return [
        Fault(name="loader sleeps", axis="Data", wrong=_sleeping),
        Fault(name="loader unpacks", axis="Data", wrong=_unpacking),
        Fault(name="shuffled labels", axis="Data", wrong=_shuffled),
        Fault(name="duplicated text", axis="Data", text=_repeated_text()),
        Fault(
            name="skewed router", axis="Algorithm", model=dataclasses.replace(MODEL, n_routed_experts=16), wrong=_skewed
        ),
        Fault(name="tiny experts", axis="Algorithm", model=TINY_EXPERTS),
        Fault(name="thread cap", axis="Machine", model=COMPUTING, train=one_thread),
        Fault(name="slower dtype", axis="Machine", model=COMPUTING, slower_dtype=True),
        Fault(name="memory hog", axis="Machine", wrong=_hogged),
        Fault(name="healthy", axis=""),
        Fault(name="healthy, dense", axis="", model=DENSE),
        Fault(name="healthy, wider", axis="", model=LARGER),
        Fault(name="trap: item()", axis="", wrong=_asking),
        Fault(name="trap: progress bar", axis="", wrong=_printing),
    ]
