"""Speculation: what multi-token prediction gains in decoding, and what verifying costs.

A draft of d tokens, each accepted with probability p if those before it were, makes a step give

    1 + p + p^2 + ... + p^d = (1 - p^(d+1)) / (1 - p)    tokens; 1 + p for one draft

Worked example: V3 accepts 85 to 90 % of its second tokens: 1.85 to 1.90 tokens a step, before overhead. It prints
1.8 times the tokens a second.

A verifying step brings 1 + d tokens a sequence. It reads the cache once for all of them, but more experts, computes
and sends 1 + d times as much, and d drafts run before it, each a block and the head. So the gain shrinks to the tokens
of a step times plain step / (verify + drafts). It is largest where reading weights and cache binds. Where links bind, a
verifying step takes twice the time, and speculation gains nothing.

Source: DeepSeek-V3 report, section 5.4.3; Leviathan et al., arXiv 2211.17192 (the sum).
"""

import dataclasses
from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.kv_cache import CachePlan, cache_plan
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, TOKENS, Count, Seconds, TokensPerSecond, per, power
from dsmini.planner.serving.decoding import decode_plan, decode_work, setting_of
from dsmini.planner.serving.deployment import Deployment, ServingWorkload
from dsmini.planner.serving.exchange import ONE
from dsmini.planner.serving.memory import cache_of
from dsmini.planner.serving.step import Blocks, Setting, StepTimes, main_blocks, step_times


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationPlan(Figures):
    """Decoding with drafts compared with plain decoding."""

    tokens_per_step: Count
    """Tokens that a step gives a sequence: the gain before overhead."""
    verify: StepTimes
    """Step of the model over the drafts."""
    draft: StepTimes
    """Step of one multi-token prediction block."""
    step: Seconds
    """All drafts and the verifying step."""
    gain: Count
    """Tokens a second over those of plain decoding."""
    tokens_per_second: TokensPerSecond
    """Output tokens of a sequence."""


def accepted_tokens(workload: ServingWorkload) -> Count:
    """Return the expected number of tokens that a step gives, the model's own one included."""
    p = workload.acceptance
    return ((ONE - power(p, workload.drafts + ONE)) / (ONE - p)).named(
        "tokens_per_step", "Tokens of a step, before overhead", "V3, section 5.4.3"
    )


def speculation_plan(
    model: ModelInputs, hardware: Hardware, workload: ServingWorkload, deployment: Deployment
) -> SpeculationPlan:
    """Return what drafts gain in a deployment.

    Simplified: a draft runs its block over one token of each sequence; sampling and rejecting take no time.

    Raises: ValueError for a model without multi-token prediction, and as decode_plan.
    """
    if model.config.n_mtp_layers == 0:
        raise ValueError("n_mtp_layers=0 leaves no block to draft with; use 1 or more, or plan plain decoding")
    setting = setting_of(model, hardware, deployment)
    cache = cache_plan(model, deployment.cache_dtype)
    plain = decode_plan(model, hardware, workload, deployment)
    work = decode_work(setting, cache, workload, workload.drafts + ONE)
    verify = step_times(setting, main_blocks(setting), work, "verify")
    draft = _draft(setting, cache, workload)
    tokens, source = accepted_tokens(workload), "V3, section 5.4.3"
    step = (verify.step + workload.drafts * draft.step).named(
        "speculative_step", "Time of all drafts and of the step that verifies them", source
    )
    return SpeculationPlan(
        tokens_per_step=tokens,
        verify=verify,
        draft=draft,
        step=step,
        gain=(tokens * (plain.times.step / step)).named("speculation_gain", "Speedup by drafts", source),
        tokens_per_second=(tokens * TOKENS(1) / step).named(
            "speculative_tokens_per_second", "Output tokens/s of a sequence with drafts", source
        ),
    )


def _draft(setting: Setting, cache: CachePlan, workload: ServingWorkload) -> StepTimes:
    model = setting.model
    moe = model.config.is_moe(model.config.n_layers)
    one, none = COUNT(1), COUNT(0)
    blocks = Blocks(layers=one, dense=none if moe else one, moe=one if moe else none, ends=setting.weights.projection)
    work = decode_work(setting, cache, workload, one)
    row = dataclasses.replace(cache, per_token=per(cache.row, TOKENS))
    return step_times(
        setting,
        blocks,
        dataclasses.replace(work, cache=cache_of(setting, row, workload.sequences, workload.context)),
        "draft",
    )
