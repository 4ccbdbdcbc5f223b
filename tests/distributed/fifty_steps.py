"""python -m tests.distributed.fifty_steps: 50 steps in every layout of 2 and 4 ranks, next to one process.

Layouts sum in other orders, and training makes small differences grow. So the differences are given next to those of
one process with itself, where the batch is accumulated in other parts.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

from dsmini.config.parallel import CHUNKS
from dsmini.distributed.pieces import joined_pieces
from dsmini.distributed.world import World
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Trained, train

STEPS, PARTS, SECONDS = 50, 8, 400.0
MODEL: dict[str, Any] = {"n_layers": 8}
FP8: dict[str, Any] = {**MODEL, "dim": 128, "inter_dim": 128, "moe_inter_dim": 128, "precision": "fp8"}
RECIPE: dict[str, Any] = {"batch_size": 16, "lr": 2e-3}


def layouts() -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of ranks, and how they are divided."""
    for n in (2, 4):
        for zero in range(4):
            yield from ((n, {"dp": n // ep, "ep": ep, "zero": zero}) for ep in (1, 2, 4) if ep <= n)
        yield n, {"ep": n, "nodes": 2}
        for schedule in CHUNKS:
            yield n, {"pp": n, "schedule": schedule}
    for schedule in CHUNKS:
        yield 4, {"pp": 2, "schedule": schedule}
        yield 4, {"pp": 2, "ep": 2, "schedule": schedule}


def difference(ranks: list[Trained], want: Trained) -> tuple[float, float, int]:
    """Return the largest relative difference of a loss and of a tensor, and the steps with other loads of experts."""
    got = ranks[0]
    tensors = {n: joined_pieces([of.pieces[n] for of in ranks if n in of.pieces]) for n in want.tensors}
    losses = ((got.losses - want.losses).abs().max() / want.losses.abs().max()).item()
    sizes = {name: max(w.abs().max().item(), 1e-30) for name, w in want.tensors.items() if name.startswith("model/")}
    moved = max((tensors[name] - want.tensors[name]).abs().max().item() / size for name, size in sizes.items())
    pairs = zip(got.steps, want.steps, strict=True)
    return losses, moved, sum(not (g.counts is not None and g.counts.equal(w.counts)) for g, w in pairs)


def main() -> None:
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "AdamW": (MODEL, {}),
        "Muon, recompute, average": (MODEL, {"optimizer": "muon", "recompute": True, "ema_decay": 0.9}),
        "FP8": (FP8, {}),
    }
    for title, (model, options) in cases.items():
        recipe = RECIPE | options
        whole = train(World(), None, model, recipe, STEPS)
        print(f"{title}: loss from {whole.steps[0].loss:.4f} to {whole.steps[-1].loss:.4f}", flush=True)
        for parts in (2, 4, PARTS):
            found = difference([train(World(), None, model, recipe | {"grad_accum": parts}, STEPS)], whole)
            print(_line(f"one process, {parts} parts", found), flush=True)
        for n, parallel in layouts():
            parts = PARTS if parallel.get("pp", 1) > 1 else 1
            if title != "AdamW" and parallel.get("pp", 1) > 1 and parallel["schedule"] not in ("1f1b", "dualpipev"):
                continue
            start = time.monotonic()
            results = run_ranks(n, train, parallel, model, recipe | {"grad_accum": parts}, STEPS, seconds=SECONDS)
            taken = f"{time.monotonic() - start:.0f} s"
            print(f"{_line(f'{n} ranks, {_words(parallel)}', difference(results, whole))}  {taken}", flush=True)


def _words(parallel: dict[str, Any]) -> str:
    return " ".join(
        f"{key} {value}" for key, value in parallel.items() if (value != 1 and value != 0) or (key == "zero" and value)
    )


def _line(name: str, found: tuple[float, float, int]) -> str:
    return f"{name:44} loss {found[0]:8.1e}  weights {found[1]:8.1e}  steps with other loads {found[2]:2}"


if __name__ == "__main__":
    sys.exit(main())
