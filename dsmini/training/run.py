"""A whole training run: steps and validations with their record, what is saved, and the summary at the end."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from rich.console import Console

from dsmini.atomic import sync, write_json, write_text
from dsmini.checkpoint.run_folder import read_metrics
from dsmini.checkpoint.training_state import (
    Checkpoint,
    RunState,
    check_tensors,
    checkpoint_folders,
    checkpoint_step,
    save_checkpoint,
)
from dsmini.config import RunConfig
from dsmini.measure.machine import peak_memory, random_state, set_random_state
from dsmini.nn import max_violation
from dsmini.training.report import TrainingProgress, plot_run
from dsmini.training.tensorboard import TensorBoard
from dsmini.training.trainer import Step, Trainer

PLOT_EVERY = 30.0
"""Seconds of training between two drawings on the way, at the least."""
PLOT_SHARE = 0.01
"""Of the training time that drawing may take."""


class NotSavedError(OSError):
    """A checkpoint could not be written; the earlier ones are still there."""


class TrainingRun:
    """Drives a Trainer to the end of its config, and keeps the run's folder.

    Args:
        config: resolved: the device, dtype and threads really used, and the folder `out`, which exists.
    """

    def __init__(self, config: RunConfig, trainer: Trainer, console: Console) -> None:
        assert config.out is not None
        self.config, self.trainer, self.console = config, trainer, console
        self.folder: Path = config.out
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.plot_seconds = 0.0
        self.next_plot = 1 / PLOT_SHARE  # as if drawing took a second
        self.board: TensorBoard | None = None
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.best: tuple[float, int] | None = None
        """The lowest validation loss, and its step."""
        self.saved_at: int | None = None
        """The step of the last checkpoint."""

    @property
    def parts(self) -> list[str]:
        """The stems of the tensor files of this run's checkpoints."""
        return ["model", "optimizer", "rng", *([] if self.trainer.average is None else ["average"])]

    def fits(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that this run could not go on from; ValueError says why. Changes nothing."""
        self.trainer.check(checkpoint.tensors)
        got, want = checkpoint.tensors["rng"], random_state(self.trainer.device)
        there = (want.keys() & got.keys()) | {"cpu"}  # of another kind of device than before there is none
        of_both = [{name: state for name, state in states.items() if name in there} for states in (got, want)]
        check_tensors(of_both[0], of_both[1], "rng.safetensors")

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this run, which `fits`."""
        state = checkpoint.state
        self.trainer.load(
            checkpoint.tensors,
            steps_done=state.step,
            sequences=state.sequences,
            average_updates=state.average_updates,
        )
        set_random_state(checkpoint.tensors["rng"], self.trainer.device)
        self.seconds, self.skipped = state.seconds, state.skipped
        gave_up = state.skipped_in_a_row >= self.config.train.max_skipped  # who goes on all the same gets as many again
        self.skipped_in_a_row = 0 if gave_up else state.skipped_in_a_row
        if state.best_val_loss is not None and state.best_val_step is not None:
            self.best = (state.best_val_loss, state.best_val_step)
        self.saved_at = state.step
        recorded = {row["step"]: row for row in read_metrics(self.folder) if row["step"] <= state.step}
        row = dict(state.row)
        if state.step < self.config.train.steps:  # at the end the whole held-out split is due, whatever was before
            row["val_loss"] = recorded.get(state.step, row)["val_loss"]
        recorded[state.step] = row
        self.rows = [recorded[step] for step in sorted(recorded)]
        if lost := state.step - len(self.rows):
            self._say(f"metrics.jsonl lacks {lost} of {state.step} steps; the plots leave them out")

    def train(self) -> bool:
        """All steps that are left, or those until Ctrl-C; the run's state is saved either way. Whether it came to
        the end.

        Raises: ArithmeticError after train.max_skipped steps in a row without a finite gradient; OSError, or rich's
            exit for a closed pipe, where something could not be written, after saving the state if that can be done.
        """
        if self.config.train.tensorboard:
            self.board = TensorBoard(self.folder / "tensorboard", self._moe_layers(), self.trainer.steps_done)
        try:
            return self._train()
        except NotSavedError:
            raise
        except (OSError, SystemExit):
            if self.rows and self.rows[-1]["step"] == self.trainer.steps_done:
                self._save()
            raise
        finally:
            if self.board is not None:
                self.board.close()

    def _train(self) -> bool:
        train = self.config.train
        progress = TrainingProgress(self.console, train.steps, self.config.seq_len)
        with asked_to_stop() as asked, self._metrics() as metrics, progress:
            if self.rows:  # resumed: the last step may not have been validated yet
                if self.rows[-1]["val_loss"] is None:
                    self._validate(self.rows[-1], progress)
                self._record(metrics)
            while self.trainer.steps_done < train.steps:
                step = self.trainer.step()
                self._keep(step)
                progress.show(step, self._recent_rate())
                last, lost = step.step == train.steps, self.skipped_in_a_row >= train.max_skipped
                stop = bool(asked)  # read once: Ctrl-C in the validation below stops after the next step
                if last or stop or lost:
                    self._save()
                elif step.step % train.save_every == 0 and not step.skipped:  # else nothing new is to be saved
                    self._save_if_possible(progress)
                if not stop:
                    self._validate(self.rows[-1], progress)
                self._record(metrics)
                if stop:
                    return False
                if not last and self.rows[-1]["val_loss"] is not None and self.seconds >= self.next_plot:
                    self.plot()
                if lost:
                    raise ArithmeticError(self._why_lost())
        return True

    def _why_lost(self) -> str:
        """What happened, and from where a smaller learning rate may get further."""
        train, step, skipped = self.config.train, self.trainer.steps_done, self.skipped_in_a_row
        lower = f"--train.lr {train.lr / 2:g}"
        if train.optimizer == "muon":
            lower += f" --train.muon-lr {train.muon_lr / 2:g}"
        before = [folder for folder in checkpoint_folders(self.folder) if checkpoint_step(folder) < step - skipped]
        further_back = f", or from further back with --init {before[0]} {lower}" if before else ""
        return (
            f"no finite gradient in the {skipped} steps up to step {step}; look at the data, or go on more slowly with "
            f"--resume {self.folder} {lower}{further_back}"
        )

    def _metrics(self) -> TextIO:
        """metrics.jsonl, open for the next row, with the rows that were made before in it and no others."""
        path = self.folder / "metrics.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows[:-1]))
        return path.open("a", encoding="utf-8")

    def _keep(self, step: Step) -> None:
        """Take a step into the run's record."""
        counts = step.counts
        row: dict[str, Any] = {
            "step": step.step,
            "loss": step.loss,
            "val_loss": None,
            "lr": step.lr,
            "tokens_per_s": step.tokens / step.seconds,
            "max_vio": step.max_vio,
            "skipped": step.skipped,
            "mtp_loss": step.mtp_loss,
            "balance_loss": step.balance_loss,
            "grad_norm": step.grad_norm,
            "data_wait": step.data_wait,
            "memory": peak_memory(self.trainer.device),
            "tokens": step.tokens,
            "seconds": step.seconds,
            "layer_max_vio": None if counts is None else max_violation(counts).tolist(),
            "loads": None if counts is None else counts.tolist(),
        }
        if self.trainer.average is not None:
            row["val_loss_ema"] = None
        if self.config.train.eval_context is not None:
            row["val_loss_at_eval_context"] = None
        self.rows.append({key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()})
        self.seconds += step.seconds
        self.skipped += step.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step.skipped else 0

    def _save(self) -> None:
        """Save the state after the last step, unless it is; NotSavedError says what is there instead."""
        step = self.trainer.steps_done
        if self.saved_at == step:
            return
        tensors = {**self.trainer.tensors(), "rng": random_state(self.trainer.device)}
        best_val_loss, best_val_step = self.best or (None, None)
        state = RunState(
            step=step,
            sequences=self.trainer.sequences,
            average_updates=0 if self.trainer.average is None else self.trainer.average.updates,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            best_val_loss=best_val_loss,
            best_val_step=best_val_step,
            seconds=self.seconds,
            corpus_sha256=self.trainer.corpus.sha256,
            row=self.rows[-1],
        )
        try:
            sync(self.folder / "metrics.jsonl")  # the rows before the state's own must not be lost behind it
            save_checkpoint(self.config, tensors, state)
        except OSError as error:
            there = "no earlier one is there" if self.saved_at is None else f"step {self.saved_at} is still there"
            reason = error.strerror or error
            raise NotSavedError(f"cannot save {self.folder}'s checkpoint of step {step}: {reason}; {there}") from None
        self.saved_at = step

    def _save_if_possible(self, progress: TrainingProgress) -> None:
        """A checkpoint on the way: without it nothing is lost yet, so training goes on."""
        try:
            self._save()
        except NotSavedError as error:
            progress.say(f"{error}; training goes on")

    def recent(self) -> list[dict[str, Any]]:
        """The rows of the last tenth of the steps, or the last ten."""
        return self.rows[-max(10, self.config.train.steps // 10) :]

    def _recent_rate(self) -> float:
        """Tokens a second over the last steps."""
        rows = self.rows[-10:]
        return sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)

    def _validate(self, row: dict[str, Any], progress: TrainingProgress) -> None:
        """Put into the last step's row what is due there: on the way a part of the held-out split, at the end all of
        it, at eval_context and with the average too."""
        train, step = self.config.train, row["step"]
        if step == train.steps:
            with progress.validating() as on_part:
                row["val_loss"] = self.trainer.validate(on_part=on_part)
            if train.eval_context is not None:
                with progress.validating(f" at context {train.eval_context}") as on_part:
                    row["val_loss_at_eval_context"] = self.trainer.validate(seq_len=train.eval_context, on_part=on_part)
            if self.trainer.average is not None:
                with self.trainer.averaged(), progress.validating(", with the average of the parameters") as on_part:
                    row["val_loss_ema"] = self.trainer.validate(on_part=on_part)
        elif step % train.eval_every == 0:
            row["val_loss"] = self.trainer.validate(train.eval_tokens)
            windows = self.trainer.corpus.windows(self.config.seq_len, train.eval_tokens)
            progress.validated(step, row["val_loss"], windows.tokens)

    def _record(self, metrics: TextIO) -> None:
        """Write the last step's row, which is complete now."""
        row = self.rows[-1]
        row.update({key: None for key, v in row.items() if isinstance(v, float) and not math.isfinite(v)})
        if row["val_loss"] is not None and (self.best is None or row["val_loss"] < self.best[0]):
            self.best = (row["val_loss"], row["step"])
        metrics.write(json.dumps(row) + "\n")
        metrics.flush()
        if self.board is not None:
            self.board.add(row)
        if len(self.rows) > (window := len(self.recent())):
            self.rows[-1 - window]["loads"] = None  # it is on disk, and a long run has many

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def plot(self) -> None:
        """Draw what was recorded so far; says by next_plot when drawing again is worth its time."""
        start = time.perf_counter()
        loads = self._loads()
        plot_run(self.folder, self.rows, dict(zip(self._moe_layers(), loads, strict=True)) if loads else {})
        taken = time.perf_counter() - start
        self.plot_seconds += taken
        self.next_plot = max(self.seconds + PLOT_EVERY, (self.plot_seconds + taken) / PLOT_SHARE)

    def _moe_layers(self) -> list[str]:
        """The layers with experts, as people call them."""
        c = self.config.model
        names = [f"block {i}" for i in range(c.n_layers) if c.is_moe(i)]
        return names + [f"MTP {k + 1}" for k in range(c.n_mtp_layers) if c.is_moe(c.n_layers + k)]

    def _loads(self) -> list[list[float]]:
        """Each layer's experts' shares of the mean load over the last tenth of the steps."""
        loads = [row["loads"] for row in self.recent() if row["loads"]]
        if not loads:
            return []
        total = torch.tensor(loads).sum(0).double()
        return (total / total.mean(1, keepdim=True)).tolist()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the last of the run's files: with it the run is complete."""
        write_json(self.folder / "summary.json", summary)


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C, SIGTERM or a closed terminal; a second Ctrl-C interrupts at once.

    The others come in numbers (a scheduler's warning and its end, a shell that passes them on), so none interrupts.
    """
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    hangup = [number for number in hangup if signal.getsignal(number) != signal.SIG_IGN]  # nohup wants to go on
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
