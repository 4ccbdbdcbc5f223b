"""What changes over a run, as functions of the step: learning rate, batch size, routing bias speed, MTP weight.

Everything is given in shares of the run's steps, so that a run of any length keeps the shape of the published one
(DeepSeek-V3 report, section 4.2; configs/deepseek-v3.toml has it). Steps count from 0.

    learning rate    warmup | constant | decay: cosine or linear | final | last
"""

import math

from dsmini.config import TrainConfig


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """The share of its peak that every learning rate has at this step.

    The warm-up ends, and the constant phase begins, with the first step at the full peak. The decay starts at the
    peak and ends at lr_final, both included; of one step only the start is left. A phase too short for a step has none.
    """
    up_to_decay = config.warmup + config.constant
    shares = (config.warmup, up_to_decay, 1 - config.final - config.last, 1 - config.last)
    warmup, decay_from, final_from, last_from = (round(share * config.steps) for share in shares)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    if step >= last_from:
        return config.lr_last
    if step >= final_from:
        return config.lr_final
    progress = (step - decay_from) / max(1, final_from - 1 - decay_from)
    above = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return config.lr_final + (1 - config.lr_final) * above


def batch_size(step: int, config: TrainConfig) -> int:
    """Sequences in this step: linear from batch_start to batch_size over the ramp, rounded down to multiples of
    grad_accum; the first step behind the ramp has batch_size."""
    ramp = round(config.batch_ramp * config.steps)
    if config.batch_start is None or step >= ramp:
        return config.batch_size
    parts = (config.batch_size - config.batch_start) // config.grad_accum
    return config.batch_start + parts * step // ramp * config.grad_accum


def bias_speed(step: int, config: TrainConfig) -> float:
    """How far the routing bias moves after this step."""
    return config.bias_speed if step < round(config.bias_until * config.steps) else 0.0


def mtp_weight(step: int, config: TrainConfig) -> float:
    """Weight of the multi-token prediction loss in this step."""
    return config.mtp_weight if step < round(config.mtp_until * config.steps) else config.mtp_weight_after
