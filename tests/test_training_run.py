"""A whole run: stopping at any moment, and giving up."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.checkpoint.run_folder import new_run_folder
from dsmini.checkpoint.training import load_run
from dsmini.data import Corpus
from dsmini.trainer import Trainer
from dsmini.training_run import TrainingRun


@pytest.fixture
def training(small_config: Callable[..., ModelConfig], tmp_path: Path) -> TrainingRun:
    train = TrainConfig(steps=20, batch_size=2, seq_len=16, eval_every=3, dtype="float32", device="cpu")
    config = RunConfig(model=small_config(), train=train, out=tmp_path)
    text = np.frombuffer(bytes(7 * i % 61 for i in range(1000)), np.uint8)
    corpus = Corpus(train=text[:900], val=text[900:], source="", files=1, skipped=0, split="", sha256="")
    (tmp_path / "config.toml").write_text(config.to_toml())
    trainer = Trainer(Transformer(config.model), corpus, config, torch.device("cpu"))
    return TrainingRun(config, trainer, Console(quiet=True))


@pytest.mark.parametrize("moment", ["step", "validate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_stops_after_a_step_and_saves(
    training: TrainingRun, monkeypatch: pytest.MonkeyPatch, moment: str, number: signal.Signals
) -> None:
    real = getattr(training.trainer, moment)

    def interrupted(*args: object, **kwargs: object) -> object:
        os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(training.trainer, moment, interrupted)
    before = signal.getsignal(number)
    assert not training.train()
    assert signal.getsignal(number) == before
    done = training.trainer.steps_done
    assert done == {"step": 1, "validate": 4}[moment]
    assert len((training.folder / "metrics.jsonl").read_text().splitlines()) == done
    model, _ = load_run(training.folder)
    saved, live = model.state_dict(), training.trainer.model.state_dict()
    assert all(torch.equal(saved[name], live[name]) for name in live)


def test_steps_without_a_finite_gradient_end_the_run_with_the_model_saved(training: TrainingRun) -> None:
    training.trainer.model.head.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(ArithmeticError, match="no finite gradient in the 10 steps up to step 10; lower"):
        training.train()
    assert (training.folder / "checkpoints/step-000010/model.safetensors").exists()


def test_what_is_drawn_are_shares_of_the_mean_load(training: TrainingRun) -> None:
    assert training.train()
    loads = torch.tensor(training._loads())
    assert loads.shape == (3, 8)
    assert torch.allclose(loads.mean(1), torch.ones(3))
    training.plot()
    assert (training.folder / "expert_load.png").exists()


def test_default_folders_are_numbered_and_never_shared(tmp_path: Path) -> None:
    first, second = (new_run_folder(None, "toy", tmp_path) for _ in range(2))
    assert (first.name, second.name) == ("toy-001", "toy-002")
    (tmp_path / "toy-017").mkdir()
    assert new_run_folder(None, "toy", tmp_path).name == "toy-018"


def test_validation_at_the_end_reads_the_whole_split(training: TrainingRun) -> None:
    short = dataclasses.replace(training.config.train, steps=1, eval_tokens=16)
    training.config = training.trainer.config = dataclasses.replace(training.config, train=short)
    training.train()
    assert training.rows[-1]["val_loss"] == pytest.approx(training.trainer.validate(), rel=1e-6)
    assert training.rows[-1]["val_loss"] != pytest.approx(training.trainer.validate(16), rel=1e-6)
