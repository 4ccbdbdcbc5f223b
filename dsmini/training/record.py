"""The record of a run on its way: its events, and a row for each step.

The event log of a run has one line of JSON for everything that happened to it, appended and never rewritten:

runs/NAME/events.jsonl              the log of rank 0
runs/NAME/events-rank-0003.jsonl    what another rank has to say, such as a stall that it found

A line holds the event, the wall time and the step: started (from step 0 or a checkpoint), saved (its files are on the
disk), rewound, stalled, corrupted, and stopped, failed or finished, one of which ends an attempt, unless it was killed.
Other fields depend on the event. A reader ignores a torn line, which a kill or a full disk leaves.

The record of a run has a row for each step, as a line of metrics.jsonl. A row is a table that JSON can hold. None
stands for a figure that is not finite or was not measured, and in a dense model for figures of experts. Losses are in
nats a token.

    step                     number of the step, counted from 1
    loss, mtp_loss           cross-entropy, and that of multi-token prediction, before the update
    balance_loss             balance loss of the experts
    val_loss                 cross-entropy on held-out text, after the update
    lr                       learning rate
    grad_norm                norm of the gradient before clipping, as in StepResult
    skipped                  the gradient or a loss was not finite, and nothing was changed
    tokens, seconds          training tokens of the step, and its duration
    tokens_per_s             their quotient
    data_wait                share of the seconds spent waiting for the batch
    memory                   peak memory so far in bytes
    loads, layer_max_vio     tokens that each expert received, and (largest - mean) / mean of them, for each MoE layer
    max_vio                  mean of layer_max_vio

    only with the option that measures it:
    val_loss_ema             with the EMA of the parameters, at the last step
    val_loss_at_eval_context at train.eval_context
    spread, busiest          of several processes: as in StepResult, and the number of the part with most work
    indexer_*                with DSA: means over the layers of IndexerLoss, kl, recall, mass; of each: layer_indexer_*
    binds, binds_share       where the bottleneck has changed: "Data", "Algorithm", "Machine" or "" for nothing

Plots, TensorBoard and the summary read the same rows.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dsmini.atomic import new_file
from dsmini.checkpoint.training_state import RunState
from dsmini.console.messages import printable
from dsmini.nn import max_violation
from dsmini.reading import read_rows
from dsmini.training.trainer import StepResult

Event = Mapping[str, Any]
"""A line of the log."""


def log_path(run: Path, rank: int = 0) -> Path:
    """Return the log of a rank in the folder of a run."""
    return run / ("events.jsonl" if rank == 0 else f"events-rank-{rank:04d}.jsonl")


class EventLog:
    """Appends events to a log. An attempt's first line comes after an empty one, so it never ends a torn line.

    The log matters less than the run: the first error of the system is told, and none is raised.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.failed: bool = False
        self.break_line = "\n" if path.exists() else ""
        """Text before the next line. It ends a line that a kill or a full disk tore."""

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append an event."""
        row = {"event": event, "time": time.time(), "step": step, **fields}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{self.break_line}{json.dumps(row, default=str)}\n")
            self.break_line = ""
        except OSError as error:
            self.break_line = "\n"
            if not self.failed:
                self.failed = True
                reason = error.strerror or error
                words = f"cannot write {self.path}: {reason}; training continues, some events are lost"
                with suppress(OSError):
                    print(printable(words), file=sys.stderr, flush=True)


def read_events(run: Path, rank: int = 0) -> list[Event]:
    """Return the events of a run as a rank wrote them, without torn lines; none if there is no log."""
    rows = read_rows(log_path(run, rank))
    return [row for row in rows if isinstance(row.get("event"), str) and isinstance(row.get("step"), int)]


# --- a row for each step


METRICS = "metrics.jsonl"
Row = dict[str, Any]
"""The record of a step."""
FIGURE, LIST = float | int | None, list | None
KEYS: dict[str, Any] = {
    "step": int,
    "loss": FIGURE,
    "val_loss": FIGURE,
    "lr": FIGURE,
    "tokens_per_s": FIGURE,
    "max_vio": FIGURE,
    "skipped": bool,
    "mtp_loss": FIGURE,
    "balance_loss": FIGURE,
    "grad_norm": FIGURE,
    "data_wait": FIGURE,
    "memory": int,
    "tokens": int,
    "seconds": float,
    "layer_max_vio": LIST,
    "loads": LIST,
}
"""The keys of every row, in order, and the kinds of their values."""
WINDOW = 128
"""Number of the last losses among which a spike is seen."""
THRESHOLD = 10.0
"""Height of a spike in standard deviations."""
LEAST = 1.0
"""Smallest spike in nats, for a loss that hardly varies."""


def row_of(step: StepResult, memory: int) -> Row:
    """Return the row of a step before its validation."""
    counts = step.counts
    row = {key: getattr(step, key, None) for key in KEYS}
    row |= {"tokens_per_s": step.tokens / step.seconds, "memory": memory}
    if counts is not None:
        row |= {"layer_max_vio": max_violation(counts).tolist(), "loads": counts.tolist()}
    if step.spread is not None:
        row |= {"spread": step.spread, "busiest": float(np.argmax(step.work))}
    fits = {f"indexer_{name}": of_layers for name, of_layers in (step.indexers or {}).items()}
    row |= {name: sum(of_layers) / len(of_layers) for name, of_layers in fits.items()}
    row |= {f"layer_{name}": of_layers for name, of_layers in fits.items()}
    return finite(row)


def finite(row: Row) -> Row:
    """Return a row with None for figures, and for lists of them, that are not finite."""

    def of(value: Any) -> Any:
        figures = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)]
        return value if all(map(math.isfinite, figures)) else None

    return {key: of(value) for key, value in row.items()}


def is_whole(row: Row) -> bool:
    """Return whether a table has every key of a row, each with a value of its kind."""
    return all(key in row and isinstance(row[key], kind) for key, kind in KEYS.items())


def rows_of(run: Path) -> Iterator[Row]:
    """Yield the rows of metrics.jsonl, leaving out lines that are torn or incomplete."""
    return filter(is_whole, read_rows(run / METRICS))


def drop_rows(run: Path, step: int) -> None:
    """Leave the rows of earlier steps in metrics.jsonl: the others come again."""
    with new_file(run / METRICS) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(run) if row["step"] < step)


class History:
    """The rows of a run's steps, those before a stop included, and what follows from them.

    Args:
        steps: number of steps of the whole run.
    """

    def __init__(self, steps: int) -> None:
        self.window: int = max(10, steps // 10)
        """Number of steps that count as recent: a tenth of all, at least ten."""
        self.records: list[Row] = []
        self.skipped_in_a_row: int = 0
        """Number of steps without a finite gradient and loss since the last one that was not skipped."""
        self.rewinds: int = 0
        """Number of times that the run went back to a checkpoint after a spike of the loss."""

    def add(self, row: Row) -> None:
        """Append the row of a step, and drop figures of experts of one that is not recent: metrics.jsonl has them."""
        self.records.append(row)
        if len(self.records) > self.window:
            self.records[-1 - self.window] |= {"loads": None, "layer_max_vio": None}
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["skipped"] else 0

    def restore(self, state: RunState, recorded: Iterable[Row], *, complete: bool) -> int:
        """Restore a saved state; return the number of steps whose rows are lost.

        Args:
            recorded: rows of metrics.jsonl.
            complete: the state is that of the last step, which is validated again in any case.
        """
        self.records, last = [], dict(state.row)
        for row in recorded:
            if row["step"] < state.step:
                self.add(row)
            elif row["step"] == state.step and not complete:
                last |= {key: value for key, value in row.items() if key.startswith("val_loss")}
        self.add(last)
        self.skipped_in_a_row = state.skipped_in_a_row
        self.rewinds = state.rewinds
        return state.step - len(self.records)

    @property
    def seconds(self) -> float:
        """Return the time spent in training steps."""
        return sum(row["seconds"] for row in self.records)

    def recent(self) -> list[Row]:
        """Return the rows of the recent steps."""
        return self.records[-self.window :]

    def tokens_per_s(self) -> float:
        """Return the tokens per second of the last ten steps."""
        last = self.records[-10:]
        return sum(row["tokens"] for row in last) / sum(row["seconds"] for row in last)

    def spike_limit(self) -> float:
        """Return the loss above which the next one is a spike; infinity before a quarter of the window is known.

        It is far above the median of the last WINDOW finite losses: THRESHOLD robust standard deviations, 1.4826 times
        the median distance from the median (Iglewicz and Hoaglin, 1993), and LEAST nats besides. Neither a single odd
        batch nor the fall of a young loss moves a median much, as they would a mean. A spike that stays becomes it.
        """
        losses = [row["loss"] for row in self.records[-WINDOW:] if row["loss"] is not None]
        if len(losses) < WINDOW // 4:
            return math.inf
        middle = median(losses)
        return middle + max(THRESHOLD * 1.4826 * median(abs(loss - middle) for loss in losses), LEAST)

    def load_shares(self) -> list[list[float]]:
        """Return for each MoE layer its experts' loads over the recent steps, as shares of the mean load."""
        loads = [row["loads"] for row in self.recent() if row["loads"]]
        if not loads:
            return []
        total = torch.tensor(loads).sum(0).double()
        return (total / total.mean(1, keepdim=True)).tolist()


# --- TensorBoard: the same figures under the same names; the library is optional


def require_tensorboard() -> None:
    """Raise a ValueError where the library is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "train.tensorboard needs the library tensorboard, which is not installed; "
            "run pip install 'dsmini[tensorboard]', or leave train.tensorboard off: metrics.jsonl has the same figures"
        )


class TensorBoard:
    """Writes the rows of steps as event files, for `tensorboard --logdir runs`.

    Args:
        folder: folder of the event files; made if missing.
        layers: names of the MoE layers, in the order of a row's layer_max_vio and loads.
        first: number of the first step that is added. That one and later ones of an earlier process are not shown.
    """

    def __init__(self, folder: Path, layers: Sequence[str], first: int = 1) -> None:
        from torch.utils.tensorboard import SummaryWriter  # two seconds to import

        self.layers = layers
        purge_step = first if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def add(self, row: Row) -> None:
        """Write the figures of a step. Histograms of the loads come with each validation."""
        scalars = {**row, **{f"max_vio/{n}": v for n, v in zip(self.layers, row["layer_max_vio"] or (), strict=False)}}
        for name, value in scalars.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, float(value), row["step"])
        for layer, loads in zip(self.layers, row["loads"] or (), strict=False):
            counts = np.asarray(loads, dtype=np.float64)
            if row["val_loss"] is not None:
                self._writer.add_histogram(f"load/{layer}", counts / max(counts.mean(), 1.0), row["step"])

    def close(self) -> None:
        """Write all events that are still in memory."""
        self._writer.close()
