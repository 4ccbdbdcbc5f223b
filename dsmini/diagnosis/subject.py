"""The subject: a training run to experiment on, in memory. The folder of a run that is diagnosed is only read."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dsmini.checkpoint.run_folder import read_summary, run_config, tokenizer_file
from dsmini.checkpoint.training_state import checkpoint_folders, last_checkpoint
from dsmini.config import RunConfig
from dsmini.data.corpus import load_corpus
from dsmini.data.documents import ProgressCallback, silent
from dsmini.machine import DTYPES, pick_device
from dsmini.nn import Block, Transformer
from dsmini.training.part_memory import refuse_oversized
from dsmini.training.schedule import batch_size
from dsmini.training.start import resolved
from dsmini.training.trainer import StepResult, Trainer


class Subject:
    """A Trainer whose steps are taken for their time. Its schedules stand still: every step is the same work."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.at = trainer.steps_done
        self.rows = batch_size(self.at, trainer.config.train)

    @property
    def config(self) -> RunConfig:
        return self.trainer.config

    @property
    def device(self) -> torch.device:
        return self.trainer.device

    def step(self) -> StepResult:
        """Take one optimizer step, and return to the same place of the schedules."""
        result = self.trainer.step()
        self.trainer.steps_done = self.at
        return result

    def forward_backward(self) -> float:
        """Return the seconds of a forward and backward without an update."""
        start = time.perf_counter()
        self.trainer.forward_backward(self.rows)
        seconds = time.perf_counter() - start
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return seconds

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks with a mixture of experts, those of multi-token prediction too."""
        yield from (m for m in self.trainer.model.modules() if isinstance(m, Block) and hasattr(m.ffn, "gate"))

    @cached_property
    def one_batch(self) -> tuple[Tensor, Tensor]:
        """Batch that is prepared once."""
        return self.trainer.loader.prepared((self.trainer.sequences, self.rows))

    @contextmanager
    def loader(self, take: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Let the trainer take its batches from another function."""
        loader = self.trainer.loader
        self.trainer.loader = Stub(take)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            self.trainer.loader = loader


@dataclasses.dataclass(frozen=True)
class Stub:
    """The part of a loader that a trainer asks for."""

    take: Callable[..., tuple[Tensor, Tensor]]


def subject_of(config: RunConfig, run: Path | None, progress: ProgressCallback = silent) -> Subject:
    """Make the subject of a config, or of an unfinished run from its last checkpoint.

    Args:
        run: folder of the run that the config comes from; None: a new run with random weights.

    Raises: ValueError for a run that is finished or damaged, and a text that is missing or too short.
    """
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    refuse_oversized(config, device)
    config = resolved(config, device)
    data, cache = config.data, Path("runs/corpus") if run is None else run.parent / "corpus"
    if run is not None:
        if (run / "summary.json").exists() and not read_summary(run):
            raise ValueError(f"{run}/summary.json is damaged; remove it, or diagnose the config of the run")
        if read_summary(run):
            raise ValueError(
                f"{run} is finished; diagnose its config instead: python -m dsmini.diagnose {run}/config.toml"
            )
        data = dataclasses.replace(data, tokenizer=tokenizer_file(run, config))
    corpus = load_corpus(data, config.seq_len, config.model.vocab_size, cache, config.train.seed, progress=progress)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model, compute_dtype=DTYPES[config.train.dtype]).to(device)
    trainer = Trainer(model, corpus, config, device)
    if run is not None and checkpoint_folders(run):
        _load(trainer, run)
    return Subject(trainer)


def config_of(path: Path | None) -> tuple[RunConfig, Path | None]:
    """Return the config that a path names, and the run's folder if it is one.

    Raises: ValueError for a path that is neither.
    """
    if path is None:
        return RunConfig(), None
    if path.is_dir():
        return run_config(path), path
    return RunConfig.from_file(path), None


def _load(trainer: Trainer, run: Path) -> None:
    parts = ["model", "optimizer", *([] if trainer.average is None else ["average"])]
    notes: list[str] = []
    checkpoint = last_checkpoint(run, parts, lambda found: trainer.check(found.tensors), notes.append)
    if notes:
        raise ValueError(f"{run} is damaged: {notes[0]}; resume it once, or name an older copy")
    state = checkpoint.state
    trainer.load(
        checkpoint.tensors,
        steps_done=min(state.step, trainer.config.train.steps - 1),
        sequences=state.sequences,
        average_updates=state.average_updates,
    )
