"""What changes over a run, as functions of the step: learning rate, batch size, routing bias speed, MTP weight.

Everything is given in shares of the run's steps, so that a run of any length keeps the shape of the published one
(DeepSeek-V3 report, section 4.2; configs/deepseek-v3.toml has it). Steps count from 0.

    learning rate    warmup | constant | decay: cosine or linear | final | last
"""

import math

from dsmini.config import TrainConfig


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """The share of its peak that every learning rate has at this step.

    The warm-up ends, and the constant phase begins, with the first step at the full peak; the decay's last step is
    the first that has lr_final.
    """
    warmup = round(config.warmup * config.steps)
    decay_from = round((config.warmup + config.constant) * config.steps)
    last_from = config.steps - round(config.last * config.steps)
    final_from = last_from - round(config.final * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    if step >= last_from:
        return config.lr_last
    progress = min(1.0, (step - decay_from) / max(1, final_from - 1 - decay_from))
    down = 0.5 * (1 - math.cos(math.pi * progress)) if config.decay == "cosine" else progress
    return 1 - (1 - config.lr_final) * down


def batch_size(step: int, config: TrainConfig) -> int:
    """Sequences in this step: linear from batch_start to batch_size over the ramp, in multiples of grad_accum."""
    ramp = round(config.batch_ramp * config.steps)
    if config.batch_start is None or step >= ramp:
        return config.batch_size
    exact = config.batch_start + (config.batch_size - config.batch_start) * step / ramp
    return int(exact // config.grad_accum) * config.grad_accum


def bias_speed(step: int, config: TrainConfig) -> float:
    """How far the routing bias moves after this step."""
    return config.bias_speed if step < round(config.bias_until * config.steps) else 0.0


def mtp_weight(step: int, config: TrainConfig) -> float:
    """Weight of the multi-token prediction loss in this step."""
    return config.mtp_weight if step < round(config.mtp_until * config.steps) else config.mtp_weight_after
