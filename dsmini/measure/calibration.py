"""Measure this machine's roofs once, within a budget of time on a machine of any speed, and store them."""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ops
from dsmini.config import ModelConfig
from dsmini.machine import DTYPES, card, last_level_cache, matmul_rate
from dsmini.measure.counting import count
from dsmini.measure.cpu_time import watched
from dsmini.measure.kernels import FP8, KERNELS, TORCH, Kernel
from dsmini.measure.rates import Curve, Roofs, Store, from_json
from dsmini.measure.turns import in_turns
from dsmini.nn import Transformer

VERSION = 12
"""Version of the measurement; roofs stored by another version are measured again."""
LARGE = 1 << 28
"""Bytes that fit into no cache."""
ROUNDS = 5
ROUND, KERNEL_ROUND = 2e-4, 2e-3
"""Least seconds of a round, and of one of a kernel: waking its threads costs more than a small call."""
BUDGET = 60.0
"""Seconds for all measurements together; a quiet machine needs half of them."""
LEAST_TURN = 0.5
"""Least time of a part, as a share of the mean over all parts."""


def load_or_measure(
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
    seconds: float = BUDGET,
) -> Roofs:
    """Return the roofs of this machine for the current number of threads, stored or measured now (half a minute).

    Args:
        seconds: approximate time of the measurement. Roofs that had less than BUDGET, or of a busy machine, are not
            stored.
        keep: file that stores the roofs of one or more machines; None: a file in the user's cache.
        on_part: called with the share that is done and the name of the next part.
        fresh: measure even if roofs are stored.
    """
    store, key = Store.at(keep), key_of(device)
    if not fresh and (stored := store.read(key, from_json)) is not None:
        return stored
    roofs = measure(device, on_part, seconds)
    if seconds >= BUDGET:
        store.write(key, asdict(roofs), roofs.busy)
    return roofs


def key_of(device: torch.device) -> str:
    """Return the key of this machine's roofs in a store."""
    return json.dumps([VERSION, card(device)], sort_keys=True)


def measure(
    device: torch.device,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    seconds: float = BUDGET,
) -> Roofs:
    """Measure all rates, each as the median of a few rounds.

    Args:
        seconds: approximate time for all. A slow or busy machine gets fewer rounds and shorter curves.
    """
    jobs, done = _jobs(device), dict[str, Any]()

    def measure_all() -> None:
        start = time.perf_counter()
        for i, (name, job) in enumerate(jobs):
            on_part(i / len(jobs), name)
            left = max(0.0, seconds - (time.perf_counter() - start)) / (len(jobs) - i)
            # most parts need far less than their share; an interruption must not take it from all that follow
            done[name] = job(max(3 * left, LEAST_TURN * seconds / len(jobs)))

    _, busy = watched(measure_all)
    return Roofs(
        card=card(device),
        peak={name: done[f"peak {name}"] for name in DTYPES},
        bandwidth=done["bandwidth"],
        copy=done["copy"],
        call=done["call"],
        probes={name: statistics.mean((a, done["probes again"][name])) for name, a in done["probes"].items()},
        cache_bytes=last_level_cache(device),
        curves={name: curve for name, curve in done.items() if isinstance(curve, Curve)},
        busy=busy,
    )


def _jobs(device: torch.device) -> list[tuple[str, Callable[[float], Any]]]:
    """Return the parts to measure in order, each a name and a function of the seconds that it may take."""
    jobs: list[tuple[str, Callable[[float], Any]]] = [
        (f"peak {name}", lambda most, dtype=dtype: matmul_rate(device, dtype, most)) for name, dtype in DTYPES.items()
    ]
    jobs += [
        ("bandwidth", lambda most: read_bandwidth(device)),
        ("copy", lambda most: _copy(device)),
        ("call", lambda most: _call(device)),
        ("probes", lambda most: probes(device)),
    ]
    curves = [(kind, name, kernel, ROUND) for name in DTYPES for kind, kernel in TORCH.items()]
    if device.type == "cpu" and ops.serving("cpu") == "cpu":  # dsmini's own kernels run
        curves += [
            (f"kernel {kind}", name, kernel, KERNEL_ROUND) for kind, kernel in KERNELS.items() for name in kernel.dtypes
        ]
    jobs += [
        (f"{where} {kind} {name}", partial(curve_of, kernel, FP8 if name == "fp8" else DTYPES[name], device, *how))
        for kind, name, kernel, least in curves
        for where, how in (("warm", (False, least)), ("cold", (True, least)))
    ]
    return [*jobs, ("probes again", lambda most: probes(device))]


def seconds_of(
    run: Callable[[], object],
    device: torch.device,
    rounds: int = ROUNDS,
    least: float = ROUND,
    most: float = math.inf,
) -> float:
    """Return the second fastest of some rounds, in seconds: other programs only make a round slower.

    Args:
        least: seconds of a round, which repeats short runs.
        most: seconds after which no round begins; the first always runs.
    """
    taken = in_turns({"run": run}, device, count=rounds, seconds=most, least_seconds=least).seconds["run"]
    return sorted(taken)[len(taken) > 2]


def read_bandwidth(device: torch.device, size: int = LARGE, rounds: int = 3) -> float:
    """Return the highest rate of operations that only read: a sum, and matrix-vector products in both dtypes.

    Args:
        size: bytes to read, a multiple of 16,384 that fits into no cache.
    """
    x = torch.ones(size // 4, device=device)
    rates = [size / seconds_of(lambda: x.sum(), device, rounds)]
    for dtype in (torch.float32, torch.bfloat16):
        matrix = x.view(dtype)[: size // 4].view(-1, 4096)
        vector = torch.ones(1, 4096, dtype=dtype, device=device)
        rates.append(matrix.nbytes / seconds_of(lambda m=matrix, v=vector: F.linear(v, m), device, rounds))
    return max(rates)


def probes(device: torch.device) -> dict[str, float]:
    """Return the current seconds of a matrix product and of a row times 128 MiB of weights.

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
    """Return the lowest of the machine's current rates over the stored ones; 1 if none is stored."""
    return min((roofs.probes[name] / now for name, now in probes(device).items()), default=1.0) if roofs.probes else 1.0


def _copy(device: torch.device) -> float:
    x = torch.ones(LARGE // 8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device, 3)


@torch.no_grad()
def _call(device: torch.device) -> float:
    """Return the seconds of a call in a decoding step of a tiny model, where calls dominate."""
    widths = "dim inter_dim moe_inter_dim q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
    sizes: dict[str, Any] = dict.fromkeys(widths.split(), 16)
    config = ModelConfig(**sizes, n_layers=4, n_mtp_layers=0)
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


TURN = 0.2
"""Seconds to make the operands of a call, at most."""
BUFFERS = 4
"""Total size of cold inputs and outputs, as a multiple of the last-level cache."""


@torch.no_grad()
def curve_of(kernel: Kernel, dtype: torch.dtype, device: torch.device, cold: bool, least: float, most: float) -> Curve:
    """Measure growing sizes, as many as will probably fit into `most` seconds, and at least one."""
    spent, before = 0.0, time.perf_counter()
    sizes: list[float] = []
    amounts: list[float] = []
    taken: list[float] = []
    is_product = kernel.is_product
    for size in kernel.sizes:
        run, inputs, amount = kernel.make(size if is_product else max(1, size // dtype.itemsize), dtype, device)
        if cold:
            run, inputs = rotating(run, inputs), ()
        rounds = 3 if amount > 1 << 24 else ROUNDS
        seconds = seconds_of(lambda run=run, inputs=inputs: run(*inputs), device, rounds, least, most / 3)
        sizes.append(size if is_product else amount)
        amounts.append(amount)
        taken.append(seconds)
        now = time.perf_counter()
        turn = min(now - before, TURN + 4 * rounds * seconds)  # the rest was an interruption
        spent += turn
        if spent + 2 * turn > most:
            break
        before = now
    # a smaller call takes no longer than a larger one: where it seems to, something else ran
    taken = list(itertools.accumulate(reversed(taken), min))[::-1]
    costs = [amount / t for amount, t in zip(amounts, taken, strict=True)] if is_product else taken
    return Curve(sizes=sizes, costs=costs)


def rotating(run: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the operation on other inputs in each call, with old outputs kept, so that nothing is in a cache."""
    held = sum(t.nbytes for t in inputs)
    n = max(2, min(512, BUFFERS * last_level_cache(inputs[0].device) // max(1, held)))
    many = [tuple(t.clone() for t in inputs) for _ in range(n)]
    kept: list[object] = [None] * min(n, 64)
    calls = itertools.count()

    def turn() -> None:
        i = next(calls)
        kept[i % len(kept)] = run(*many[i % n])

    return turn
