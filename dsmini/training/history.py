"""The history of a run: the records of its steps and their totals."""

import dataclasses

import torch

from dsmini.checkpoint.training_state import RunState
from dsmini.training.record import StepRecord


class History:
    """The records of a run's steps, those before a stop included, and their totals.

    Args:
        steps: number of steps of the whole run.
    """

    def __init__(self, steps: int) -> None:
        self.window = max(10, steps // 10)
        """Number of steps that count as recent: a tenth of all, at least ten."""
        self.records: list[StepRecord] = []
        self.seconds = 0.0
        """Time spent in training steps."""
        self.skipped = 0
        """Number of steps whose gradient or loss was not finite."""
        self.skipped_in_a_row = 0
        """Number of such steps since the last one that was not skipped."""
        self.best: tuple[float, int] | None = None
        """The lowest validation loss, and its step."""

    def add(self, record: StepRecord) -> None:
        """Append the record of a step."""
        self.records.append(record)
        self.seconds += record.seconds
        self.skipped += record.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.skipped else 0

    def validated(self, val_loss: float, **scores: float) -> None:
        """Put validation losses into the last record."""
        self.records[-1] = self.records[-1].validated(val_loss, **scores)

    def close_last(self) -> StepRecord:
        """Return the last record, which is complete now.

        The loads of one old record are dropped from memory. They are in metrics.jsonl.
        """
        last = self.records[-1]
        if last.val_loss is not None and (self.best is None or last.val_loss < self.best[0]):
            self.best = (last.val_loss, last.step)
        if len(self.records) > (window := len(self.recent())):
            old = self.records[-1 - window]
            self.records[-1 - window] = dataclasses.replace(old, loads=None)
        return last

    def restore(self, state: RunState, recorded: list[StepRecord], *, complete: bool) -> int:
        """Restore a saved state; return the number of steps whose records are lost.

        Args:
            recorded: lines of metrics.jsonl.
            complete: the state is that of the last step, which is validated again in any case.
        """
        self.seconds, self.skipped, self.skipped_in_a_row = state.seconds, state.skipped, state.skipped_in_a_row
        if state.best_val_loss is not None and state.best_val_step is not None:
            self.best = (state.best_val_loss, state.best_val_step)
        by_step = {record.step: record for record in recorded if record.step <= state.step}
        last = StepRecord.from_row(state.row)
        if not complete and state.step in by_step:
            last = dataclasses.replace(last, val_loss=by_step[state.step].val_loss)
        by_step[state.step] = last
        self.records = [by_step[step] for step in sorted(by_step)]
        return state.step - len(self.records)

    def recent(self) -> list[StepRecord]:
        """Return the records of the recent steps."""
        return self.records[-self.window :]

    def tokens_per_s(self) -> float:
        """Return the tokens per second of the last ten steps."""
        last = self.records[-10:]
        return sum(record.tokens for record in last) / sum(record.seconds for record in last)

    def load_shares(self) -> list[list[float]]:
        """Return for each MoE layer its experts' loads over the recent steps, as shares of the mean load."""
        loads = [record.loads for record in self.recent() if record.loads]
        if not loads:
            return []
        total = torch.tensor(loads).sum(0).double()
        return (total / total.mean(1, keepdim=True)).tolist()
