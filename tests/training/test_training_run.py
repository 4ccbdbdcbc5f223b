"""A whole run: stopping at any moment, and giving up."""

import dataclasses
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.checkpoint.run_folder import new_run_folder
from dsmini.checkpoint.trained_model import load_run
from dsmini.data.corpus import Corpus, Windows
from dsmini.machine import peak_memory
from dsmini.training.optim import ParameterAverage
from dsmini.training.plots import plot_run
from dsmini.training.progress import final_eval_tokens
from dsmini.training.record import KEYS, Row, read_records
from dsmini.training.run import TrainingRun
from dsmini.training.summary import summarise, summary_lines
from dsmini.training.trainer import Trainer
from tests.conftest import Clock


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
    assert done == {"step": 1, "validate": 3}[moment]
    assert len((training.folder / "metrics.jsonl").read_text().splitlines()) == done
    model, _ = load_run(training.folder)
    saved, live = model.state_dict(), training.trainer.model.state_dict()
    assert all(torch.equal(saved[name], live[name]) for name in live)


@pytest.mark.parametrize("moment", ["validation on the way", "final validation", "average"])
def test_signal_in_a_validation_ends_it_and_saves(
    training: TrainingRun, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The first of six blocks is scored. The resumed run scores all of them again."""
    real, blocks, calls = training.trainer.validate, [], []
    due = {"validation on the way": 1, "final validation": 7, "average": 8}[moment]

    def interrupted(windows: Windows, on_part: Callable[[float], None]) -> float:
        def signalled(done: float) -> None:
            if len(calls) == due:
                blocks.append(done)
                os.kill(os.getpid(), TERM)
            on_part(done)

        calls.append(windows)
        return real(windows, tokens_at_a_time=16, on_part=signalled)

    if moment == "average":
        training.trainer.average = ParameterAverage(training.trainer.model.named_parameters(), 0.9)
    live = training.trainer.model.state_dict()
    monkeypatch.setattr(training.trainer, "validate", interrupted)
    assert not training.train()
    assert blocks == [1 / 6] and training.trainer.model.training
    assert training.trainer.steps_done == training.saver.saved_at == (3 if due == 1 else 20)
    assert read_records(training.folder)[-1]["val_loss"] is None
    saved, _ = load_run(training.folder)
    assert all(torch.equal(tensor, live[name]) for name, tensor in saved.state_dict().items())


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def hangups_count() -> Iterator[None]:
    """Make hangups stop a run: under nohup they are ignored, by a run too."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


@pytest.mark.parametrize("moment", ["step", "_keep"])
@pytest.mark.parametrize("numbers", [(TERM, TERM), (TERM, HUP), (HUP, HUP), (TERM, INT), (INT, TERM, HUP), (TERM,) * 5])
@pytest.mark.usefixtures("hangups_count")
def test_signals_in_a_row_lose_no_work(
    training: TrainingRun, monkeypatch: pytest.MonkeyPatch, moment: str, numbers: tuple[int, ...]
) -> None:
    owner = training.trainer if moment == "step" else training
    real = getattr(owner, moment)

    def interrupted(*args: object) -> object:
        for number in numbers:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(owner, moment, interrupted)
    assert not training.train()
    assert training.trainer.steps_done == training.saver.saved_at == 1


def test_a_second_ctrl_c_interrupts_at_once(training: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.trainer, "step", lambda: [os.kill(os.getpid(), INT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert training.trainer.steps_done == 0


def test_steps_without_finite_gradient_save_and_end_the_run(training: TrainingRun) -> None:
    training.trainer.model.head.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(ArithmeticError, match="no finite gradient in the 10 steps up to step 10; look"):
        training.train()
    assert (training.folder / "checkpoints/step-000010/model.safetensors").exists()


def test_default_folders_are_numbered_and_never_shared(tmp_path: Path) -> None:
    first, second = (new_run_folder(None, "toy", tmp_path) for _ in range(2))
    assert (first.name, second.name) == ("toy-001", "toy-002")
    (tmp_path / "toy-017").mkdir()
    assert new_run_folder(None, "toy", tmp_path).name == "toy-018"


def test_validation_at_the_end_is_capped_on_request(training: TrainingRun) -> None:
    short = dataclasses.replace(training.config.train, steps=1, final_eval_tokens=48, eval_context=8, ema_decay=0.5)
    training.config = training.trainer.config = dataclasses.replace(training.config, train=short)
    training.console = Console(file=io.StringIO(), width=200)
    training.train()
    row, windows = training.history.records[-1], training.trainer.corpus.windows
    assert windows(16, 48).tokens == windows(8, 48).tokens == 48
    assert row["val_loss"] == pytest.approx(training.trainer.validate(windows(16, 48)), rel=1e-6)
    assert row["val_loss_at_eval_context"] == pytest.approx(training.trainer.validate(windows(8, 48)), rel=1e-6)
    said = training.console.file.getvalue()
    assert "validating on 48 of 96 held-out tokens, spread evenly (all of them: --train.final-eval-tokens 96)" in said
    summary = summarise(training)
    assert (summary["val_tokens"], summary["held_out_tokens"]) == (48, 96)
    assert "48 of 96 held-out tokens, in windows of 16" in dict(summary_lines(summary))["validation"]


def test_final_validation_takes_half_the_trained_tokens_and_a_least_number() -> None:
    assert final_eval_tokens(TrainConfig(), trained=1_638_400) == 819_200 > 785_920, "the whole split of the toy"
    assert final_eval_tokens(TrainConfig(), trained=2048) == 131_072
    assert final_eval_tokens(TrainConfig(final_eval_tokens=16), trained=1_638_400) == 16


def test_record_has_data_wait_and_memory_of_the_step(training: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 2 s, of which it waits half a second for its batch."""
    clock = Clock(monkeypatch)

    def after(seconds: float, real: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any) -> Any:
            clock.now += seconds
            return real(*args)

        return slow

    monkeypatch.setattr(training.trainer, "train_parts", after(1.5, training.trainer.train_parts))
    assert training.trainer.step().data_wait == 0
    monkeypatch.setattr(training.trainer.loader, "take", after(0.5, training.trainer.loader.take))
    step = training.trainer.step()
    assert (step.seconds, step.data_wait) == (2.0, 0.25)
    training._keep(step)
    row = training.history.records[-1]
    assert (row["seconds"], row["data_wait"]) == (2.0, 0.25)
    assert row["memory"] == pytest.approx(peak_memory(torch.device("cpu")), rel=0.01)


def test_drawing_takes_no_more_than_a_hundredth_of_the_run(
    training: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    spent: list[tuple[float, float]] = []

    def plot_run(*_: object) -> None:
        now[0] += 1.5
        spent.append((training.history.seconds, now[0]))

    monkeypatch.setattr("dsmini.training.run.plot_run", plot_run)
    monkeypatch.setattr("dsmini.training.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    for _ in range(400):
        training.history.seconds += 10
        if training.history.seconds >= training.next_plot:
            training.plot()
    assert len(spent) > 20
    assert all(drawing <= 0.01 * seconds for seconds, drawing in spent[1:])


def test_a_picture_is_there_whole_or_not_at_all(
    training: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert training.train()
    training.plot()
    before = (tmp_path / "loss.png").read_bytes()

    def half(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"\x89PNG")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="no space"):
        training.plot()
    assert (tmp_path / "loss.png").read_bytes() == before
    assert not list(tmp_path.glob("*.partial*"))


def record_without_figures(lr: float) -> Row:
    """Return a first step whose losses and norm are not finite."""
    return dict.fromkeys(KEYS) | {"step": 1, "lr": lr, "skipped": True, "memory": 0, "tokens": 1, "seconds": 1.0}


@pytest.mark.filterwarnings("error")
def test_run_without_a_finite_figure_is_drawn(tmp_path: Path) -> None:
    plot_run(tmp_path, [record_without_figures(lr=1e38)], {"block 1": [1.0, 1.0]})
    assert (tmp_path / "loss.png").exists()
