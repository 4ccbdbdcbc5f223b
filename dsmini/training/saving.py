"""Save the state of a run in checkpoints, and restore it from one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dsmini.atomic import sync
from dsmini.checkpoint.training_state import (
    Checkpoint,
    RunState,
    Tensors,
    check_tensors,
    checkpoint_folder,
    prune,
    state_texts,
)
from dsmini.config import RunConfig
from dsmini.config.fields import require
from dsmini.distributed.checkpoint import save_pieces
from dsmini.distributed.meeting import told
from dsmini.distributed.world import World
from dsmini.machine import random_state, set_random_state
from dsmini.training.record import METRICS, History, Row, is_whole, read_records
from dsmini.training.trainer import Trainer


class NotSavedError(OSError):
    """A checkpoint could not be written; the earlier ones are still there."""


class Saver:
    """Saves and restores the state of a run: its Trainer, its History and the random number generators.

    Args:
        config: config with the run's folder `out`.
        world: the processes of the run, which save and restore together.
        on_saved: told the step of each checkpoint, once its files are on the disk.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        history: History,
        world: World,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        assert config.out is not None
        self.config, self.trainer, self.history, self.world = config, trainer, history, world
        self.metrics, self.on_saved = config.out / METRICS, on_saved
        self.saved_at: int | None = None
        """Step of the last checkpoint."""
        self._behind: World | None = None
        self._thread = ThreadPoolExecutor(1, "saving")
        self._writing: Future[None] | None = None

    @property
    def parts(self) -> list[str]:
        """The stems of the tensor files of this run's checkpoints."""
        return ["model", "optimizer", "rng", *([] if self.trainer.average is None else ["average"])]

    # --- restore

    def fits(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that this run cannot continue from; ValueError says why. Changes nothing."""
        self.trainer.check(self.trainer.mine(checkpoint.tensors))
        require(is_whole(checkpoint.state.row), "the row of the last step in state.json lacks a figure")
        got, want = checkpoint.tensors["rng"], random_state(self.trainer.device)
        there = (want.keys() & got.keys()) | {"cpu"}  # another kind of device than before has no state in it
        of_both = [{name: state for name, state in states.items() if name in there} for states in (got, want)]
        check_tensors(of_both[0], of_both[1], "rng.safetensors")

    def restore(self, checkpoint: Checkpoint) -> int:
        """Restore a checkpoint of this run that `fits`; return the number of steps whose rows are lost.

        Rank 0 alone has all rows, which it writes and draws. All ranks have the last one, with its validation.
        """
        rows: list[Row] = []

        def read() -> list[Row]:
            rows.extend(read_records(self.metrics.parent))
            return [row for row in rows if row["step"] == checkpoint.state.step]

        last = self.world.first(read)
        return self.world.together(lambda: self._restore(checkpoint, rows or last))

    def _restore(self, checkpoint: Checkpoint, rows: list[Row]) -> int:
        state, train, trainer = checkpoint.state, self.config.train, self.trainer
        where = {"sequences": state.sequences, "average_updates": state.average_updates}
        trainer.load(trainer.mine(checkpoint.tensors), steps_done=state.step, **where)
        set_random_state(checkpoint.tensors["rng"], trainer.device)
        lost = self.history.restore(state, rows, complete=state.step >= train.steps)
        if state.skipped_in_a_row >= train.max_skipped:  # it gave up; whoever resumes it gets that number again
            self.history.skipped_in_a_row = 0
        self.saved_at = state.step
        return lost

    # --- save

    def save(self, *, background: bool = False) -> None:
        """Save the state after the last step, unless it is saved; NotSavedError names the newest checkpoint.

        Args:
            background: copy the tensors, and let a thread write them. The next save waits for it, and raises its error.
        """
        failed: NotSavedError | None = None
        try:
            self.finish()
        except NotSavedError as error:
            failed = error
        if self.saved_at == self.trainer.steps_done:
            return
        tensors, state = {**self.trainer.tensors(), "rng": random_state(self.trainer.device)}, self._state()
        if not background:
            self._write(tensors, state, self.world)
            return
        if self._behind is None:  # the thread's messages must not mix with those of the steps
            self._behind = self.world.fork()
        staged = {
            part: {name: t.detach().to("cpu", copy=True) for name, t in of.items()} for part, of in tensors.items()
        }
        self._writing = self._thread.submit(self._write, staged, state, self._behind)
        if failed is not None:
            raise failed

    def finish(self) -> None:
        """Wait for a save in the background; raise NotSavedError if it failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, tensors: Tensors, state: RunState, world: World) -> None:
        """Write a checkpoint of these tensors, with those of the other processes; then remove old ones."""
        config, pieces = self.config, self.trainer.pieces(tensors)
        held = {part: {name: (pieces[part][name], t) for name, t in of.items()} for part, of in tensors.items()}
        try:
            world.first(lambda: sync(self.metrics))  # the lines before the state's own must not be lost after it
            texts, metadata = state_texts(config, state), {"step": str(state.step)}
            save_pieces(world, checkpoint_folder(config, state.step), held, texts, metadata)
            world.first(lambda: prune(config, state))
        except OSError as error:
            kept = self.saved_at is not None and checkpoint_folder(config, self.saved_at).is_dir()
            there = f"step {self.saved_at} is still there" if kept else "no earlier one is there"
            sentence = f"cannot save {config.out}'s checkpoint of step {state.step}: {error.strerror or error}; {there}"
            raise told(NotSavedError(sentence)) from None
        self.saved_at = state.step
        self.on_saved(state.step)

    def _state(self) -> RunState:
        trainer, history = self.trainer, self.history
        return RunState(
            step=trainer.steps_done,
            sequences=trainer.sequences,
            average_updates=0 if trainer.average is None else trainer.average.updates,
            skipped_in_a_row=history.skipped_in_a_row,
            rewinds=history.rewinds,
            corpus_sha256=trainer.corpus.sha256,
            row=dict(history.records[-1]),
        )
