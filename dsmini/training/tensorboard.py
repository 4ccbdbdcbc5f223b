"""TensorBoard: a run's figures next to metrics.jsonl and under the same names. The library is optional."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dsmini.training.record import StepRecord

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
