"""The plots of a run: losses, gradient norm and learning rate, loads of the experts, figures of indexers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmini.atomic import new_file
from dsmini.training.record import Row

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
            axes.plot(x, smooth(mtp), color="#7a7a7a", linewidth=0.9, label="multi-token prediction, smoothed")
        axes.plot(x, smooth(raw), color=BLUE, linewidth=1.8, label="training, smoothed")
        for key, name, color in (
            ("val_loss_at_eval_context", "validation at eval_context", "#3b8f5a"),
            ("val_loss", "validation", ORANGE),
        ):
            validated = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if validated:
                label = f"{name}, last {validated[-1][1]:.3f}"
                axes.plot(*zip(*validated, strict=True), "o-", color=color, markersize=4, label=label)
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
        line.plot(_column(rows, "step"), smooth(_column(rows, "max_vio")), color=BLUE)
        line.set(xlabel="step", ylabel="MaxVio", title="(largest load - mean) / mean, smoothed; 0 = perfect balance")
        line.set_ylim(bottom=0)


def _plot_indexers(path: Path, rows: Sequence[Row]) -> None:
    with _picture(path, 6, (1, 1)) as (top, below):
        x = _column(rows, "step")
        of_layers = [row["layer_indexer_kl"] or [] for row in rows]
        for layer in range(max(map(len, of_layers))):
            kl = [of[layer] if of else math.nan for of in of_layers]
            top.plot(x, smooth(kl), color=PALE, linewidth=0.8, label="each layer" if layer == 0 else None)
        top.plot(x, smooth(_column(rows, "indexer_kl")), color=BLUE, linewidth=1.8, label="mean")
        top.set(ylabel="KL divergence, nats", title="Attention that the indexers miss")
        top.set_ylim(bottom=0)
        for name, color, label in (
            ("indexer_mass", BLUE, "share of attention that goes to chosen keys"),
            ("indexer_recall", ORANGE, "share of the top-k keys that are chosen"),
        ):
            below.plot(x, smooth(_column(rows, name)), color=color, label=label)
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


def smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the mean of the values around each, a twentieth of all, without NaN. Near the start there are fewer.

    The same number come before and after, so that the curve does not lag, but near the end.
    """
    figures, places = np.asarray(values, dtype=np.float64), np.arange(len(values))
    known = np.isfinite(figures)
    half = np.minimum(len(values) // 40, places)
    first, after = places - half, np.minimum(places + half + 1, len(values))
    sums, counts = (np.append(0.0, np.cumsum(of)) for of in (np.where(known, figures, 0.0), known))
    number = counts[after] - counts[first]
    return np.where(number > 0, sums[after] - sums[first], math.nan) / np.maximum(number, 1)
