"""A whole training run: steps and validations with their record, what is saved, and the summary at the end."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from dsmini import accounting
from dsmini.checkpoint.training import save_model, write_json
from dsmini.config import RunConfig
from dsmini.machine import DTYPES, matmul_rate, peak_memory
from dsmini.report import TrainingProgress, bits, plot_run
from dsmini.tensorboard import TensorBoard
from dsmini.trainer import Step, Trainer

MAX_SKIPPED_IN_A_ROW = 10
PLOT_EVERY = 30.0
"""Seconds of training between two drawings on the way, at the least."""
PLOT_SHARE = 0.01
"""Of the training time that drawing may take."""


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
        self.recent: list[Step] = []
        self.seconds = 0.0
        self.plot_seconds = 0.0
        self.next_plot = 1 / PLOT_SHARE  # as if drawing took a second
        self.board: TensorBoard | None = None
        self.skipped_in_a_row = 0
        self.saved = False

    def train(self) -> bool:
        """All steps, or those until Ctrl-C; the model is saved either way. Whether it came to the end.

        Raises: ArithmeticError after MAX_SKIPPED_IN_A_ROW steps without a finite gradient; OSError, or rich's exit
            for a closed pipe, where something could not be written, after saving the model if that can be done.
        """
        if self.config.train.tensorboard:
            self.board = TensorBoard(self.folder / "tensorboard", self._moe_layers(), self.trainer.steps_done)
        try:
            return self._train()
        except (OSError, SystemExit):
            if self.trainer.steps_done and not self.saved:
                save_model(self.folder, self.trainer.steps_done, self.trainer.model)
            raise
        finally:
            if self.board is not None:
                self.board.close()

    def _train(self) -> bool:
        steps = self.config.train.steps
        progress = TrainingProgress(self.console, steps, self.config.seq_len)
        with (self.folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics, progress, asked_to_stop() as asked:
            while self.trainer.steps_done < steps:
                step = self.trainer.step()
                self._keep(step)
                progress.show(step, self._recent_rate())
                last, lost = step.step == steps, self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
                stop = bool(asked)  # read once: Ctrl-C in the validation below stops after the next step
                if last or stop or lost:
                    save_model(self.folder, step.step, self.trainer.model)
                    self.saved = True
                self._record(step, None if stop else self._validate(step.step, progress), metrics)
                if stop:
                    return False
                if not last and self.rows[-1]["val_loss"] is not None and self.seconds >= self.next_plot:
                    self.plot()
                if lost:
                    raise ArithmeticError(
                        f"no finite gradient in the {MAX_SKIPPED_IN_A_ROW} steps up to step {step.step}; "
                        "lower train.lr, or look at the data"
                    )
        return True

    def _keep(self, step: Step) -> None:
        self.seconds += step.seconds
        self.recent = [*self.recent, step][-max(10, self.config.train.steps // 10) :]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step.skipped else 0

    def _recent_rate(self) -> float:
        """Tokens a second over the last steps."""
        steps = self.recent[-10:]
        return sum(s.tokens for s in steps) / sum(s.seconds for s in steps)

    def _validate(self, step: int, progress: TrainingProgress) -> float | None:
        """On the way a part of the held-out split, at the end all of it."""
        train = self.config.train
        if step == train.steps:
            with progress.validating() as on_part:
                return self.trainer.validate(on_part=on_part)
        if step % train.eval_every:
            return None
        nats = self.trainer.validate(train.eval_tokens)
        progress.validated(step, nats, self.trainer.corpus.windows(self.config.seq_len, train.eval_tokens).tokens)
        return nats

    def _record(self, step: Step, val_loss: float | None, metrics: Any) -> None:
        row = {
            "step": step.step,
            "loss": step.loss,
            "val_loss": val_loss,
            "lr": step.lr,
            "tokens_per_s": step.tokens / step.seconds,
            "max_vio": step.max_vio,
            "skipped": step.skipped,
            "mtp_loss": step.mtp_loss,
            "balance_loss": step.balance_loss,
            "grad_norm": step.grad_norm,
            "data_wait": step.data_wait,
            "memory": peak_memory(self.trainer.device),
        }
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.rows.append(row)
        metrics.write(json.dumps(row) + "\n")
        metrics.flush()
        if self.board is not None:
            self.board.add(row)

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
        counts = [step.counts for step in self.recent if step.counts is not None]
        if not counts:
            return []
        total = torch.stack(counts).sum(0).double()
        return (total / total.mean(1, keepdim=True)).tolist()

    def summarise(self) -> dict[str, Any]:
        """The run's figures, also written to summary.json. Measures this machine's matrix peak (a second)."""
        config, model = self.config, self.trainer.model.config
        device, dtype = self.trainer.device, DTYPES[config.train.dtype]
        parameters = accounting.parameters(model)
        tokens = len(self.rows) * config.train.batch_size * config.seq_len
        rate = tokens / self.seconds
        flops = accounting.flops_per_token(model, config.seq_len, causal=True, training=True).total * rate
        peak = matmul_rate(device, dtype)
        val_loss = self.rows[-1]["val_loss"]
        cache = accounting.kv_bytes_per_token(model, dtype.itemsize)
        mha_cache = accounting.mha_kv_bytes_per_token(model, dtype.itemsize)
        vio = [step.max_vio for step in self.recent if step.max_vio is not None]
        summary = {
            "run": str(self.folder),
            "steps": self.trainer.steps_done,
            "loss": self.rows[-1]["loss"],
            "val_loss": val_loss,
            "val_bits_per_byte": None if val_loss is None else bits(val_loss) / self.trainer.corpus.bytes_per_token,
            "val_tokens": (len(self.trainer.corpus.val) - 1) // config.seq_len * config.seq_len,
            "seq_len": config.seq_len,
            "tokens": tokens,
            "train_seconds": self.seconds,
            "tokens_per_s": rate,
            "parameters": parameters.total,
            "active_parameters": parameters.active,
            "flops_per_s": flops,
            "matrix_peak": peak,
            "peak_share": flops / peak,
            "dtype": config.train.dtype,
            "device": config.train.device,
            "threads": torch.get_num_threads(),
            "peak_memory": peak_memory(device),
            "cache_bytes_per_token": cache,
            "mha_cache_bytes_per_token": mha_cache,
            "cache_saved": 1 - cache / mha_cache,
            "max_vio": sum(vio) / len(vio) if vio else None,
            "skipped": sum(row["skipped"] for row in self.rows),
            "corpus_sha256": self.trainer.corpus.sha256,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(self.folder / "summary.json", summary)
        return summary


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C, SIGTERM or a closed terminal; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked:
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
