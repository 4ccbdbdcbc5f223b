"""The record of a step: one typed line of metrics.jsonl, which plots, TensorBoard and the summary read too; and the
history of a run: its records and their totals."""

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch

from dsmini.checkpoint.training_state import RunState
from dsmini.nn import max_violation
from dsmini.reading import read_rows
from dsmini.training.trainer import StepResult

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """The record of an optimizer step: its StepResult as JSON can hold it, and the measurements after it.

    None stands for a figure that is not finite or was not measured, and in a dense model for figures of experts.
    """

    step: int
    """Number of the step, counted from 1."""
    loss: float | None
    """Cross-entropy in nats a token, before the update."""
    val_loss: float | None = None
    """Cross-entropy on held-out text in nats a token, after the update."""
    lr: float | None
    """Learning rate."""
    tokens_per_s: float | None
    """Training tokens per second."""
    max_vio: float | None
    """Mean over the MoE layers of (largest load - mean load) / mean load."""
    skipped: bool
    """The gradient or a loss was not finite, and nothing was changed."""
    mtp_loss: float | None
    """Loss of multi-token prediction in nats a token."""
    balance_loss: float | None
    """Balance loss of the experts."""
    grad_norm: float | None
    """Norm of the gradient before clipping, as in StepResult."""
    data_wait: float | None
    """Share of the seconds spent waiting for the batch."""
    memory: int
    """Peak memory so far in bytes."""
    tokens: int
    """Training tokens of the step."""
    seconds: float
    """Duration of the step in seconds."""
    layer_max_vio: list[float] | None
    """max_vio of each MoE layer."""
    loads: list[list[int]] | None
    """Tokens that each expert received, for each MoE layer."""
    scores: Mapping[str, float | str | list[float] | None] = field(default_factory=dict)
    """Optional figures, in metrics.jsonl keys like the others. Validation losses of the last step: val_loss_ema, with
    the EMA of the parameters, and val_loss_at_eval_context. With several processes: spread, as in StepResult, and
    busiest, the number of the part of the batch with most work. With DSA: indexer_kl, indexer_recall and indexer_mass,
    means over the layers of what IndexerLoss says, and layer_indexer_* of each layer. With train.diagnose, where what
    binds the run has changed: binds, "Data", "Algorithm", "Machine" or "" for nothing, and binds_share."""

    @classmethod
    def of(cls, step: StepResult, memory: int, scores: Mapping[str, float | str | list[float] | None]) -> "StepRecord":
        """Return the record of a step before its validation."""
        counts = step.counts
        indexers = {f"indexer_{name}": _all_finite(of_layers) for name, of_layers in (step.indexers or {}).items()}
        means = {name: of_layers and sum(of_layers) / len(of_layers) for name, of_layers in indexers.items()}
        same = ((name, getattr(step, name)) for name in KINDS if hasattr(step, name))
        figures: dict[str, Any] = {name: _finite(v) if isinstance(v, float) else v for name, v in same}
        return cls(
            **figures,
            tokens_per_s=_finite(step.tokens / step.seconds),
            memory=memory,
            layer_max_vio=None if counts is None else max_violation(counts).tolist(),
            loads=None if counts is None else counts.tolist(),
            scores={**scores, **means, **{f"layer_{name}": of_layers for name, of_layers in indexers.items()}},
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "StepRecord":
        """Return the record of a line that `row` wrote. Keys other than the fields are scores.

        Raises: ValueError for a row that lacks a key or has a value of the wrong kind.
        """
        known = {name: row[name] for name in KINDS if name in row}
        for name, kinds in KINDS.items():
            if not isinstance(row.get(name, _MISSING), kinds):
                raise ValueError(f"{name}={row.get(name)!r} is not {' or '.join(kind.__name__ for kind in kinds)}")
        return cls(**known, scores={key: value for key, value in row.items() if key not in known})

    def row(self) -> dict[str, Any]:
        """Return the record as a line of metrics.jsonl."""
        return {name: getattr(self, name) for name in KINDS} | dict(self.scores)

    def validated(self, val_loss: float, **scores: float) -> "StepRecord":
        """Return the record with validation losses in it."""
        finite = {name: _finite(score) for name, score in scores.items()}
        return dataclasses.replace(self, val_loss=_finite(val_loss), scores={**self.scores, **finite})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _all_finite(values: list[float]) -> list[float] | None:
    return values if all(map(math.isfinite, values)) else None


_MISSING = object()


def _kinds(hint: Any) -> tuple[type, ...]:
    choices = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(get_origin(choice) or choice for choice in choices)


KINDS = {name: _kinds(hint) for name, hint in get_type_hints(StepRecord).items() if name != "scores"}
"""The classes that each key of metrics.jsonl may have, in the order of the keys."""


def read_records(run: Path) -> list[StepRecord]:
    """Read metrics.jsonl, leaving out lines that are torn or incomplete."""
    records = []
    for row in read_rows(run / METRICS):
        with suppress(ValueError):
            records.append(StepRecord.from_row(row))
    return records


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


# --- TensorBoard: the same figures under the same names; the library is optional

SCALARS = (
    *("loss", "val_loss", "mtp_loss", "balance_loss", "lr", "grad_norm"),
    *("tokens_per_s", "data_wait", "memory", "skipped", "max_vio"),
)


def require_tensorboard() -> None:
    """Raise a ValueError where the library is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "train.tensorboard needs the library tensorboard, which is not installed; "
            "run pip install 'dsmini[tensorboard]', or leave train.tensorboard off: metrics.jsonl has the same figures"
        )


class TensorBoard:
    """Writes the records of steps as event files, for `tensorboard --logdir runs`.

    Args:
        folder: folder of the event files; made if missing.
        layers: names of the MoE layers, in the order of a record's `layer_max_vio` and `loads`.
        first: number of the first step that is added. That one and later ones of an earlier process are not shown.
    """

    def __init__(self, folder: Path, layers: Sequence[str], first: int = 1) -> None:
        from torch.utils.tensorboard import SummaryWriter  # two seconds to import

        self.layers = layers
        purge_step = first if folder.exists() else None
        self.writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def add(self, record: StepRecord) -> None:
        """Write a step. Missing figures are left out. Histograms of the loads come with each validation."""
        scalars: dict[str, Any] = {name: getattr(record, name) for name in SCALARS}
        scalars |= {name: value for name, value in record.scores.items() if name.startswith("indexer_")}
        scalars |= {
            f"max_vio/{layer}": vio for layer, vio in zip(self.layers, record.layer_max_vio or (), strict=False)
        }
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, float(value), record.step)
        if record.val_loss is not None:
            for layer, loads in zip(self.layers, record.loads or (), strict=False):
                counts = np.asarray(loads, dtype=np.float64)
                self.writer.add_histogram(f"load/{layer}", counts / max(counts.mean(), 1.0), record.step)

    def close(self) -> None:
        """Write all events that are still in memory."""
        self.writer.close()
