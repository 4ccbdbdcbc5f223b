"""What people see of a run: its plots, and at the end its figures and a sample.

The plots show losses, gradient norm and learning rate, the loads of the experts, and the figures of indexers.
"""

import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmini import accounting
from dsmini.atomic import new_file
from dsmini.checkpoint.run_folder import run_tokenizer
from dsmini.console.messages import printable, say
from dsmini.inference.generation import Generation
from dsmini.inference.sampling import Sampling
from dsmini.machine import DTYPES, peak_memory
from dsmini.training.record import Row

if TYPE_CHECKING:
    from dsmini.training.run import TrainingRun

LN2 = math.log(2)
PALE, BLUE, ORANGE = "#9db4d0", "#1f4e8c", "#c8501e"


def plot_run(run: Path, rows: Sequence[Row], loads: Mapping[str, Sequence[float]]) -> None:
    """Write loss.png and, for a model with experts or indexers, expert_load.png or indexer.png into the run folder.

    Each is written whole or not at all.

    Args:
        rows: of all steps.
        loads: for each MoE layer, by name, its experts' loads as shares of the mean, over the last steps.
    """
    _plot_loss(run / "loss.png", rows)
    if loads:
        _plot_loads(run / "expert_load.png", rows, loads)
    if of_indexers := [row for row in rows if "indexer_kl" in row]:
        _plot_indexers(run / "indexer.png", of_indexers)


def _plot_loss(path: Path, rows: Sequence[Row]) -> None:
    with _picture(path, 6, (3.4, 1)) as (axes, below):
        x, raw, mtp = (_column(rows, name) for name in ("step", "loss", "mtp_loss"))
        axes.plot(x, raw, color=PALE, linewidth=0.8, label="training, each step")
        if any(value > 0 for value in mtp):
            axes.plot(x, _smooth(mtp), color="#7a7a7a", linewidth=0.9, label="multi-token prediction, smoothed")
        axes.plot(x, _smooth(raw), color=BLUE, linewidth=1.8, label="training, smoothed")
        validated = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] is not None]
        if validated:
            label = f"validation, last {validated[-1][1]:.3f}"
            axes.plot(*zip(*validated, strict=True), "o-", color=ORANGE, markersize=4, label=label)
        axes.set(ylabel="cross-entropy, nats a token", title="Loss")
        right = axes.secondary_yaxis("right", functions=(lambda v: np.divide(v, LN2), lambda v: np.multiply(v, LN2)))
        right.set_ylabel("bits a token")
        axes.legend()
        norms = _column(rows, "grad_norm")
        below.plot(x, norms, color=PALE, linewidth=0.8)
        if any(norm > 0 for norm in norms):
            below.set_yscale("log")
        below.set(xlabel="step", ylabel="gradient norm")
        rate = below.twinx()
        rate.plot(x, _column(rows, "lr"), color=ORANGE, linewidth=1.4)
        rate.set_ylabel("learning rate", color=ORANGE)
        rate.set_ylim(bottom=0)


def _plot_loads(path: Path, rows: Sequence[Row], loads: Mapping[str, Sequence[float]]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    heights = (1 + 0.35 * len(loads), 2.4)
    with _picture(path, 0.8 + sum(heights), heights, sharex=False) as (heat, line):
        largest = max(max(shares) for shares in loads.values())
        norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2, largest))  # white is an equal share, whatever the largest is
        image = heat.imshow(list(loads.values()), cmap="RdBu_r", norm=norm, aspect="auto")
        heat.set(xlabel="expert", title="Load of each expert in the last steps, 1 = an equal share")
        heat.set_yticks(range(len(loads)), list(loads))
        heat.grid(visible=False)
        heat.figure.colorbar(image, ax=heat)
        line.plot(_column(rows, "step"), _smooth(_column(rows, "max_vio")), color=BLUE)
        line.set(xlabel="step", ylabel="MaxVio", title="(largest load - mean) / mean, smoothed; 0 = perfect balance")
        line.set_ylim(bottom=0)


def _plot_indexers(path: Path, rows: Sequence[Row]) -> None:
    with _picture(path, 6, (1, 1)) as (top, below):
        x = _column(rows, "step")
        of_layers = [row["layer_indexer_kl"] or [] for row in rows]
        for layer in range(max(map(len, of_layers))):
            kl = [of[layer] if of else math.nan for of in of_layers]
            top.plot(x, _smooth(kl), color=PALE, linewidth=0.8, label="each layer" if layer == 0 else None)
        top.plot(x, _smooth(_column(rows, "indexer_kl")), color=BLUE, linewidth=1.8, label="mean")
        top.set(ylabel="KL divergence, nats", title="Attention that the indexers miss")
        top.set_ylim(bottom=0)
        for name, color, label in (
            ("indexer_mass", BLUE, "share of attention on the picks"),
            ("indexer_recall", ORANGE, "share of the top-k keys that is picked"),
        ):
            below.plot(x, _smooth(_column(rows, name)), color=color, label=label)
        below.set(xlabel="step", ylim=(0, 1.02))
        top.legend()
        below.legend()


@contextmanager
def _picture(path: Path, height: float, heights: tuple[float, float], sharex: bool = True) -> Iterator[tuple[Any, Any]]:
    """Yield two axes, one below the other, and save the whole picture, or leave the one before."""
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw

    figure = Figure(figsize=(8, height), layout="constrained")
    both = figure.subplots(2, 1, height_ratios=heights, sharex=sharex)
    for axes in both:
        axes.grid(alpha=0.3)
    yield both
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _column(rows: Sequence[Row], name: str) -> list[float]:
    """Return one figure of every step, with NaN where there is none, or it was not finite."""
    return [math.nan if row.get(name) is None else row[name] for row in rows]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the unbiased exponential moving average over about a twentieth of the values; NaN is passed over."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        if not math.isnan(value):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        out.append(mean / weight if weight else math.nan)
    return out


# --- the end of a finished run


TEMPERATURE = 0.8


def summarise(run: "TrainingRun") -> dict[str, Any]:
    """Return the figures of the whole run."""
    config, trainer, model = run.config, run.trainer, run.trainer.model.config
    history, last = run.history, run.history.records[-1]
    train, itemsize = config.train, DTYPES[config.train.dtype].itemsize
    parameters = accounting.parameters(model)
    tokens = sum(row["tokens"] for row in history.records)  # not those of steps that a rewind took back
    rate = tokens / history.seconds
    flops = accounting.flops_per_token(model, config.seq_len, training=True, dsa_stage=train.dsa_stage).total
    cache, mha_cache = (
        bytes_of(model, itemsize) for bytes_of in (accounting.kv_bytes_per_token, accounting.mha_kv_bytes_per_token)
    )
    vio = [row["max_vio"] for row in history.recent() if row["max_vio"] is not None]
    validated = [(row["val_loss"], row["step"]) for row in history.records if row["val_loss"] is not None]
    best_val_loss, best_val_step = min(validated, default=(None, None))
    nats = last["val_loss"]
    return {
        "run": str(run.folder),
        "steps": trainer.steps_done,
        "loss": last["loss"],
        "val_loss": nats,
        "val_bits_per_byte": None if nats is None else nats / math.log(2) / trainer.corpus.bytes_per_token,
        "val_loss_ema": last.get("val_loss_ema"),
        "val_loss_at_eval_context": last.get("val_loss_at_eval_context"),
        "eval_context": train.eval_context,
        "best_val_loss": best_val_loss,
        "best_val_step": best_val_step,
        "val_tokens": trainer.final_windows().tokens,
        "held_out_tokens": trainer.corpus.windows(config.seq_len).tokens,
        "seq_len": config.seq_len,
        "tokens": tokens,
        "train_seconds": history.seconds,
        "tokens_per_s": rate,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "flops_per_s": flops * rate,
        "dtype": train.dtype,
        "device": train.device,
        "threads": torch.get_num_threads(),
        "peak_memory": peak_memory(trainer.device),
        "cache_bytes_per_token": cache,
        "mha_cache_bytes_per_token": mha_cache,
        "cache_saved": 1 - cache / mha_cache,
        "max_vio": sum(vio) / len(vio) if vio else None,
        "skipped": sum(row["skipped"] for row in history.records),
        "corpus_sha256": trainer.corpus.sha256,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the figures of a finished run as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in summary_lines(summary):
        table.add_row(name, Text(value))
    console.print(table)


def summary_lines(s: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a summary's figures in words. A line whose figure is None or 0 is left out."""
    where = f"{s['val_tokens']:,} held-out tokens: all whole windows of {s['seq_len']}"
    if s["val_tokens"] < s["held_out_tokens"]:
        where = f"{s['val_tokens']:,} of {s['held_out_tokens']:,} held-out tokens, in windows of {s['seq_len']}"
    saved = f"{{mha_cache_bytes_per_token:,}} with the same heads as MHA, {s['cache_saved']:.1%} less"
    speed = f"{s['flops_per_s'] / 1e9:.1f} GFLOP/s in {{dtype}}"
    lines = [
        ("val_loss", "validation", "{val_loss:.4f} nats, {val_bits_per_byte:.4f} bits a byte (" + where + ")"),
        ("val_loss_at_eval_context", "at context", "{val_loss_at_eval_context:.4f} nats in windows of {eval_context}"),
        ("val_loss_ema", "average", "{val_loss_ema:.4f} nats with the parameters' average over the steps"),
        ("parameters", "parameters", "{parameters:,}, of which {active_parameters:,} are active for a token"),
        ("tokens", "training", "{tokens:,} tokens in {train_seconds:.0f} s: {tokens_per_s:,.0f} tokens/s"),
        ("dtype", "speed", speed),
        ("dtype", "memory", f"{s['peak_memory'] / 2**20:,.0f} MiB at the peak"),
        ("dtype", "cache", "{cache_bytes_per_token:,} bytes a token in {dtype}; " + saved),
        ("max_vio", "balance", "MaxVio {max_vio:.2f}, mean over the layers and the last tenth of the steps"),
        ("skipped", "skipped", "{skipped} steps, for a gradient that was not finite"),
    ]
    shown = s | {"skipped": s["skipped"] or None}
    return [(name, words.format_map(s)) for figure, name, words in lines if shown[figure] is not None]


def write_sample(run: "TrainingRun") -> str:
    """Let a trained model continue train.sample_prompt; return the whole text, "" if none is wanted or possible.

    On the screen control characters are pictures. The text that is returned has them as they are.
    """
    train, console = run.config.train, run.console
    if not train.sample_tokens:
        return ""
    try:
        model = run.whole_model().eval()
    except ValueError as error:
        say(console, f"no sample: {error}")
        return ""
    tokenizer = run_tokenizer(run.folder, run.config)
    decoder, text = tokenizer.stream(), train.sample_prompt
    console.rule(f"a sample at temperature {TEMPERATURE}")
    console.out(printable(text), end="", highlight=False)
    generation = Generation(
        model,
        [tokenizer.encode(text).tolist()],
        train.sample_tokens,
        sampling=Sampling(temperature=TEMPERATURE),
        generator=torch.Generator().manual_seed(train.seed),
        slide=True,
    )
    try:
        for (tokens,) in generation:
            piece = decoder.decode(tokens)
            console.out(printable(piece), end="", highlight=False)
            text += piece
    except ValueError as error:  # a model whose training failed has no finite logits
        say(console, f"no sample: {error}")
    finally:
        console.print()
        console.rule()
    return text + decoder.decode([], final=True)


def offered_prompt(run: "TrainingRun") -> str:
    """Return a prompt for a trained model, as a shell takes it: the first whole words of the held-out text."""
    if run.config.data.path is None:  # the source code of Python's library
        return "'def '"
    text = run_tokenizer(run.folder, run.config).decode(run.trainer.corpus.val[:128].tolist())
    prompt = " ".join(text.split()[1:4])
    fits = 0 < len(prompt) <= 40 and prompt.isprintable() and "\ufffd" not in prompt and not prompt.startswith("-")
    return shlex.quote(prompt) if fits else "TEXT"
