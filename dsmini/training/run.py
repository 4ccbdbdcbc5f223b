"""A whole training run: its steps and validations up to the end or a stop, recorded and saved."""

import io
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from dsmini.atomic import write_json, write_text
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.checkpoint.run_folder import run_tokenizer
from dsmini.checkpoint.safetensors_files import SafetensorsReader
from dsmini.checkpoint.training_state import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_folders,
    checkpoint_step,
    last_checkpoint,
)
from dsmini.config import ModelConfig, RunConfig
from dsmini.console.messages import say
from dsmini.console.progress import patience
from dsmini.distributed.meeting import told
from dsmini.distributed.world import World
from dsmini.machine import peak_memory
from dsmini.nn import Transformer
from dsmini.text.tokenizer import Tokenizer
from dsmini.training.history import History
from dsmini.training.plots import plot_run
from dsmini.training.progress import TrainingProgress
from dsmini.training.record import METRICS, StepRecord
from dsmini.training.saving import NotSavedError, Saver
from dsmini.training.stopping import StopAskedError, StopSignals, asked_to_stop
from dsmini.training.survival import Survival
from dsmini.training.tensorboard import TensorBoard
from dsmini.training.trainer import StepResult, Trainer
from dsmini.training.validation import validate
from dsmini.training.watcher import BindingChange, Watcher

PLOT_EVERY = 30.0
"""Shortest training time between two drawings on the way, in seconds."""
PLOT_SHARE = 0.01
"""Largest share of the training time that drawing may take."""


class TrainingRun:
    """Drives a Trainer to the end of its config, and writes the run's folder.

    Args:
        config: resolved: the device, dtype and threads really used, and the folder `out`, which exists.
        world: the processes of the run; None: this one. Only rank 0 writes the folder's files, but for checkpoints.
    """

    def __init__(self, config: RunConfig, trainer: Trainer, console: Console, world: World | None = None) -> None:
        assert config.out is not None
        self.config, self.trainer, self.console = config, trainer, console
        self.world = world or World()
        self.folder: Path = config.out
        self.history = History(config.train.steps)
        self.survival = Survival(config, self.world)
        self.saver = Saver(config, trainer, self.history, self.world, lambda step: self.survival.note("saved", step))
        trainer.phase = self.survival.phase
        self.board: TensorBoard | None = None
        self.watcher: Watcher | None = None
        """Told of every step, to say when what binds the run changes."""
        self.metrics: TextIO = io.StringIO()
        """metrics.jsonl while steps are taken."""
        self.failure: OSError | None = None
        """The error of rank 0 for which all processes stop."""
        self.plot_seconds = 0.0
        self.next_plot = 1 / PLOT_SHARE  # as if drawing took a second

    def newest_checkpoint(self, say: Callable[[str], None]) -> Checkpoint:
        """Return the newest checkpoint that is whole and fits, as all processes read it. Raises: as last_checkpoint."""
        saver, world = self.saver, self.world
        share = (world.rank, world.size)
        return last_checkpoint(self.folder, saver.parts, saver.fits, say, world.together, share)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint of this run that its saver `fits`."""
        self.survival.begin(checkpoint.state.step)
        try:
            lost = self.saver.restore(checkpoint)
        except KeyboardInterrupt:  # no crash of this checkpoint
            self.survival.note("stopped", checkpoint.state.step)
            raise
        self.survival.note("restored", checkpoint.state.step)
        if lost:
            of = f"{lost} of {checkpoint.state.step} steps"
            say(self.console, f"{METRICS} lacks {of}; the plots leave them out")

    def train(self) -> bool:
        """Run the steps that are left, or those until a signal, and save the state; return whether it came to the end.

        Raises: ArithmeticError after train.max_skipped steps in a row without a finite gradient, for replicas that
            differ, and after more than train.max_rewinds spikes; OSError, or rich's exit for a closed pipe, where
            something could not be written, after saving the state if that can be done.
        """
        if self.config.train.tensorboard and self.world.rank == 0:
            self.board = TensorBoard(self.folder / "tensorboard", moe_layers(self.config.model), self._steps_done)
        try:
            complete = self._train()
            self.saver.finish()
        except BaseException as error:
            with suppress(NotSavedError):  # the first error is the one to tell
                self.saver.finish()
            self.survival.note("failed", self._steps_done, error=type(error).__name__)
            records = self.history.records
            failed_to_write = isinstance(error, OSError | SystemExit) and not isinstance(error, NotSavedError)
            if failed_to_write and self.world.size == 1 and records and records[-1].step == self._steps_done:
                self._save()
            raise
        finally:
            if self.board is not None:
                self.board.close()
        self.survival.note("finished" if complete else "stopped", self._steps_done)
        return complete

    @property
    def _steps_done(self) -> int:
        return self.trainer.steps_done

    def _train(self) -> bool:
        progress = TrainingProgress(self.console, self.config.train.steps, self.config.seq_len)
        self.survival.begin(self._steps_done)
        with self.survival.watched(), asked_to_stop(self.world.any if self.world.size > 1 else None) as asked, progress:
            self.metrics = self._metrics()
            try:
                self._take_steps(progress, asked)
            finally:
                self.metrics.close()
        if self.failure is not None:
            raise self.failure
        return not asked.agreed

    def _take_steps(self, progress: TrainingProgress, asked: StopSignals) -> None:
        train, history = self.config.train, self.history
        self.trainer.stop = lambda: bool(asked.numbers)
        if history.records:  # resumed: the last step may not have been validated yet
            if history.records[-1].val_loss is None:
                self._validate(progress, asked)
            self._record(asked)
        while self._steps_done < train.steps and not (asked.agreed and history.records):
            step = self.trainer.step()
            stopping = asked.agreed = asked.agreed or step.stopping
            change = None if self.watcher is None else self.watcher.see(step)
            self.survival.after_step(self.trainer, step.seconds)
            if self._rewind(step, progress):
                continue
            self._keep(step, change)
            progress.show(step, history.tokens_per_s())
            if change is not None:
                progress.say(change.sentence)
            last, lost = step.step == train.steps, history.skipped_in_a_row >= train.max_skipped
            if last or stopping or lost:
                self._finish_saving(progress)
                self._save()
            elif step.step % train.save_every == 0 and not step.skipped:  # else nothing new is to be saved
                self._save_if_possible(progress)
            self._validate(progress, asked)
            self._record(asked)
            if lost:
                raise told(ArithmeticError(self._why_lost()))
            validated = history.records[-1].val_loss is not None
            if validated and not last and not stopping and history.seconds >= self.next_plot:
                self.plot()
        if asked.agreed:
            self._save()  # if the signal came after the last save

    def _rewind(self, step: StepResult, progress: TrainingProgress) -> bool:
        """Return to the last checkpoint if the loss of a step is a spike, and leave out the batches since.

        Raises: ArithmeticError after train.max_rewinds of them.
        """
        most, survival = self.config.train.max_rewinds, self.survival
        if not most or not survival.spikes.see(step.step, step.loss):
            return False
        self._finish_saving(progress)
        if not self.world.first(lambda: bool(checkpoint_folders(self.folder))):
            progress.say(f"step {step.step}: the loss is a spike; there is no checkpoint to return to")
            return False
        checkpoint = self.newest_checkpoint(progress.say)
        left_out = self.trainer.left_out.skip(checkpoint.state.sequences, self.trainer.sequences, most_rewinds=most)
        self.saver.restore(checkpoint)
        self.trainer.left_out = left_out
        self.metrics.close()
        self.metrics = self._metrics()
        if self.history.records:
            self._record(StopSignals())
        survival.rewound(checkpoint.state.step)
        progress.say(
            f"step {step.step}: the loss {step.loss:.3f} is a spike; back to step {checkpoint.state.step}, without the "
            f"batches since (rewind {left_out.rewinds} of {most})"
        )
        return True

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer in the run's folder, or that of bytes."""
        return run_tokenizer(self.folder, self.config)

    def _metrics(self) -> TextIO:
        """Open metrics.jsonl to append, with the lines of all steps before the last record, and no others."""
        if self.world.rank:
            return open(os.devnull, "w", encoding="utf-8")
        path = self.folder / METRICS
        write_text(path, "".join(json.dumps(record.row()) + "\n" for record in self.history.records[:-1]))
        return path.open("a", encoding="utf-8")

    def _keep(self, step: StepResult, change: BindingChange | None = None) -> None:
        """Add a step to the history, with the change that the watcher saw at it."""
        asked = {"val_loss_ema": self.trainer.average is not None}
        asked |= {"val_loss_at_eval_context": self.config.train.eval_context is not None}
        asked |= dict.fromkeys(("binds", "binds_share"), self.watcher is not None)
        scores: dict[str, float | str | None] = {name: None for name, wanted in asked.items() if wanted}
        if step.spread is not None:
            scores |= {"spread": step.spread, "busiest": float(max(range(len(step.work)), key=step.work.__getitem__))}
        if change is not None:
            scores |= {"binds": change.binds, "binds_share": change.share}
        self.history.add(StepRecord.of(step, peak_memory(self.trainer.device), scores))

    def _validate(self, progress: TrainingProgress, asked: StopSignals) -> None:
        """Validate the last step if that is due, and save it if a signal comes: a resumed run validates it again."""
        self.survival.phase("validating")
        try:
            if not asked.agreed and (scores := validate(self.trainer, progress, asked)):
                self.history.validated(**scores)
                self.survival.note("validated", self._steps_done)
        except StopAskedError:
            self._save()

    def _record(self, asked: StopSignals) -> None:
        """Write the record of the last step, which is complete now.

        Where there are other processes, an error asks all to stop after this step, and comes after their save.
        """
        record = self.history.close_last()
        try:
            self.metrics.write(json.dumps(record.row()) + "\n")
            self.metrics.flush()
            if self.board is not None:
                self.board.add(record)
        except OSError as error:
            if self.world.size == 1:
                raise
            self.failure = error
            asked.numbers.append(0)

    def _save(self, *, background: bool = False) -> None:
        if self.saver.saved_at == self._steps_done:
            return
        self.survival.phase("saving")
        with patience(self.console, "saving"):
            self.survival.check_replicas(self.trainer)  # a flipped bit must not be saved
            self.saver.save(background=background)

    def _save_if_possible(self, progress: TrainingProgress) -> None:
        """Save a checkpoint on the way. A failure is only reported: nothing is lost yet."""
        try:
            self._save(background=self.config.train.save_in_background)
        except NotSavedError as error:
            progress.say(f"{error}; training continues")

    def _finish_saving(self, progress: TrainingProgress) -> None:
        """Wait for a save in the background. A failure is only reported, as that of any save on the way."""
        try:
            self.saver.finish()
        except NotSavedError as error:
            progress.say(f"{error}; training continues")

    def _why_lost(self) -> str:
        """Return in words what happened, and where to continue with a smaller learning rate."""
        train, step, skipped = self.config.train, self._steps_done, self.history.skipped_in_a_row
        lower = f"--train.lr {train.lr / 2:g}"
        if train.optimizer == "muon":
            lower += f" --train.muon-lr {train.muon_lr / 2:g}"
        before = [folder for folder in checkpoint_folders(self.folder) if checkpoint_step(folder) < step - skipped]
        further_back = f", or from further back with --init {before[0]} {lower}" if before else ""
        return (
            f"no finite gradient in the {skipped} steps up to step {step}; look at the data, or continue more "
            f"slowly with --resume {self.folder} {lower}{further_back}"
        )

    def whole_model(self) -> Transformer:
        """Return the model, or where several processes have parts of it, the saved one, whose memory is the file's.

        Raises: ValueError for one that does not fit into this process next to its part.
        """
        if self.world.size == 1:
            return self.trainer.model
        reader = SafetensorsReader(checkpoint_folder(self.config, self._steps_done) / "model.safetensors")
        nbytes, device = sum(stored.nbytes for stored in reader.tensors.values()), self.trainer.device
        refuse_too_large(nbytes, "the whole model in one process", device)
        with torch.device("meta"):
            model = Transformer(self.config.model, compute_dtype=self.trainer.model.compute_dtype)
        model.load_state_dict(reader.read_all(), assign=True)
        return model.to(device)

    def plot(self) -> None:
        """Draw the records so far, and set next_plot so that drawing takes at most PLOT_SHARE of the time."""
        if self.world.rank:
            return
        start = time.perf_counter()
        shares = self.history.load_shares()
        loads = dict(zip(moe_layers(self.config.model), shares, strict=True)) if shares else {}
        with patience(self.console, "drawing"):
            plot_run(self.folder, self.history.records, loads)
        taken = time.perf_counter() - start
        self.survival.note("plotted", self._steps_done)
        self.plot_seconds += taken
        self.next_plot = max(self.history.seconds + PLOT_EVERY, (self.plot_seconds + taken) / PLOT_SHARE)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the last file of a run: with it the run is complete."""
        write_json(self.folder / "summary.json", summary)


def moe_layers(config: ModelConfig) -> list[str]:
    """Return the names of the layers with experts, for people."""
    names = [f"block {i}" for i in range(config.n_layers) if config.is_moe(i)]
    return names + [f"MTP {k + 1}" for k in range(config.n_mtp_layers) if config.is_moe(config.n_layers + k)]
