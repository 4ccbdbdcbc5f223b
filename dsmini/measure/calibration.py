"""Measuring this machine's roofs, once: they are kept, and stay within a budget of time on a machine of any speed."""

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini.atomic import write_text
from dsmini.config import ModelConfig
from dsmini.machine import DTYPES, card, last_level_cache, matmul_rate, synchronize
from dsmini.measure.counting import count
from dsmini.measure.kinds import POINTS, PRODUCTS
from dsmini.measure.rates import Curve, Roofs, from_json
from dsmini.nn import Transformer
from dsmini.reading import read_table

VERSION = 9
"""The version of what is measured: roofs kept by another are measured again."""
LARGE = 1 << 28
"""Bytes that no cache holds."""
ROUNDS = 5
BUDGET = 60.0
"""Seconds that all may take together; a quiet machine needs half of it."""
BYTES = (1 << 8, 1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 27)
ROWS = (1, 4, 16, 64, 256, 1024)


def load_or_measure(
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
) -> Roofs:
    """Return the roofs of this machine with the threads that torch has now: kept ones, or measured now (half a minute).

    Args:
        keep: the file they are kept in, that of another machine too; left out: one in the user's cache.
        fresh: measured now, whatever is kept.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    keep = keep or cache / "dsmini" / "roofs.json"
    key = json.dumps([VERSION, card(device)], sort_keys=True)
    try:
        kept = read_table(keep)
    except ValueError:
        kept = {}
    if not fresh:
        with suppress(KeyError, TypeError, AttributeError, ValueError):  # none is kept, or it is damaged
            return from_json(kept[key])
    roofs = measure(device, on_part)
    kept = {**(kept if isinstance(kept, dict) else {}), key: asdict(roofs)}
    with suppress(OSError):  # measured again next time
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_text(keep, json.dumps(kept))
    return roofs


def measure(
    device: torch.device,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    seconds: float = BUDGET,
) -> Roofs:
    """Measure all rates, each the median of a few rounds.

    Args:
        seconds: about how long all may take. On a slow or busy machine there are fewer rounds, and curves end sooner.
    """
    jobs = _jobs(device)
    done: dict[str, Any] = {}
    start = time.perf_counter()
    for i, (name, job) in enumerate(jobs):
        on_part(i / len(jobs), name)
        left = max(0.0, seconds - (time.perf_counter() - start))
        # few need more than their share, and most far less
        done[name] = job(3 * left / (len(jobs) - i))
    return Roofs(
        card=card(device),
        peak={name: done[f"peak {name}"] for name in DTYPES},
        bandwidth=done["bandwidth"],
        copy=done["copy"],
        call=done["call"],
        probes={name: statistics.mean((a, done["probes again"][name])) for name, a in done["probes"].items()},
        cache_bytes=last_level_cache(device),
        curves={name: curve for name, curve in done.items() if isinstance(curve, Curve)},
    )


def _jobs(device: torch.device) -> list[tuple[str, Callable[[float], Any]]]:
    """Return what is to be measured, in order, by name; each is told how many seconds it has."""
    jobs: list[tuple[str, Callable[[float], Any]]] = [
        (f"peak {name}", lambda most, dtype=dtype: matmul_rate(device, dtype, most)) for name, dtype in DTYPES.items()
    ]
    jobs += [
        ("bandwidth", lambda most: _bandwidth(device)),
        ("copy", lambda most: _copy(device)),
        ("call", lambda most: _call(device)),
        ("probes", lambda most: probes(device)),
    ]
    jobs += [
        (f"{where} {kind} {name}", lambda most, k=kind, d=dtype, w=where: _curve(k, d, device, w == "cold", most))
        for name, dtype in DTYPES.items()
        for kind in (*POINTS, *PRODUCTS)
        for where in ("warm", "cold")
    ]
    return [*jobs, ("probes again", lambda most: probes(device))]


def seconds_of(
    run: Callable[[], object], device: torch.device, rounds: int = ROUNDS, least: float = 2e-4, most: float = math.inf
) -> float:
    """Return the median seconds of one run, of runs in a row that take at least `least` seconds together.

    Args:
        most: no further round begins once the rounds took so many seconds; one there is in any case.
    """
    run()
    times: list[float] = []
    repeats = 1
    begun = time.perf_counter()
    while len(times) < rounds and not (times and time.perf_counter() - begun > most):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        elapsed = time.perf_counter() - start
        if elapsed < least and repeats < 1 << 14:
            repeats = max(repeats * 2, int(repeats * least / max(elapsed, 1e-7)))
            continue
        times.append(elapsed / repeats)
    return statistics.median(times)


def _bandwidth(device: torch.device) -> float:
    """Return the best of what reads alone: a sum, and products of a matrix and a vector, in both dtypes."""
    x = torch.ones(LARGE // 4, device=device)
    rates = [LARGE / seconds_of(lambda: x.sum(), device, 3)]
    for dtype in (torch.float32, torch.bfloat16):
        matrix = x.view(dtype)[: LARGE // 4].view(-1, 4096)
        vector = torch.ones(1, 4096, dtype=dtype, device=device)
        rates.append(matrix.nbytes / seconds_of(lambda m=matrix, v=vector: F.linear(v, m), device, 3))
    return max(rates)


def probes(device: torch.device) -> dict[str, float]:
    """Return the seconds of a product of matrices and of a row with 128 MiB of weights, now.

    Takes a sixth of a second on two cores.
    """
    a = torch.ones(1024, 1024, device=device)
    weights, row = a.bfloat16().repeat(64, 1, 1), a[:1].bfloat16()

    def stream() -> None:
        for weight in weights:
            F.linear(row, weight)

    runs: dict[str, Callable[[], object]] = {"products": lambda: a @ a, "weights": stream}
    return {name: seconds_of(run, device, ROUNDS, 6e-3) for name, run in runs.items()}


def steadiness(roofs: Roofs, device: torch.device) -> float:
    """Return the machine's rates now over the kept ones, the lowest of them; 1 if none was kept."""
    return min((roofs.probes[name] / now for name, now in probes(device).items()), default=1.0) if roofs.probes else 1.0


def _copy(device: torch.device) -> float:
    x = torch.ones(LARGE // 8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device, 3)


@torch.no_grad()
def _call(device: torch.device) -> float:
    """Return the seconds of a call in a decoding step of a model so small that nothing else counts."""
    config = ModelConfig(
        dim=16,
        inter_dim=16,
        moe_inter_dim=16,
        n_layers=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_mtp_layers=0,
    )
    with torch.device(device):
        model = Transformer(config).eval()
        token = torch.zeros(1, 1, dtype=torch.int64)
    cache = model.new_cache(1, 128)

    def step() -> None:
        cache.truncate(0)
        model(token, cache)

    step()
    counted = count(step)
    return seconds_of(step, device) / (len(counted.operations) + counted.views)


BUFFERS = 4
"""Times the last-level cache that cold inputs and outputs fill together."""


def _curve(kind: str, dtype: torch.dtype, device: torch.device, cold: bool, most: float) -> Curve:
    """Measure sizes from the smallest on, as many as will probably fit into `most` seconds, at least one."""
    is_product = kind in PRODUCTS
    make = PRODUCTS[kind] if is_product else POINTS[kind]
    begun = before = time.perf_counter()
    sizes: list[float] = []
    costs: list[float] = []
    for size in ROWS if is_product else BYTES:
        run, inputs, amount = make(size if is_product else max(1, size // dtype.itemsize), dtype, device)
        if cold:
            run, inputs = _rotating(run, inputs), ()
        rounds = 3 if amount > 1 << 24 else ROUNDS
        seconds = seconds_of(lambda run=run, inputs=inputs: run(*inputs), device, rounds, most=most / 3)
        sizes.append(size if is_product else amount)
        costs.append(amount / seconds if is_product else seconds)
        now = time.perf_counter()
        if now - begun + 2 * (now - before) > most:
            break
        before = now
    return Curve(sizes=sizes, costs=costs)


def _rotating(run: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the same on other inputs each time, and with the last outputs kept, so that neither is where it was."""
    held = sum(t.nbytes for t in inputs)
    n = max(2, min(512, BUFFERS * last_level_cache(inputs[0].device) // max(1, held)))
    many = [tuple(t.clone() for t in inputs) for _ in range(n)]
    kept: list[object] = [None] * min(n, 64)
    calls = itertools.count()

    def turn() -> None:
        i = next(calls)
        kept[i % len(kept)] = run(*many[i % n])

    return turn
