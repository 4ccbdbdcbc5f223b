"""A plan of faults to inject into a run, drawn from a seed: the same seed, the same faults at the same steps.

    --chaos SEED[:MEAN_STEPS[:KINDS]]       --chaos 7:40:kill,stop,full_disk

Faults come as a Poisson process: the distances between them are exponential with a mean of MEAN_STEPS steps. Each has
a kind, a rank, a step and a phase of the step. A fault of a save comes at the first save from its step on.
faults.py injects them.
"""

import difflib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

STEP_PHASES = ("forward", "backward", "optimizer", "between")
"""Phases of a step, in their order."""
SAVE_PHASES = ("staged", "writing", "written", "before_rename", "renamed", "before_prune", "pruned")
"""Phases of a save, as save:NAME."""
AT_ANY = ("kill", "terminate", "stop", "hang", "exception", "abort", "segfault")
"""Kinds that may come in any phase of a step."""
PHASE_OF = {"nan": "forward", "spike": "forward", "flip": "between", "corrupt": "between"}
"""The phase of the kinds that come in one."""
OF_LOSS = ("nan", "spike")
"""Kinds that change the loss."""
IN_SAVES = ("full_disk", "io_error", "kill_saving")
"""Kinds that come in a save."""
FAULT_KINDS = (*AT_ANY, *PHASE_OF, *IN_SAVES)
"""All kinds of faults."""
MEAN_STEPS = 50.0
"""Mean distance of two faults without a word about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault to inject."""

    kind: str
    """One of FAULT_KINDS."""
    rank: int
    step: int
    """Step during which it comes, from 1; for a fault of a save the first step that is saved from here on."""
    phase: str
    """One of STEP_PHASES, or save: and one of the phases of a save."""

    def __str__(self) -> str:
        """Return the fault in words that no other fault of the plan has."""
        return f"{self.kind} of rank {self.rank} at step {self.step} in {self.phase}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosPlan:
    """The faults of a run, by step; no two are the same."""

    faults: tuple[Fault, ...]

    @classmethod
    def from_seed(
        cls,
        seed: int,
        world_size: int,
        steps: int,
        mean_steps_between_failures: float = MEAN_STEPS,
        kinds: Sequence[str] = FAULT_KINDS,
        save_phases: Sequence[str] = SAVE_PHASES,
        with_loss: Sequence[int] | None = None,
    ) -> "ChaosPlan":
        """Draw the faults of a run of this many ranks and steps.

        Args:
            with_loss: ranks that compute a loss, for the faults of a loss; None: all.

        Raises: ValueError for a mean that is not positive and finite, and for an unknown kind.
        """
        check_chaos(mean_steps_between_failures, kinds)
        draw = random.Random(seed)  # only its random() is the same in every version of Python
        faults: list[Fault] = []
        at = 0.0
        while True:
            at += -mean_steps_between_failures * math.log(1 - draw.random())
            step = math.floor(at) + 1
            if step > steps:
                return cls(faults=tuple(faults))
            kind = _pick(kinds, draw)
            rank = math.floor(draw.random() * world_size)
            if kind in OF_LOSS and with_loss is not None:
                rank = with_loss[rank % len(with_loss)]
            fault = Fault(kind=kind, rank=rank, step=step, phase=_phase(kind, save_phases, draw))
            if fault not in faults:
                faults.append(fault)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosRequest:
    """The wish of a command line for faults."""

    seed: int
    mean_steps: float = MEAN_STEPS
    kinds: tuple[str, ...] = FAULT_KINDS


def parse_chaos(text: str) -> ChaosRequest:
    """Return the request of SEED[:MEAN_STEPS[:KINDS]], the kinds separated by commas.

    Raises: ValueError naming the part that is wrong, and what it should be.
    """
    seed, *more = text.split(":")
    form = f"--chaos {text!r} is not understood"
    fix = "want SEED[:MEAN_STEPS[:KINDS]], such as 7:40:kill,stop"
    if len(more) > 2:
        raise ValueError(f"{form}: it has {len(more) + 1} parts; {fix}")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 20):
        raise ValueError(f"{form}: the seed is {seed[:40]!r}, not a whole number from 0 on; {fix}")
    try:
        mean = float(more[0]) if more else MEAN_STEPS
    except ValueError:
        raise ValueError(f"{form}: the mean distance is {more[0][:40]!r}, not a number of steps; {fix}") from None
    kinds = tuple(dict.fromkeys(more[1].split(","))) if len(more) == 2 else FAULT_KINDS
    check_chaos(mean, kinds)
    return ChaosRequest(seed=int(seed), mean_steps=mean, kinds=kinds)


def check_chaos(mean_steps: float, kinds: Sequence[str]) -> None:
    """Raise ValueError for a mean distance that is not positive and finite, and for an unknown kind or none."""
    if not 0 < mean_steps < math.inf:
        raise ValueError(f"the mean distance of faults is {mean_steps:g} steps, want a finite number above 0; use 50")
    if not kinds:
        raise ValueError(f"no kind of fault is named; want some of {', '.join(FAULT_KINDS)}")
    for kind in kinds:
        if kind not in FAULT_KINDS:
            near = difflib.get_close_matches(kind, FAULT_KINDS, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"want some of {', '.join(FAULT_KINDS)}"
            raise ValueError(f"unknown kind of fault {kind[:40]!r}; {meant}")


def _pick(names: Sequence[str], draw: random.Random) -> str:
    return names[math.floor(draw.random() * len(names))]


def _phase(kind: str, save_phases: Sequence[str], draw: random.Random) -> str:
    if kind in IN_SAVES:
        return f"save:{_pick(save_phases, draw)}"
    return PHASE_OF.get(kind) or _pick(STEP_PHASES, draw)
