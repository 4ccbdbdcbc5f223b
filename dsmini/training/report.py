"""What people see of a run: the progress bar, the plots, the summary."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dsmini.atomic import new_file
from dsmini.training.trainer import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LN2 = math.log(2)
PALE, BLUE, ORANGE = "#9db4d0", "#1f4e8c", "#c8501e"


class TrainingProgress:
    """A bar in a terminal; in a pipe or a file a line every so many steps."""

    def __init__(self, console: Console, steps: int, seq_len: int) -> None:
        self.console, self.steps, self.seq_len = console, steps, seq_len
        self.every = max(1, steps // 20)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(f"step 0/{steps}", total=steps, figures="")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, step: Step, tokens_per_s: float) -> None:
        """One training step."""
        vio = "" if step.max_vio is None else f"  MaxVio {step.max_vio:.2f}"
        wait = f"  data wait {step.data_wait:.0%}" if step.data_wait > 0.05 else ""
        figures = f"loss {step.loss:.3f}  {tokens_per_s:,.0f} tok/s  lr {step.lr:.1e}{vio}{wait}"
        where = f"step {step.step}/{self.steps}"
        self.bar.update(self.task, completed=step.step, figures=figures, description=where)
        if not self.console.is_terminal and (step.step == 1 or step.step % self.every == 0):
            left = (self.steps - step.step) * step.tokens / max(tokens_per_s, 1e-9)
            self.say(f"{where}  {figures}  {left:.0f} s left")
        if step.skipped:
            self.say(f"step {step.step}: the gradient was not finite; the step was skipped, nothing changed")

    def validated(self, step: int, nats: float, tokens: int) -> None:
        """A validation on the way."""
        self.say(f"step {step}: validation {nats:.3f} nats ({tokens:,} held-out tokens, context {self.seq_len})")

    @contextmanager
    def validating(self, how: str = "") -> Iterator[Callable[[float], None]]:
        """A bar for the validation on the whole held-out split; what it gives is to be told the share that is done."""
        self.say(f"validating on the whole held-out split{how}")
        task = self.bar.add_task("validation", total=1.0, figures="")
        yield lambda done: self.bar.update(task, completed=done)
        self.bar.remove_task(task)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class ReadingProgress:
    """How far a corpus is read and tokenised, once that has taken a second: a bar in a terminal, else a line now
    and then."""

    def __init__(self, console: Console) -> None:
        self.console, self.started, self.said = console, time.monotonic(), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ReadingProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """What is being done, and how many bytes on disk of how many are through."""
        now = time.monotonic()
        if now - self.started < 1:
            return
        self.bar.start()
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what)
        self.bar.update(self.tasks[what], completed=done, total=total)
        if not self.console.is_terminal and now - self.said > 10:
            self.said = now
            self.console.print(f"{what} the corpus: {done / max(1, total):.0%} of {total:,} bytes", highlight=False)


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / LN2


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The figures of a finished run, as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in summary_lines(summary):
        table.add_row(name, Text(value))
    console.print(table)


def summary_lines(s: dict[str, Any]) -> list[tuple[str, str]]:
    """A summary's figures in words."""
    lines = []
    if s["val_loss"] is not None:
        where = f"{s['val_tokens']:,} held-out tokens: all whole windows of {s['seq_len']}"
        lines.append(("validation", f"{s['val_loss']:.4f} nats, {s['val_bits_per_byte']:.4f} bits a byte ({where})"))
    if s["val_loss_at_eval_context"] is not None:
        lines.append(("at context", f"{s['val_loss_at_eval_context']:.4f} nats in windows of {s['eval_context']}"))
    if s["val_loss_ema"] is not None:
        lines.append(("average", f"{s['val_loss_ema']:.4f} nats with the parameters' average over the steps"))
    vs = f"{s['mha_cache_bytes_per_token']:,} with the same heads as MHA, {s['cache_saved']:.1%} less"
    lines += [
        ("parameters", f"{s['parameters']:,}, of which {s['active_parameters']:,} are active for a token"),
        ("training", f"{s['tokens']:,} tokens in {s['train_seconds']:.0f} s: {s['tokens_per_s']:,.0f} tokens/s"),
        (
            "speed",
            f"{s['flops_per_s'] / 1e9:.1f} GFLOP/s, {s['peak_share']:.0%} of the {s['matrix_peak'] / 1e9:.0f} that "
            f"this machine reached in {s['dtype']} matrix products",
        ),
        ("memory", f"{s['peak_memory'] / 2**20:,.0f} MiB at the peak"),
        ("cache", f"{s['cache_bytes_per_token']:,} bytes a token in {s['dtype']}; {vs}"),
    ]
    if s["max_vio"] is not None:
        lines.append(("balance", f"MaxVio {s['max_vio']:.2f}, mean over the layers and the last tenth of the steps"))
    if s["skipped"]:
        lines.append(("skipped", f"{s['skipped']} steps, for a gradient that was not finite"))
    return lines


def plot_run(run: Path, steps: Sequence[Mapping[str, Any]], loads: Mapping[str, Sequence[float]]) -> None:
    """Write loss.png and, for a model with experts, expert_load.png into the run folder, each whole or not at all.

    Args:
        steps: the lines of metrics.jsonl.
        loads: for each MoE layer, by name, its experts' loads as shares of the mean, over the last steps.
    """
    _plot_loss(run / "loss.png", steps)
    if loads:
        _plot_loads(run / "expert_load.png", steps, loads)


def _plot_loss(path: Path, steps: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=(3.4, 1), sharex=True)
    x, raw = [row["step"] for row in steps], _column(steps, "loss")
    mtp = _smooth(_column(steps, "mtp_loss"))
    axes.plot(x, raw, color=PALE, linewidth=0.8, label="training, each step")
    if any(value > 0 for value in mtp):
        axes.plot(x, mtp, color="#7a7a7a", linewidth=0.9, label="multi-token prediction, smoothed")
    axes.plot(x, _smooth(raw), color=BLUE, linewidth=1.8, label="training, smoothed")
    validated = [(row["step"], row["val_loss"]) for row in steps if row["val_loss"] is not None]
    if validated:
        label = f"validation, last {validated[-1][1]:.3f}"
        axes.plot(*zip(*validated, strict=True), "o-", color=ORANGE, markersize=4, label=label)
    axes.set(ylabel="cross-entropy, nats a token", title="Loss")
    right = axes.secondary_yaxis("right", functions=(lambda v: np.divide(v, LN2), lambda v: np.multiply(v, LN2)))
    right.set_ylabel("bits a token")
    axes.grid(alpha=0.3)
    axes.legend()

    norms = _column(steps, "grad_norm")
    below.plot(x, norms, color=PALE, linewidth=0.8)
    if any(norm > 0 for norm in norms):
        below.set_yscale("log")
    below.set(xlabel="step", ylabel="gradient norm")
    below.grid(alpha=0.3)
    rate = below.twinx()
    rate.plot(x, _column(steps, "lr"), color=ORANGE, linewidth=1.4)
    rate.set_ylabel("learning rate", color=ORANGE)
    rate.set_ylim(bottom=0)
    _save(figure, path)


def _plot_loads(path: Path, steps: Sequence[Mapping[str, Any]], loads: Mapping[str, Sequence[float]]) -> None:
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.8 + 0.35 * len(loads) + 2.4), layout="constrained")
    heat, line = figure.subplots(2, 1, height_ratios=(1 + 0.35 * len(loads), 2.4))
    largest = max(max(shares) for shares in loads.values())
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2, largest))  # white is an equal share, whatever the largest is
    image = heat.imshow(list(loads.values()), cmap="RdBu_r", norm=norm, aspect="auto")
    heat.set(xlabel="expert", title="Load of each expert in the last steps, 1 = an equal share")
    heat.set_yticks(range(len(loads)), list(loads))
    figure.colorbar(image, ax=heat)
    line.plot([row["step"] for row in steps], _smooth(_column(steps, "max_vio")), color=BLUE)
    line.set(xlabel="step", ylabel="MaxVio", title="(largest load - mean) / mean, smoothed; 0 = perfect balance")
    line.set_ylim(bottom=0)
    line.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    """A whole picture or the one before: who looks at it while the run goes on never sees half of one."""
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _column(steps: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A figure of every step; NaN where it was not finite."""
    return [math.nan if row[key] is None else row[key] for row in steps]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, unbiased at the start; NaN is passed over."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        if not math.isnan(value):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        out.append(mean / weight if weight else math.nan)
    return out
