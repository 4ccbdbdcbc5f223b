"""A planned step is that of a simulated pipeline, whose chunks start when their inputs are there."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from dsmini.planner.request import Schedule
from tests.helpers.plans import in_layout, plan_of

SIZES = [(4, 8), (8, 20), (16, 120)]
"""Stages and micro-batches."""
MACHINES = [("", 1, "none"), ("fast_link*0.05", 1, "full"), ("fast_link*0.3", 2, "none")]
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
    schedule: Schedule, stages: int, micro_batches: int, machine: str, tensor: int, recompute: Any
) -> None:
    """Compare the whole step, and the wait of the GPU in the middle, which is longest in DualPipe."""
    made = plan_of(f"deepseek-v3 {machine} gpus=1 batch={8 * micro_batches}")
    sizes: dict[str, Any] = {"gpus": 8 * tensor * stages, "pipeline": stages, "expert": 8, "tensor": tensor, "zero": 0}
    s = in_layout(made, **sizes, schedule=schedule, recompute=recompute)
    sent, alone = s["chunk_dispatch"] + s["chunk_tensor"], s["chunk_forward"] + s["chunk_backward"]
    backward, weights = s["chunk_backward"] + sent, s["chunk_weights"]
    both = max(alone, 2 * s["chunk_dispatch"]) + 2 * s["chunk_tensor"]
    cost = {"F": s["chunk_forward"] + sent, "B": backward, "b": backward - weights, "W": weights, "both": both}
    whole, busy = simulate(dualpipe if schedule == "dualpipe" else one_f_one_b, stages, micro_batches, cost)
    parts = ("computing_seconds", "dispatching_seconds", "reducing_seconds", "bubble_seconds")
    assert whole == pytest.approx(sum(s[part] for part in parts))
    assert whole - busy[stages // 2 - 1] == pytest.approx(s["bubble_seconds"])
