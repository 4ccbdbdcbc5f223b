"""This machine's roofs, measured once and kept: how fast it multiplies, how fast it moves bytes, what a call costs.

A class of operations has a curve: what one operation takes, by its size, from so small that only the call is left to so
large that no cache holds it. Between measured sizes it is interpolated, on logarithmic scales.
"""

import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.atomic import write_text
from dsmini.measure.counting import count
from dsmini.measure.machine import matmul_rate, synchronize

VERSION = 9
"""Of what is measured: kept roofs of another are measured anew."""
LARGE = 1 << 28
"""Bytes that no cache holds."""
ROUNDS = 5
BYTES = (1 << 8, 1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 27)
ROWS = (1, 4, 16, 64, 256, 1024)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a class of operations costs, by size."""

    sizes: Sequence[float]
    costs: Sequence[float]

    def at(self, size: float) -> float:
        """The cost at a size: beyond the last in proportion to it, below the first the first's."""
        if size <= self.sizes[0]:
            return self.costs[0]
        if size >= self.sizes[-1]:
            return self.costs[-1] * size / self.sizes[-1]
        i = next(i for i, s in enumerate(self.sizes) if s > size)
        (a, b), (low, high) = self.sizes[i - 1 : i + 1], self.costs[i - 1 : i + 1]
        share = math.log(size / a) / math.log(b / a)
        return low * (high / low) ** share


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """Rates of one machine, device and number of threads."""

    card: Mapping[str, str]
    """What the machine is: processor, cores, memory, caches, device, versions."""
    peak: Mapping[str, float]
    """FLOP/s of a large matrix product, by dtype ("float32", "bfloat16")."""
    bandwidth: float
    """Bytes/s that are read from memory."""
    copy: float
    """Bytes/s, read and written together, of a large copy."""
    call: float
    """Seconds of a call in a model, whatever it does: torch's part and that of the Python around it."""
    cache_bytes: int
    """Of the last-level cache."""
    probes: Mapping[str, float]
    """Seconds of a product and of reading memory, so short that they can be taken again and again; see steadiness."""
    curves: Mapping[str, Curve]
    """Seconds by bytes of "warm pointwise float32" and the like, FLOP/s by rows of "cold product bfloat16";
    cold: what is read comes from memory, and what is written goes where nothing was lately."""


def load_or_measure(
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
) -> Roofs:
    """The roofs of this machine with the threads that torch has now: kept ones, or measured now (half a minute).

    Args:
        keep: the file they are kept in, that of another machine too; left out: one in the user's cache.
        fresh: measured now, whatever is kept.
    """
    keep = keep or cache_folder() / "roofs.json"
    key = json.dumps([VERSION, card(device)], sort_keys=True)
    try:
        kept = json.loads(keep.read_text())
    except (OSError, ValueError):
        kept = {}
    if not fresh:
        with suppress(KeyError, TypeError, AttributeError, ValueError):  # none is kept, or it is damaged
            return from_json(kept[key])
    roofs = measure(device, on_part)
    kept = {**kept, key: asdict(roofs)} if isinstance(kept, dict) else {key: asdict(roofs)}
    with suppress(OSError):  # measured again next time
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_text(keep, json.dumps(kept))
    return roofs


def from_json(raw: Mapping[str, Any]) -> Roofs:
    return Roofs(**{**raw, "curves": {name: Curve(**curve) for name, curve in raw["curves"].items()}})


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmini"


def card(device: torch.device) -> dict[str, str]:
    """What this machine is."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    about = {
        "processor": name,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{memory_bytes(device) / 2**30:.0f} GiB" if memory_bytes(device) else "unknown",
        "last-level cache": f"{last_level_cache(device) / 2**20:.0f} MiB",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }
    return about


def memory_bytes(device: torch.device) -> int:
    """Of the GPU, or of the machine; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def last_level_cache(device: torch.device) -> int:
    """Bytes; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kib = [int(size[:-1]) for size in sizes if size.endswith("K")]
    return max(kib) * 1024 if kib else 32 << 20


def measure(device: torch.device, on_part: Callable[[float, str], None] = lambda done, what: None) -> Roofs:
    """All rates, each the median of a few rounds."""
    dtypes = [torch.float32, torch.bfloat16]
    jobs: list[tuple[str, Callable[[], Any]]] = [
        (f"peak {_name(dtype)}", lambda dtype=dtype: matmul_rate(device, dtype)) for dtype in dtypes
    ]
    jobs += [
        ("bandwidth", lambda: _bandwidth(device)),
        ("copy", lambda: _copy(device)),
        ("call", lambda: _call(device)),
        ("probes", lambda: probes(device)),
    ]
    for dtype in dtypes:
        for kind, make in (POINTS | PRODUCTS).items():
            for cold in (False, True):
                name = f"{'cold' if cold else 'warm'} {kind} {_name(dtype)}"
                jobs.append((name, lambda k=kind, m=make, d=dtype, c=cold: _curve(k, m, d, device, c)))
    done: dict[str, Any] = {}
    jobs.append(("probes again", lambda: probes(device)))
    for i, (name, job) in enumerate(jobs):
        on_part(i / len(jobs), name)
        done[name] = job()
    return Roofs(
        card=card(device),
        peak={_name(dtype): done[f"peak {_name(dtype)}"] for dtype in dtypes},
        bandwidth=done["bandwidth"],
        copy=done["copy"],
        call=done["call"],
        probes={name: statistics.mean((a, done["probes again"][name])) for name, a in done["probes"].items()},
        cache_bytes=last_level_cache(device),
        curves={name: curve for name, curve in done.items() if isinstance(curve, Curve)},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = ROUNDS, least: float = 2e-4) -> float:
    """Median seconds of one run, of runs in a row that take at least so long together."""
    run()
    times: list[float] = []
    repeats = 1
    while len(times) < rounds:
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
    """The best of what reads alone: a sum, and products of a matrix and a vector, in both dtypes."""
    x = torch.ones(LARGE // 4, device=device)
    rates = [LARGE / seconds_of(lambda: x.sum(), device, 3)]
    for dtype in (torch.float32, torch.bfloat16):
        matrix = x.view(dtype)[: LARGE // 4].view(-1, 4096)
        vector = torch.ones(1, 4096, dtype=dtype, device=device)
        rates.append(matrix.nbytes / seconds_of(lambda m=matrix, v=vector: F.linear(v, m), device, 3))
    return max(rates)


def probes(device: torch.device) -> dict[str, float]:
    """Seconds of a product of matrices and of a row with 128 MiB of weights, now; a sixth of a second on two cores."""
    a = torch.ones(1024, 1024, device=device)
    weights, row = a.bfloat16().repeat(64, 1, 1), a[:1].bfloat16()

    def stream() -> None:
        for weight in weights:
            F.linear(row, weight)

    runs: dict[str, Callable[[], object]] = {"products": lambda: a @ a, "weights": stream}
    return {name: seconds_of(run, device, ROUNDS, 6e-3) for name, run in runs.items()}


def steadiness(roofs: Roofs, device: torch.device) -> float:
    """The machine's rates now over the kept ones, the lowest of them; 1 if none was kept."""
    return min((roofs.probes[name] / now for name, now in probes(device).items()), default=1.0) if roofs.probes else 1.0


def _copy(device: torch.device) -> float:
    x = torch.ones(LARGE // 8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device, 3)


@torch.no_grad()
def _call(device: torch.device) -> float:
    """Of a decoding step of a model so small that nothing else counts: torch's part and the Python around it."""
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


# --- classes of operations: what to run, on what, and the bytes or FLOPs of it

Job = tuple[Callable[..., object], tuple[Tensor, ...], int]
"""An operation, its inputs, the first of which changes when they shall be cold, and its size."""


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(max(1, n // width), min(n, width), device=device).to(dtype)


def _pointwise(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a, b = (_rows(n, 512, dtype, device) for _ in range(2))
    return torch.mul, (a, b), 3 * a.nbytes


def _slow_pointwise(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 512, dtype, device)
    return F.silu, (a,), 2 * a.nbytes


def _softmax(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 256, dtype, device)
    return lambda a: a.softmax(-1), (a,), 2 * a.nbytes


def _reduction(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 512, dtype, device)
    return lambda a: a.mean(-1), (a,), a.nbytes


def _move(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a, b = (_rows(n, 32, dtype, device) for _ in range(2))
    return lambda a, b: torch.cat((a, b), -1), (a, b), 4 * a.nbytes


def _cast(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 512, dtype, device)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    a = a.to(other)  # an operation's dtype is that of its result
    return lambda a: a.to(dtype), (a,), a.numel() * 6


def _gather(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 256, dtype, device)
    index = torch.randint(0, len(a), (len(a),), device=device)
    return lambda a: a.index_select(0, index), (a,), 2 * a.nbytes + index.nbytes


def _order(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = torch.randint(0, 64, (max(1, min(n, 1 << 20)),), device=device)
    return lambda a: a.argsort(stable=True), (a,), 3 * a.nbytes


POINTS: Mapping[str, Callable[[int, torch.dtype, torch.device], Job]] = {
    "pointwise": _pointwise,
    "slow pointwise": _slow_pointwise,
    "softmax": _softmax,
    "reduction": _reduction,
    "move": _move,
    "cast": _cast,
    "gather": _gather,
    "order": _order,
}


def _product(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = (torch.rand(n, 1024, device=device).to(dtype) for n in (1024, rows))
    return lambda w, x: F.linear(x, w), (w, x), 2 * rows * 1024 * 1024


def _small_product(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = (torch.rand(n, 1024, device=device).to(dtype) for n in (256, rows))
    return lambda w, x: F.linear(x, w), (w, x), 2 * rows * 1024 * 256


def _batched(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    k, q = (torch.rand(16, n, 64, device=device).to(dtype) for n in (512, rows))
    return lambda k, q: k @ q.mT, (k, q), 2 * 16 * 512 * rows * 64


def _grouped(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = torch.rand(16, 512, 512, device=device).to(dtype), torch.rand(16 * rows, 512, device=device).to(dtype)
    ends = torch.arange(1, 17, device=device, dtype=torch.int32) * rows
    if hasattr(F, "grouped_mm"):
        return lambda w, x: F.grouped_mm(x, w.mT, offs=ends), (w, x), 2 * 16 * rows * 512 * 512
    return lambda w, x: [F.linear(a, b) for a, b in zip(x.split(rows), w, strict=True)], (w, x), 2 * x.numel() * 512


def _attention(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    q, k, v = (torch.rand(4, 8, rows, 64, device=device).to(dtype) for _ in range(3))
    flops = 2 * 32 * (rows * (rows + 1) // 2) * 128
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), flops


PRODUCTS: Mapping[str, Callable[[int, torch.dtype, torch.device], Job]] = {
    "product": _product,
    "small product": _small_product,
    "batched product": _batched,
    "grouped product": _grouped,
    "attention": _attention,
}
BUFFERS = 4
"""Times the last-level cache that cold inputs and outputs fill together."""


def _curve(
    kind: str,
    make: Callable[[int, torch.dtype, torch.device], Job],
    dtype: torch.dtype,
    device: torch.device,
    cold: bool,
) -> Curve:
    sizes, costs = [], []
    for size in ROWS if kind in PRODUCTS else BYTES:
        run, inputs, amount = make(size if kind in PRODUCTS else max(1, size // dtype.itemsize), dtype, device)
        if cold:
            run, inputs = _rotating(run, inputs), ()
        seconds = seconds_of(lambda run=run, inputs=inputs: run(*inputs), device, 3 if amount > 1 << 24 else ROUNDS)
        sizes.append(size if kind in PRODUCTS else amount)
        costs.append(amount / seconds if kind in PRODUCTS else seconds)
    return Curve(sizes=sizes, costs=costs)


def _rotating(run: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The same on other inputs each time, and with the last outputs kept, so that neither is where it was."""
    held = sum(t.nbytes for t in inputs)
    n = max(2, min(512, BUFFERS * last_level_cache(inputs[0].device) // max(1, held)))
    many = [tuple(t.clone() for t in inputs) for _ in range(n)]
    kept: list[object] = [None] * min(n, 64)
    calls = itertools.count()

    def turn() -> None:
        i = next(calls)
        kept[i % len(kept)] = run(*many[i % n])

    return turn


SMALL, LARGE_MATRIX = 256 * 1024, 1024 * 1024


def product_rate(roofs: Roofs, dtype: str, rows: float, size: float, cold: float) -> float:
    """flops_rate of a product with a matrix of so many numbers, between the two sizes that were measured."""
    share = math.log(min(max(size, SMALL), LARGE_MATRIX) / SMALL) / math.log(LARGE_MATRIX / SMALL)
    small, large = (flops_rate(roofs, kind, dtype, rows, cold) for kind in ("small product", "product"))
    return small * (large / small) ** share


def flops_rate(roofs: Roofs, kind: str, dtype: str, rows: float, cold: float) -> float:
    """FLOP/s of a product whose rows share a matrix, where a share `cold` of its bytes comes from memory."""
    rates = []
    for name in ("warm", "cold"):
        curve = roofs.curves[f"{name} {kind} {dtype}"]
        rates.append(curve.at(min(max(rows, curve.sizes[0]), curve.sizes[-1])))
    return 1 / ((1 - cold) / rates[0] + cold / rates[1])


def point_seconds(roofs: Roofs, kind: str, dtype: str, size: float, cold: float) -> float:
    """Seconds of an operation that moves so many bytes, a share `cold` of them from memory."""
    warm, far = (roofs.curves[f"{name} {kind} {dtype}"].at(size) for name in ("warm", "cold"))
    return (1 - cold) * warm + cold * far
