"""Values that change over a run, as functions of the step: learning rate, batch size, routing bias speed, MTP weight.

Lengths are shares of the run's steps, so a run of any length has the shape of the published one (DeepSeek-V3 report,
section 4.2, and configs/deepseek-v3.toml). Steps count from 0.
"""

import math

from dsmini.config import TrainConfig
from dsmini.config.lr_schedule import Phase, read_phases


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """Return the share of its peak that every learning rate has at this step.

    A warm-up ends with the first step at the full peak. A decay starts at the level before it and ends at its own, both
    included. A decay of one step has the level before it. A phase may be too short for a step.
    """
    phases = read_phases(config.lr_schedule)
    level, start = 1.0, 0
    for phase, end in zip(phases, phase_ends(phases, config.steps), strict=True):
        if step < end:
            return _share_within(phase, step - start, end - start, level)
        level, start = level if phase.level is None else phase.level, max(start, end)
    return level


def phase_ends(phases: tuple[Phase, ...], steps: int) -> list[int]:
    """Return for each phase the first step after it.

    Shares before the phase without one are added up from the start, those after it are subtracted from the end.
    """
    rest = next((i for i, phase in enumerate(phases) if phase.share is None), len(phases) - 1)
    ends, until = [], 0.0
    for phase in phases[:rest]:
        until += phase.share or 0.0
        ends.append(until)
    for i in range(rest, len(phases)):
        until = 1.0
        for phase in phases[i + 1 :]:
            until -= phase.share or 0.0
        ends.append(until)
    return [round(end * steps) for end in ends]


def _share_within(phase: Phase, step: int, length: int, before: float) -> float:
    """Return the learning rate share at a step of a phase, which starts at the level `before`."""
    if phase.kind == "warmup":
        return (step + 1) / length
    level = before if phase.level is None else phase.level
    if phase.kind == "constant":
        return level
    progress = step / max(1, length - 1)
    above = 0.5 * (1 + math.cos(math.pi * progress)) if phase.kind == "cosine" else 1 - progress
    return level + (before - level) * above


def batch_size(step: int, config: TrainConfig, parts: int = 1) -> int:
    """Return the number of sequences in this step.

    It grows linearly from batch_start to batch_size, rounded down so that each of the parts of the batch has a multiple
    of grad_accum. The first step after the ramp has batch_size.

    Args:
        parts: number of processes that share the batch.
    """
    ramp = round(config.batch_ramp * config.steps)
    if config.batch_start is None or step >= ramp:
        return config.batch_size
    unit = config.grad_accum * parts
    return config.batch_start + (config.batch_size - config.batch_start) // unit * step // ramp * unit


def bias_speed(step: int, config: TrainConfig) -> float:
    """Return the change of the routing bias after this step: none while only indexers learn."""
    moves = config.dsa_stage != "warmup" and step < round(config.bias_until * config.steps)
    return config.bias_speed if moves else 0.0


def mtp_weight(step: int, config: TrainConfig) -> float:
    """Return the weight of the multi-token prediction loss in this step."""
    return config.mtp_weight if step < round(config.mtp_until * config.steps) else config.mtp_weight_after
