"""python -m dsmini.distributed.eplb: place the experts of a run on GPUs, and show the balance before and after.

placement.py has the algorithm.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Int
from rich.console import Console

from dsmini.console.command import run
from dsmini.console.commandline import Help, parse
from dsmini.console.messages import say
from dsmini.distributed.pictures import check_picture, save
from dsmini.distributed.placement import GpuBalance, Placement, balance, count_duplicates, place_experts
from dsmini.reading import is_there, open_regular, parse_json

__all__ = ["GpuBalance", "Placement", "balance", "count_duplicates", "loads_of_run", "place_experts"]

METRICS = "metrics.jsonl"
BEFORE, AFTER = "#c8501e", "#1f4e8c"
MOST_LINES = 40
"""Number of layers that a terminal shows."""


def loads_of_run(folder: Path, last: int | None = None) -> Int[np.ndarray, "layers e"]:
    """Return the tokens that each expert received in a training run: the sum over steps of its metrics.jsonl.

    Lines that are torn are left out.

    Args:
        last: number of steps to sum, the last ones; None: all.

    Raises: ValueError for a folder without such a file, a run without experts, and loads that make no table.
    """
    if last is not None and last < 1:
        raise ValueError(f"--last {last} is not positive; use 1 or more, or leave it out for all steps")
    path = folder / METRICS
    if not is_there(path):
        raise ValueError(f"{folder} has no {METRICS}; name the folder of a training run")
    steps: list[np.ndarray] = []
    with open_regular(path) as file:
        for line in file:
            with suppress(ValueError):
                row = parse_json(line.decode(errors="replace"), METRICS)
                if isinstance(row, dict) and row.get("loads") is not None:
                    steps.append(_table(row["loads"]))
    if not steps:
        raise ValueError(f"{path} has no loads of experts; name a run of a model with experts, not a dense one")
    if len(sizes := {step.shape for step in steps}) > 1:
        said = " and ".join(str(list(size)) for size in sorted(sizes))
        raise ValueError(f"{path} has loads of different sizes, {said}; use --last to take those of one model")
    return np.sum(steps[-(last or 0) :], axis=0)


def _table(loads: Any) -> np.ndarray:
    """Return the loads of a step as a table. Raises: ValueError for anything but equal rows of counts."""
    table = np.array(loads)  # raises for rows of different lengths
    if table.ndim != 2 or not table.size or table.dtype.kind != "i" or (table < 0).any():
        raise ValueError("loads are not counts of tokens for each layer and expert")
    return table


def show(found: GpuBalance, title: str, console: Console | None = None) -> None:
    """Print the largest load of a GPU over the mean for each layer, before and after, and the finding."""
    from dsmini.report import Table
    from dsmini.report.terminal import show_table

    console = console or Console()
    rows = [
        [str(layer), f"{before:.3f}", f"{after:.3f}", str(same)]
        for layer, (before, after, same) in enumerate(zip(found.before, found.after, found.duplicates, strict=True))
    ]
    columns = ("MoE layer", "before", "after", "useless copies")
    show_table(console, Table(columns=columns, rows=rows[:MOST_LINES], numeric=columns), title)
    if len(rows) > MOST_LINES:
        say(console, f"... and {len(rows) - MOST_LINES} more, with --json", style="dim")
    say(console, finding(found), style="bold cyan")


def finding(found: GpuBalance) -> str:
    """Return the balance in a sentence."""
    said = f"The busiest GPU has {found.before.mean():.3f} times the mean load before, {found.after.mean():.3f} after"
    if same := int(found.duplicates.sum()):
        layers = int((found.duplicates > 0).sum())
        said += f"; {same} copies in {layers} layers are useless, next to another copy of their expert on one GPU"
    return f"{said}."


def draw(found: GpuBalance, path: Path) -> None:
    """Draw the largest load of each layer before and after, and above it the loads of all GPUs."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure  # half a second to import
    from matplotlib.ticker import MaxNLocator

    layers = len(found.before)
    tall = 1.2 + min(6.0, 0.3 * layers)
    figure = Figure(figsize=(9, tall + 2.8), layout="constrained")
    axes = figure.subplot_mosaic([["before", "after"], ["largest", "largest"]], height_ratios=(tall, 2.8))
    # white is the mean load, whatever the largest is
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2.0, found.loads_before.max(), found.loads_after.max()))
    image = None
    for name, loads in (("before", found.loads_before), ("after", found.loads_after)):
        image = axes[name].imshow(loads, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        axes[name].set(xlabel="GPU", ylabel="MoE layer", title=f"Load of each GPU {name}, 1 = the mean")
        for axis in (axes[name].xaxis, axes[name].yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    assert image is not None
    figure.colorbar(image, ax=[axes["before"], axes["after"]])
    below = axes["largest"]
    for name, ratios, colour in (("before", found.before, BEFORE), ("after", found.after, AFTER)):
        label = f"{name}, mean {ratios.mean():.3f}"
        below.plot(range(layers), ratios, "o-", color=colour, markersize=4, linewidth=1.2, label=label)
    below.axhline(1, color="#7a7a7a", linewidth=0.8, linestyle="--")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set(xlabel="MoE layer", title="Largest load of a GPU over the mean; 1 = perfect balance")
    below.grid(alpha=0.3)
    below.legend()
    save(figure, path)


@dataclass(frozen=True, kw_only=True)
class EplbCommand:
    """Place the experts of a run on GPUs by the loads that it recorded, and show the balance before and after.

    RUN is the folder of a training run with metrics.jsonl, which is only read. Before: one copy of each expert, in the
    order of their numbers. After: placed by DeepSeek's load balancer. 1 is a perfect balance.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a training run."""
    gpus: int = 4
    """Number of GPUs, over all nodes."""
    nodes: int = 1
    """Number of nodes. If it divides --groups, a group of experts stays whole on one node."""
    redundant: int = 0
    """Number of copies beyond one of each expert, over all GPUs."""
    groups: int = 1
    """Number of expert groups of the model's gate: n_expert_groups of its config."""
    last: int | None = None
    """Number of steps to take the loads from, the last ones; left out: all steps."""
    spread: bool = False
    """Exchange copies afterwards so that fewer GPUs have two copies of one expert, without a larger load."""
    out: Path | None = None
    """File.png for a picture of the loads of all GPUs."""
    json: bool = False
    """Print a line of JSON instead, with the placement."""


HELP = Help(
    usage="RUN [FLAGS]",
    examples=("runs/toy-001 --gpus 4", "runs/toy-001 --gpus 8 --nodes 2 --groups 4 --redundant 8 --out balance.png"),
    main=("gpus", "nodes", "redundant", "groups", "last", "spread", "out", "json"),
)


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(EplbCommand, "distributed.eplb", args, help=HELP)
    if command.run is None:
        raise ValueError("no run is named; name the folder of one, such as runs/toy-001")
    if command.redundant < 0:
        raise ValueError(f"--redundant {command.redundant} is negative; use 0 for one copy of each expert")
    if command.out is not None:
        check_picture(command.out)
    loads = loads_of_run(command.run, command.last)
    places = loads.shape[1] + command.redundant
    placement = place_experts(loads, places, command.groups, command.nodes, command.gpus, spread=command.spread)
    found = balance(loads, placement, command.gpus)
    console = Console(stderr=command.json)
    if command.json:
        print(json.dumps(_record(placement, found)))
    else:
        show(found, f"Largest load over the mean, {places} places, {command.gpus} GPUs", console)
    if command.out is not None:
        draw(found, command.out)
        say(console, f"written  {command.out}")
    return 0


def _record(placement: Placement, found: GpuBalance) -> dict[str, Any]:
    """Return the answer as JSON can hold it."""
    return {
        "before": found.before.tolist(),
        "after": found.after.tolist(),
        "duplicates": found.duplicates.tolist(),
        "experts": placement.experts.tolist(),
        "counts": placement.counts.tolist(),
    }


if __name__ == "__main__":
    run(main)
