"""Training runs with faults that are named one by one, started again until they end, and compared with a whole one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsmini.distributed.chaos import ChaosPlan, Fault
from dsmini.distributed.events import Event, read_events
from dsmini.distributed.faults import Chaos
from dsmini.distributed.world import World
from dsmini.training.record import read_records
from dsmini.training.run import TrainingRun
from tests.distributed.ranks import Outcome, outcomes
from tests.distributed.runs import new_run, saved
from tests.helpers.runs import TIMING

KILLED = -9
STEPS = 8


def fault(kind: str, rank: int, step: int, phase: str) -> Fault:
    return Fault(kind=kind, rank=rank, step=step, phase=phase)


def prepared(world: World, folder: Path, parallel: dict[str, Any], faults: Sequence[Fault], **changes: Any) -> Any:
    """Make a run, or restore it, with the faults of the plan that have not come yet."""
    training: TrainingRun = new_run(world, folder, parallel, **changes)
    survival = training.survival
    survival.chaos = Chaos(ChaosPlan(faults=tuple(faults)), world.rank, folder, survival.log)
    return training


def faulty(world: World, folder: Path, parallel: dict[str, Any], faults: Sequence[Fault], changes: Any = None) -> bool:
    """Train with faults; return whether the run came to its end."""
    return prepared(world, folder, parallel, faults, **(changes or {})).train()


def until_end(
    n: int, folder: Path, parallel: dict[str, Any], faults: Sequence[Fault], most: int = 16, **changes: Any
) -> list[list[Outcome]]:
    """Start a run again until it comes to its end; return how each attempt ended. At most `most` attempts."""
    attempts: list[list[Outcome]] = []
    while len(attempts) < most:
        attempts.append(outcomes(n, faulty, folder, parallel, faults, changes))
        if all(end.status == 0 and end.value is True for end in attempts[-1]):
            return attempts
    raise AssertionError("\n".join(str([(e.status, e.failure[-300:]) for e in ends]) for ends in attempts))


def statuses(ends: Sequence[Outcome]) -> list[int | None]:
    return [end.status for end in ends]


def events(folder: Path, name: str, rank: int = 0) -> list[Event]:
    """Return the events of one name."""
    return [event for event in read_events(folder, rank) if event.event == name]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what differs from run to run."""
    return [{k: v for k, v in record.row().items() if k not in TIMING} for record in read_records(folder)]


def state(folder: Path, step: int) -> dict[str, Any]:
    """Return the state.json of a checkpoint without what differs from run to run."""
    of = json.loads((folder / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
    of["row"] = {k: v for k, v in of["row"].items() if k not in TIMING}
    return {k: v for k, v in of.items() if k not in TIMING}


def differences(got: Path, want: Path, step: int = STEPS) -> list[str]:
    """Return what two runs do not have alike at a step: tensors by name, `state` and `rows`."""
    a, b = saved(got, step), saved(want, step)
    unequal = [name for name in sorted(a.keys() | b.keys()) if name not in a or name not in b]
    unequal += [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    unequal += ["state"] if state(got, step) != state(want, step) else []
    return unequal + (["rows"] if rows(got) != rows(want) else [])
