"""Does MoE earn its keep? A toy against its dense twin of equal active parameters, on equal tokens.

    python -m benchmarks.moe_or_dense [--seeds 5] [--steps 1000] [--out results/moe_or_dense]

Two layers of MLA and eight experts each, of which a token visits two and the shared one, by the recipe of
configs/shakespeare.toml; the twin's feed-forwards are as wide as the three experts together. Both are trained on the
source code of Python's standard library, and scored over the whole held-out split. Each seed gives one difference
dense - MoE in nats a byte; reported are their mean
and its 95 % interval (Student's t). A finished run in --out is not repeated, so an interrupted benchmark goes on.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
# two-sided 95 % quantiles of Student's t, by degrees of freedom
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


CONFIG = "configs/shakespeare.toml"
TWINS = {"moe": ["--model.n-dense-layers", "0"], "dense": ["--model.n-dense-layers", "2", "--model.inter-dim", "384"]}


def trained(name: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """The summary of a run, which is made if it is not there."""
    if not (out / "summary.json").exists():
        where = ["--out", str(out), "--train.seed", str(seed), "--train.steps", str(steps)]
        quick = ["--train.eval-every", str(steps), "--train.sample-tokens", "0"]
        subprocess.run(
            [sys.executable, "-m", "dsmini.train", CONFIG, *TWINS[name], *where, *quick, "--json"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return json.loads((out / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results/moe_or_dense"))
    options = parser.parse_args()
    out = options.out.resolve()
    console = Console(stderr=True)
    table = Table("seed", "MoE", "dense", "dense - MoE", "tokens/s MoE", "dense")
    rows = []
    for seed in range(options.seeds):
        moe, dense = (trained(name, seed, options.steps, out / f"{name}-{options.steps}-{seed}") for name in TWINS)
        gain = dense["val_loss"] - moe["val_loss"]
        rows.append({"seed": seed, "moe": moe["val_loss"], "dense": dense["val_loss"], "gain": gain})
        rates = [f"{run['tokens_per_s']:,.0f}" for run in (moe, dense)]
        table.add_row(str(seed), f"{moe['val_loss']:.4f}", f"{dense['val_loss']:.4f}", f"{gain:+.4f}", *rates)
        active = [run["active_parameters"] for run in (moe, dense)]
    gains = [row["gain"] for row in rows]
    mean = statistics.mean(gains)
    half = STUDENT_T[len(gains) - 1] * statistics.stdev(gains) / math.sqrt(len(gains))
    console.print(table)
    tokens = moe["tokens"]
    console.print(
        f"active parameters {active[0]:,} and {active[1]:,}; {tokens:,} tokens each. "
        f"MoE is better by {mean:.4f} nats a byte, 95 % interval {mean - half:.4f} to {mean + half:.4f}",
        highlight=False,
    )
    print(json.dumps({"benchmark": "moe_or_dense", "mean": mean, "half_width": half, "tokens": tokens, "rows": rows}))


if __name__ == "__main__":
    main()
