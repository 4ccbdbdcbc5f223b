"""A whole training run, as one loop: step, log, save, validate, record, up to the end or a stop.

A validation on the way scores a part of the held-out split; that at the end all of it, unless it is large.
"""

import io
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
from rich.console import Console

from dsmini.checkpoint.load import meta_model
from dsmini.checkpoint.training_state import (
    Checkpoint,
    check_tensors,
    checkpoint_folder,
    checkpoint_folders,
    checkpoint_step,
    last_checkpoint,
    load_run,
    read_checkpoint,
)
from dsmini.config import ModelConfig, RunConfig
from dsmini.config.fields import require
from dsmini.console.messages import say
from dsmini.console.progress import LEAST_SECONDS, Progress, patience
from dsmini.data.corpus import Windows
from dsmini.distributed.failure import say_failure
from dsmini.distributed.meeting import told
from dsmini.distributed.mesh import unequal_replicas
from dsmini.distributed.world import World
from dsmini.machine import peak_memory, random_state, refuse_too_large, set_random_state
from dsmini.nn import Transformer
from dsmini.training.optim import begin_stage, optimizer_state, optimizers
from dsmini.training.plots import plot_run
from dsmini.training.record import (
    METRICS,
    EventLog,
    History,
    TensorBoard,
    drop_rows,
    finite,
    is_whole,
    log_path,
    row_of,
    rows_of,
)
from dsmini.training.saving import NotSavedError, Saver
from dsmini.training.signals import StopAskedError, StopSignals
from dsmini.training.trainer import StepResult, Trainer

CPU = torch.device("cpu")
LEAST_TIMES = 3
"""Number of steps of a process from which on the time left is shown, once they took LEAST_SECONDS."""


class TrainingProgress(Progress):
    """The progress bar of a training run."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(console, steps, f"step 0/{steps}", delay=0, line_every=max(1, steps // 20), stays=True)
        self.steps = steps
        self.times: deque[float] = deque(maxlen=11)
        """Seconds a token of the last steps. The first steps of a process also prepare, so a median is taken."""
        self.trained: float = 0.0
        """Seconds of all steps that were shown."""

    def show(self, step: StepResult, tokens_per_s: float, sentence: str = "") -> None:
        """Show a training step, and a sentence about it."""
        figures = f"loss {step.loss:.3f}  {tokens_per_s:,.0f} tok/s  lr {step.lr:.1e}"
        figures += "" if step.max_vio is None else f"  MaxVio {step.max_vio:.2f}"
        figures += "" if step.spread is None else f"  spread {step.spread:.0%}"
        figures += f"  data wait {step.data_wait:.0%}" if step.data_wait > 0.05 else ""
        if step.indexers is not None:
            kl, recall = (sum(step.indexers[name]) / len(step.indexers[name]) for name in ("kl", "recall"))
            figures += f"  indexer KL {kl:.4f} recall {recall:.0%}"
        self.label: str = f"step {step.step}/{self.steps}"
        self.times.append(step.seconds / step.tokens)
        self.trained += step.seconds
        left = math.inf
        if len(self.times) >= LEAST_TIMES and self.trained >= LEAST_SECONDS:
            left = (self.steps - step.step) * step.tokens * median(self.times)
        self.update(step.step, figures, left=left)
        if step.skipped:
            self.say(f"step {step.step}: the gradient was not finite; the step was skipped, nothing changed")
        if sentence:
            self.say(sentence)


def validate(trainer: Trainer, progress: TrainingProgress, asked: StopSignals) -> dict[str, float]:
    """Validate after the last step so far, if that is due; return the losses by their keys in metrics.jsonl.

    There may be three: at the context of training, at eval_context, and at the end with the average.

    Args:
        asked: the signals that ask the run to stop.

    Raises: StopAskedError as soon as one has come. Nothing is changed then.
    """
    train, step, seq_len = trainer.config.train, trainer.steps_done, trainer.config.seq_len

    def score(windows: Windows) -> float:
        def check(done: float) -> None:
            trainer.phase("validating")
            show(done)
            if done < 1 and asked.came():
                raise StopAskedError

        with progress.part("validation") as show:
            return trainer.validate(windows, on_part=check)

    at_end = step == train.steps
    if not at_end and step % train.eval_every:
        return {}
    kinds = {"val_loss": (seq_len, "")}
    if train.eval_context is not None:
        kinds["val_loss_at_eval_context"] = (train.eval_context, f" at context {train.eval_context}")
    if at_end and trainer.average is not None:
        kinds["val_loss_ema"] = (seq_len, ", with the average of the parameters")
    windows, every = trainer.final_windows(), trainer.corpus.windows(seq_len)
    line = "validating on the whole held-out split"
    if len(windows) < len(every):
        line = (
            f"validating on {windows.tokens:,} of {every.tokens:,} held-out tokens, spread evenly "
            f"(all of them: --train.final-eval-tokens {every.tokens})"
        )
    scores = {}
    for key, (length, words) in kinds.items():
        if at_end:
            progress.say(line + words)
        windows = trainer.final_windows(length) if at_end else trainer.corpus.windows(length, train.eval_tokens)
        with trainer.averaged() if key == "val_loss_ema" else nullcontext():
            scores[key] = nats = score(windows)
        if not at_end:
            of = f"{windows.tokens:,} held-out tokens, context {length}"
            progress.say(f"step {step}: validation {nats:.3f} nats ({of})")
    return scores


# --- the run


PLOT_EVERY = 100.0
"""Shortest training time between two drawings on the way, in seconds: each takes about one."""


@dataclass(frozen=True, kw_only=True)
class BindingChange:
    """A change of what binds a run."""

    binds: str
    """Data, Algorithm, Machine, or "" for nothing."""
    share: float | None
    """Share of the bottleneck, such as that of a step that waits; None for nothing."""
    sentence: str
    """The change for people, with its step and its figures."""


class TrainingRun:
    """Drives a Trainer to the end of its config, and writes the run's folder.

    Args:
        config: resolved: the device, dtype and threads really used, and the folder `out`, which exists.
        world: the processes of the run; None: this one. Only rank 0 writes the folder's files, but for checkpoints.
    """

    def __init__(self, config: RunConfig, trainer: Trainer, console: Console, world: World | None = None) -> None:
        assert config.out is not None
        self.config: RunConfig = config
        self.trainer: Trainer = trainer
        self.console: Console = console
        self.world: World = world or World()
        self.folder: Path = config.out
        self.history: History = History(config.train.steps)
        self.log: EventLog = EventLog(log_path(self.folder, self.world.rank))
        self.saver: Saver = Saver(
            config,
            trainer,
            self.history,
            self.world,
            on_saved=lambda step: self.note("saved", step),
            say=lambda line: self.progress.say(line),
        )
        trainer.phase, self.world.on_stall = self.phase, self._note_stall
        self.watch: Callable[[StepResult], BindingChange | None] | None = None
        """Told of every step, to say when what binds the run changes. It changes no tensor and draws no number."""
        self.remark: Callable[[float], str] = lambda seconds: ""
        """Told the seconds of every step; returns a sentence to say about it, or ""."""
        self.asked: StopSignals = StopSignals(self.world)
        """The signals that ask this run to stop."""
        self.progress: TrainingProgress = TrainingProgress(console, config.train.steps)
        self.metrics: TextIO = io.StringIO()
        """metrics.jsonl while steps are taken."""
        self.board: TensorBoard | None = None
        self.failure: OSError | None = None
        """The error of rank 0 for which all processes stop, as if it was asked to stop."""
        self.next_plot: float = PLOT_EVERY

    # --- the loop

    def train(self) -> bool:
        """Run the steps that are left, or those until a signal, and save the state; return whether it came to the end.

        Raises: ArithmeticError after train.max_skipped steps in a row without a finite gradient, for replicas that
            differ, and after more than train.max_rewinds spikes; OSError, or rich's exit for a closed pipe, where
            something could not be written, after saving the state if that can be done.
        """
        if not self.history.records:  # else it was resumed
            self.note("started", 0, world_size=self.world.size)
        self.progress = TrainingProgress(self.console, self.config.train.steps)
        try:
            with self.asked, self.progress:
                self._open_records()
                self._take_steps()
            if self.failure is not None:
                raise self.failure
        except BaseException as error:
            say_failure(error)  # before anything that waits for another rank
            self._save_what_is_whole(error)
            raise
        finally:
            self._close_records()
        self.note("stopped" if self.asked.stopping else "finished")
        return not self.asked.stopping

    def _take_steps(self) -> None:
        train, trainer, history, asked = self.config.train, self.trainer, self.history, self.asked
        trainer.stop = lambda: bool(asked.numbers) or self.failure is not None
        if history.records:  # resumed: the last step may not have been validated yet
            if history.records[-1]["val_loss"] is None:
                self._validate()
            self._record()
        while trainer.steps_done < train.steps and not (asked.stopping and history.records):
            # 1. step
            self.phase("batch")  # a wait for data is not a long phase
            step = trainer.step()
            asked.stopping = asked.stopping or step.stopping
            change = None if self.watch is None else self.watch(step)
            self.phase("between")
            every = self.config.parallel.check_replicas
            if every and step.step % every == 0:
                self._compare_replicas()
            may_rewind = train.max_rewinds and not step.skipped  # a skipped step has changed nothing
            if may_rewind and step.loss > self.world.first(history.spike_limit) and self._rewind(step):
                continue
            # 2. log
            self._keep(step, change)
            self.progress.show(step, history.tokens_per_s(), change.sentence if change else self.remark(step.seconds))
            # 3. save
            last, lost = step.step == train.steps, history.skipped_in_a_row >= train.max_skipped
            if last or asked.stopping or lost:
                self._save()
            elif step.step % train.save_every == 0 and not step.skipped:  # else nothing new is to be saved
                self._tell_failure(lambda: self._save(background=train.save_in_background))
            # 4. validate, record
            self._validate()
            self._record()
            if lost:
                raise told(ArithmeticError(self._why_lost()))
            validated = history.records[-1]["val_loss"] is not None
            if validated and not last and not asked.stopping and history.seconds >= self.next_plot:
                self.plot()
        if asked.stopping:
            self._save()  # if the signal came after the last save

    def _keep(self, step: StepResult, change: BindingChange | None = None) -> None:
        """Add a step to the history, with the change of what binds that was seen at it."""
        row = row_of(step, peak_memory(self.trainer.device))
        measured = {
            "val_loss_ema": self.trainer.average,
            "val_loss_at_eval_context": self.config.train.eval_context,
        }
        row |= {key: None for key, by in measured.items() if by is not None}
        if self.watch is not None:
            row |= {"binds": change and change.binds, "binds_share": change and change.share}
        self.history.add(row)

    def _validate(self) -> None:
        """Validate the last step if that is due, and save it if a signal comes: a resumed run validates it again."""
        self.phase("validating")
        try:
            if not self.asked.stopping and (scores := validate(self.trainer, self.progress, self.asked)):
                self.history.records[-1] |= finite(scores)
        except StopAskedError:
            self._save()

    def _why_lost(self) -> str:
        """Return in words what happened, and where to start again with a smaller learning rate.

        A skipped step changes no parameter, so what gave no finite gradient many times is that state itself: another
        rate helps only from an earlier one.
        """
        train, step, skipped = self.config.train, self.trainer.steps_done, self.history.skipped_in_a_row
        lower = f"--train.lr {train.table_lr / 2:g}"
        if train.optimizer == "muon":
            lower += f" --train.muon-lr {train.muon_lr / 2:g}"
        before = [folder for folder in checkpoint_folders(self.folder) if checkpoint_step(folder) < step - skipped]
        whole = []
        for folder in before:
            with suppress(ValueError):  # a damaged one is nothing to start from
                if not read_checkpoint(folder, (), verified=True).state.skipped_in_a_row:
                    whole.append(folder)
        again = f"from an earlier state with --init {whole[0]} {lower}" if whole else f"a new run with {lower}"
        return (
            f"no finite gradient in the {skipped} steps up to step {step}, of as many batches; look at the data, or "
            f"start {again}"
        )

    # --- checkpoints

    def _save(self, *, background: bool = False) -> None:
        self._finish_saving()
        if self.saver.saved_at == self.trainer.steps_done:
            return
        self.phase("saving")
        with patience(self.console, "saving"):
            self._compare_replicas()  # a flipped bit must not be saved
            self.saver.save(background=background)

    def _finish_saving(self) -> None:
        """Wait for the save in the background, which may take as long as one in the foreground."""
        self.phase("saving")
        self._tell_failure(self.saver.finish)

    def _tell_failure(self, save: Callable[[], None]) -> None:
        """Do something for a checkpoint on the way. A failure is only reported: nothing is lost yet."""
        try:
            save()
        except NotSavedError as error:
            self.progress.say(f"{error}; training continues")

    def _save_what_is_whole(self, error: BaseException) -> None:
        """Note that a run ends by an error; save it where only a file of its figures could not be written."""
        self.phase("saving")
        with suppress(Exception):  # the first error is the one to tell
            self.saver.finish()
        stopped = isinstance(error, KeyboardInterrupt)
        self.note("stopped" if stopped else "failed", error=type(error).__name__)
        records = self.history.records
        failed_to_write = isinstance(error, OSError | SystemExit) and not isinstance(error, NotSavedError)
        whole = bool(records) and records[-1]["step"] == self.trainer.steps_done
        if failed_to_write and self.world.size == 1 and whole:
            self._save()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint of this run."""
        self.note("started", checkpoint.state.step, world_size=self.world.size)
        if lost := self._restore(checkpoint):
            of = f"{lost} of {checkpoint.state.step} steps"
            say(self.console, f"{METRICS} lacks {of}; the plots leave them out")

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Restore the state of a checkpoint; return the number of steps whose rows are lost.

        Rank 0 alone has all rows, which it writes and draws. All ranks have the last one, with its validation.
        """
        state, train, trainer, world = checkpoint.state, self.config.train, self.trainer, self.world
        last = world.first(lambda: [row for row in rows_of(self.folder) if row["step"] == state.step])

        def restore() -> int:
            progress = {"sequences": state.sequences, "average_updates": state.average_updates}
            trainer.load(checkpoint.tensors, steps_done=state.step, **progress)
            set_random_state(checkpoint.tensors["rng"], trainer.device)
            rows = last if world.rank else rows_of(self.folder)
            return self.history.restore(state, rows, complete=state.step >= train.steps)

        lost = world.together(restore)
        if state.skipped_in_a_row >= train.max_skipped:  # it gave up; whoever resumes it gets that number again
            self.history.skipped_in_a_row = 0
        self.saver.saved_at = state.step
        return lost

    def _rewind(self, step: StepResult) -> bool:
        """Return to the last checkpoint after a spike, and leave out the batches since; False if there is none.

        This is PaLM's remedy (Chowdhery et al. 2022, section 5.1): these batches did not spike again when they were
        fed to an older state. A run that is killed before its next checkpoint meets the spike again, and returns again.

        Raises: ArithmeticError after train.max_rewinds of them.
        """
        rewinds, most, place = self.history.rewinds, self.config.train.max_rewinds, self.trainer.sequences
        self._finish_saving()
        if not self.world.first(lambda: bool(checkpoint_folders(self.folder))):
            self.progress.say(f"step {step.step}: the loss is a spike; there is no checkpoint to return to")
            return False
        if rewinds >= most:
            raise ArithmeticError(
                f"the loss spiked again after {rewinds} rewinds, and {most} are allowed; look at the data, or continue "
                "with a smaller learning rate"
            )
        self._close_records()
        self._restore(newest_checkpoint(self.config, self.world, self.progress.say, self.trainer.device))
        self.trainer.sequences, self.history.rewinds = place, rewinds + 1  # the data continues after the spike
        self.note("rewound")
        self._open_records()
        self._record()
        self.progress.say(
            f"step {step.step}: the loss {step.loss:.3f} is a spike; back to step {self.trainer.steps_done}, without "
            f"the batches since (rewind {rewinds + 1} of {most})"
        )
        return True

    # --- what is written on the way

    def _open_records(self) -> None:
        """Open metrics.jsonl to append, with the rows before the last one, which comes again."""
        if self.world.rank:
            return
        records = self.history.records
        first = records[-1]["step"] if records else 1
        drop_rows(self.folder, first)
        self.metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        if self.config.train.tensorboard:
            self.board = TensorBoard(self.folder / "tensorboard", moe_layers(self.config.model), first)

    def _close_records(self) -> None:
        self.metrics.close()
        if self.board is not None:
            self.board.close()

    def _record(self) -> None:
        """Write the row of the last step, which is complete now.

        Where there are other processes, an error asks all to stop after this step, and comes after their save.
        """
        row = self.history.records[-1]
        if self.world.rank:
            return
        try:
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()
            if self.board is not None:
                self.board.add(row)
        except OSError as error:
            if self.world.size == 1:
                raise
            self.failure = error

    def note(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Log an event of the whole run, once."""
        if self.world.rank == 0:
            self.log.write(event, self.trainer.steps_done if step is None else step, **fields)

    def plot(self) -> None:
        """Draw the rows so far. A failure is only reported: a picture matters less than the run."""
        if self.world.rank:
            return
        shares = self.history.load_shares()
        loads = dict(zip(moe_layers(self.config.model), shares, strict=True)) if shares else {}
        try:
            with patience(self.console, "drawing"):
                plot_run(self.folder, self.history.records, loads)
        except OSError as error:
            self.progress.say(f"cannot draw the plots of {self.folder}: {error.strerror or error}; the old ones stay")
        self.next_plot = self.history.seconds + PLOT_EVERY

    # --- survival

    def phase(self, name: str) -> None:
        """Tell the others where this thread is: batch, forward, backward, optimizer, between, validating, saving."""
        self.world.beat(self.trainer.steps_done, name)

    def _note_stall(self, rank: int, seconds: float, sentence: str) -> None:
        """Log a stall that this rank has found, of one that stands still."""
        self.log.write("stalled", self.trainer.steps_done, rank=rank, sentence=sentence, seconds=seconds)

    def _compare_replicas(self) -> None:
        """Compare what several ranks hold alike, bit for bit.

        Raises: ArithmeticError on all ranks, naming those that differ.
        """
        if self.world.size == 1:
            return
        ranks, words = unequal_replicas(self.world, self.trainer.held_alike())
        if words:
            self.note("corrupted", rank=ranks)
            sentence = (
                f"after step {self.trainer.steps_done} {words}: a bit flipped in memory; the run continues from "
                f"its last checkpoint with --resume {self.folder}"
            )
            raise told(ArithmeticError(sentence))

    # --- for the end

    def whole_model(self) -> Transformer:
        """Return the model, or where several processes have parts of it, the saved one.

        Raises: ValueError for one that does not fit into this process next to its part.
        """
        if self.world.size == 1:
            return self.trainer.model
        saved, device = checkpoint_folder(self.config, self.trainer.steps_done), self.trainer.device
        model, _ = load_run(saved, self.trainer.model.compute_dtype, verified=True)
        if device.type != "cpu":
            nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
            refuse_too_large(nbytes, "the whole model in one process", device)
        return model.to(device)


def moe_layers(config: ModelConfig) -> Sequence[str]:
    """Return the names of the layers with experts, for people."""
    names = [f"block {i}" for i in range(config.n_layers)] + [f"MTP {k + 1}" for k in range(config.n_mtp_layers)]
    return [name for layer, name in enumerate(names) if config.is_moe(layer)]


# --- where it continues


def newest_checkpoint(
    config: RunConfig, world: World, say: Callable[[str], None], device: torch.device = CPU
) -> Checkpoint:
    """Return the newest checkpoint of a run that is whole and fits its config. Rank 0 finds it, and all read it.

    Args:
        config: config with the run's folder `out`.
        say: told on rank 0 about each newer checkpoint, with what is wrong with it.

    Raises: ValueError if there is none, and for one that cannot be read now.
    """
    assert config.out is not None
    run, parts = config.out, ["model", "optimizer", "rng"]
    parts += [] if config.train.ema_decay is None else ["average"]
    found = world.first(lambda: last_checkpoint(run, parts, partial(check_state, device=device), say).folder)
    return world.together(lambda: read_checkpoint(found, parts, verified=True))


def check_state(checkpoint: Checkpoint, device: torch.device = CPU) -> None:
    """Refuse a checkpoint from which no run with its config can continue; ValueError says why."""
    train, model = checkpoint.config.train, meta_model(checkpoint.config.model)
    begin_stage(model, train.dsa_stage)
    named = dict(model.named_parameters())
    want = {"model": model.state_dict(), "optimizer": optimizer_state(optimizers(model, train), named.items())}
    want["average"] = {name: p.float() for name, p in named.items()}
    got = dict(checkpoint.tensors)
    if "rng" in got:
        states = random_state(device)
        there = (states.keys() & got["rng"].keys()) | {"cpu"}  # another kind of device than before has no state in it
        got["rng"], want["rng"] = ({n: t for n, t in of.items() if n in there} for of in (got["rng"], states))
    for part, tensors in got.items():
        check_tensors(tensors, want[part], f"{part}.safetensors")
    require(is_whole(checkpoint.state.row), "the row of the last step in state.json lacks a figure")
