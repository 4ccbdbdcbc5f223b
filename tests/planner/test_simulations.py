"""Formulas against simulations: pipelines chunk by chunk, and runs with random failures."""

import functools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from dsmini.planner.training.layout import Layout, Recompute, Schedule
from tests.helpers.plans import Formulas, figures_of, of_layout, setup_of

# --- pipelines

SIZES = [(4, 8), (4, 20), (8, 20), (16, 120)]
"""Stages and micro-batches."""
MACHINES: list[tuple[str, int, Recompute]] = [
    ("", 1, "none"),
    ("fast_link*0.05", 1, "full"),
    ("fast_link*0.3", 2, "none"),
]
"""Links, GPUs that share matrices, and recomputation, by which the times of chunks differ."""
Program = Callable[[int, int, int], list[str]]


def one_f_one_b(rank: int, stages: int, micro_batches: int) -> list[str]:
    """Return the chunks of a GPU under 1F1B, F or B and the direction, which is always 0."""
    ahead = min(stages - rank - 1, micro_batches)
    return ["F0"] * ahead + ["F0", "B0"] * (micro_batches - ahead) + ["B0"] * ahead


def dualpipe(rank: int, stages: int, micro_batches: int) -> list[str]:
    """Return DualPipe's program of a GPU: b is a backward without W; direction 0 is the one that it is nearer to."""
    half, h = stages // 2, min(rank, stages - 1 - rank)
    ends = ["B1", "B0"] * (h + 1)
    ends[h + 1 :] = [chunk.lower() for chunk in ends[h + 1 :]]
    return [
        *["F0"] * (2 * (half - h - 1)),
        *["F0", "F1"] * (h + 1),
        *["b1", "W", "F1"] * (half - h - 1),
        *["F0&B1", "F1&B0"] * (micro_batches // 2 - stages + h + 1),
        *["B1", "F1&B0"] * (half - h - 1),
        *ends,
        *["W", "b0"] * (half - h - 1),
        *["W"] * (h + 1),
    ]


def simulate(program: Program, stages: int, micro_batches: int, cost: dict[str, float]) -> tuple[float, list[float]]:
    """Return the time of a step, and how long each GPU works. A chunk starts when its GPU and its input are ready."""
    programs = [program(rank, stages, micro_batches) for rank in range(stages)]
    done: dict[tuple[str, int, int, int], float] = {}
    clock, busy, seen = [0.0] * stages, [0.0] * stages, [Counter[tuple[str, int]]() for _ in range(stages)]
    while any(programs):
        before = sum(map(len, programs))
        for rank, chunks in enumerate(programs):
            while chunks:
                parts = [(part[0], part[1:]) for part in chunks[0].split("&")]
                turned = rank >= stages // 2 > 0 and program is dualpipe
                keys = [(kind.upper(), int(phase) ^ turned) for kind, phase in parts if phase]
                needs = [need(kind, way, seen[rank][kind, way], rank, stages) for kind, way in keys]
                if not all(key is None or key in done for key in needs):
                    break
                length = cost["both" if len(parts) == 2 else parts[0][0]]
                clock[rank] = max([clock[rank], *(done[key] for key in needs if key)]) + length
                busy[rank] += length
                for kind, way in keys:
                    done[kind, way, seen[rank][kind, way], rank] = clock[rank]
                    seen[rank][kind, way] += 1
                chunks.pop(0)
        assert sum(map(len, programs)) < before, "nothing can run"
    return max(clock), busy


def need(kind: str, way: int, i: int, rank: int, stages: int) -> tuple[str, int, int, int] | None:
    """Return the chunk that makes the input of micro-batch i: of the stage before, in backward of the stage after."""
    step = -1 if way else 1
    stage = stages - 1 - rank if way else rank
    if kind == "F":
        return ("F", way, i, rank - step) if stage else None
    return ("B", way, i, rank + step) if stage < stages - 1 else ("F", way, i, rank)


@pytest.mark.parametrize(("machine", "tensor", "recompute"), MACHINES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_step_is_that_of_a_simulated_pipeline(
    schedule: Schedule, stages: int, micro_batches: int, machine: str, tensor: int, recompute: Recompute
) -> None:
    """Compare the whole step, and the wait of the GPU in the middle, which is longest in DualPipe."""
    made = setup_of(f"deepseek-v3 {machine} gpus=1 batch={8 * micro_batches}")
    layout = Layout(
        gpus=8 * tensor * stages, pipeline=stages, expert=8, tensor=tensor, schedule=schedule, recompute=recompute
    )
    found = {name: figure.value for name, figure in of_layout(made, layout).items()}
    sent, alone = found["chunk_dispatch"] + found["chunk_tensor"], found["chunk_forward"] + found["chunk_backward"]
    backward, weights = found["chunk_backward"] + sent, found["chunk_weights"]
    both = max(alone, 2 * found["chunk_dispatch"]) + 2 * found["chunk_tensor"]
    cost = {"F": found["chunk_forward"] + sent, "B": backward, "b": backward - weights, "W": weights, "both": both}
    whole, busy = simulate(dualpipe if schedule == "dualpipe" else one_f_one_b, stages, micro_batches, cost)
    parts = [found[f"{part}_seconds"] for part in ("computing", "dispatching", "reducing", "bubble")]
    assert whole == pytest.approx(sum(parts))
    assert whole - busy[stages // 2 - 1] == pytest.approx(found["bubble_seconds"])


# --- failures

SIMULATED = 0.004
"""Relative standard error of 100,000 failures: 1 / sqrt(100,000) for an exponential time, and less for a ratio of two
sums that go together."""
SHARES = ("effective_share", "effective_share_at_any_rate", "first_order_error")
Run = dict[str, float]


@functools.cache
def formulas() -> tuple[Formulas, dict[str, float]]:
    """Return the formulas of a plan's failures, and its inputs."""
    figures = figures_of("toy")
    made = Formulas([figures[name] for name in SHARES])
    return made, {name: figure.value for name, figure in figures.items() if figure.op == "input"}


def run(gpus: float, write: float, restart: float = 300, interval: float | None = None) -> Run:
    """Return the figures of a run on this many GPUs; without an interval between checkpoints, with the planner's."""
    made, inputs = formulas()
    changed = inputs | {"gpus": gpus, "checkpoint_halt": write, "restart_time": restart}
    return made.values(changed | ({} if interval is None else {"checkpoint_interval": interval}), SHARES)


def trained(run: Run, seed: int, in_recovery: bool = True, failures: int = 100_000) -> float:
    """Return the share of the time that trains in a run with this many random failures.

    Each time between two failures is drawn from an exponential distribution. It begins with the restart, and then
    trains and writes in turns. The work since the last complete checkpoint is lost.

    Args:
        in_recovery: failures also happen during a restart; else the clock of failures stands still.
    """
    time = np.random.default_rng(seed).exponential(run["mean_time_to_failure"], failures)
    restart, interval = run["restart_time"], run["checkpoint_interval"]
    running = np.maximum(time - restart, 0.0) if in_recovery else time
    work = np.floor(running / (interval + run["checkpoint_halt"])) * interval
    return float(work.sum() / (time.sum() + (0.0 if in_recovery else failures * restart)))


@pytest.mark.parametrize(
    ("gpus", "write"), [(n, write) for n in (512, 2048, 8192, 12_000) for write in (1, 10, 60)] + [(1024, 300)]
)
def test_first_order_share_agrees_with_a_simulation(gpus: int, write: float) -> None:
    """Restart, interval and write are together below a sixth of the time to failure."""
    found = run(gpus, write)
    assert 300 + found["checkpoint_interval"] + write < found["mean_time_to_failure"] / 6
    for in_recovery in (True, False):
        assert found["effective_share"] == pytest.approx(trained(found, gpus, in_recovery), rel=0.02)


@pytest.mark.parametrize("gpus", [1024, 16_384, 131_072, 1_000_000])
@pytest.mark.parametrize("write", [10, 300])
def test_share_at_any_rate_agrees_with_a_simulation(gpus: int, write: float) -> None:
    found = run(gpus, write)
    share = found["effective_share_at_any_rate"]
    # rare cycles count for more: one in 1 / share failures completes any
    assert share == pytest.approx(trained(found, gpus), rel=4 * SIMULATED / math.sqrt(share))


def test_first_order_share_is_within_2_percent_on_its_whole_range() -> None:
    """Every restart from 0 to a sixth of the time to failure, with the write that uses up the rest of the range."""
    gpus, worst, mean = 8 * 86400 / 6.5e-3 / 6000, 0.0, 6000
    for restart in range(1, 1000, 37):
        for part in (0.02, 0.3, 0.7, 1.0):
            rest = part * (1000 - restart)  # of interval and write: D + D * D / 2 M
            interval = -mean + math.sqrt(mean**2 + 2 * mean * rest)
            found = run(gpus, interval**2 / (2 * mean), restart)
            assert found["checkpoint_interval"] == pytest.approx(interval)
            worst = max(worst, abs(found["first_order_error"]))
    assert 0.01 < worst < 0.02


def test_first_order_share_fails_at_large_rates() -> None:
    """A failure every 13.5 minutes, on 131,072 GPUs; none ends a restart on ten million."""
    for write, first, simulated in ((10, 0.512, 0.588), (300, 0.140, 0.245)):
        found = run(131_072, write)
        assert found["effective_share"] == pytest.approx(first, abs=0.001)
        assert trained(found, 3) == pytest.approx(simulated, rel=4 * SIMULATED)
        assert found["first_order_error"] < -0.1
    never = run(10_000_000, 10)
    assert never["effective_share"] == trained(never, 1) == 0 < never["effective_share_at_any_rate"] < 1e-6


@pytest.mark.parametrize("gpus", [1024, 16_384, 131_072])
@pytest.mark.parametrize("write", [1, 30, 300])
def test_interval_is_near_the_best_of_a_search(gpus: int, write: float) -> None:
    """Young's is the first term of a series whose terms fall by the root of w / 2 M. The search is a golden section."""
    found = run(gpus, write)
    low, high = math.log(found["mean_time_to_failure"] / 1e4), math.log(10 * found["mean_time_to_failure"])
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left, right = (run(gpus, write, interval=math.exp(x))["effective_share_at_any_rate"] for x in (a, b))
        low, high = (low, b) if left > right else (a, high)
    small = math.sqrt(write / (2 * found["mean_time_to_failure"]))
    assert found["checkpoint_interval"] == pytest.approx(math.exp(low), rel=2 * small + 1e-6)
