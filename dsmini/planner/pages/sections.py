"""Sections of a plan in words: the question of each, its answer in one sentence, and the figures to show first.

A figure that a plan lacks, such as the cost on hardware without a price, is left out of headlines and sentences.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsmini.planner.quantities.display import in_words, rounded
from dsmini.planner.quantities.explanation import shown
from dsmini.planner.quantities.quantity import COUNT, Anything
from dsmini.planner.reliability import NODE_FAILURES
from dsmini.planner.training.training_plan import TrainingPlan
from dsmini.planner.whole import Plan

TITLES = {
    "model": "What is the model?",
    "training": "What does training take?",
    "inference": "What does serving take?",
    "attention": "What would sparse or compressed attention save?",
    "reliability": "What do failures cost?",
}
HEADLINES: Mapping[str, tuple[str, ...]] = {
    "model": (
        *("parameters_main", "mtp_parameters", "parameters_active", "training_flops", "kv_cache"),
        *("mha_kv_cache", "cache_saving", "equal_gqa_groups", "model_bytes"),
    ),
    "training": (
        *("memory_needed", "memory_free", "process_memory", "state_parameter", "step_seconds"),
        *("assumed_step_seconds", "roof_step_seconds"),
        *("computing_seconds", "dispatching_seconds", "reducing_seconds", "bubble_seconds", "exchange_seconds"),
        *("update_seconds", "roof_utilization", "slow_bytes", "slow_link_share", "nodes_reached"),
        *("training_tokens_per_day", "training_gpu_hours", "training_days", "training_cost"),
    ),
    "inference": (
        *("decode_gpu_weights", "decode_gpu_cache", "decode_memory_share", "decode_sequences_that_fit"),
        *("decode_longest_context", "decode_time_per_token", "decode_tokens_per_second"),
        *("decode_gpu_tokens_per_second", "decode_memory_time", "decode_slow_link_time", "speculation_gain"),
        *("decode_cost", "prefill_time_to_first_token", "prefill_gpu_tokens_per_second", "prefill_cost"),
    ),
    "attention": (
        *("v32_dense_flops", "v32_index_flops", "v32_attention_flops", "v32_flops_ratio", "v32_crossover"),
        *("v32_read_ratio", "v32_kv_cache", "v32_cache_ratio", "pro_kv_cache", "pro_cache_ratio", "pro_flops_ratio"),
        *("flash_kv_cache", "flash_cache_ratio", "flash_flops_ratio", "v41_kv_cache"),
    ),
    "reliability": (
        *("mean_time_to_failure", "failures", "checkpoint_bytes", "checkpoint_write_time", "checkpoint_interval"),
        *("effective_share_at_any_rate", "elapsed_time", "elapsed_cost", "training_energy"),
    ),
}
"""Names of the figures that a section shows first, in their order."""
MEMORY = ("memory_needed", "memory_free", "process_memory", "state_parameter")
"""Those of a training that does not fit."""
NARROW = 0.05
"""Share of the memory that is left, or of the MFU that is missed, which is worth a warning."""
COMPARED = (
    *("parameters_main", "parameters_active", "kv_cache", "memory_needed", "process_memory", "step_seconds"),
    *("roof_step_seconds", "training_days", "training_cost", "decode_time_per_token", "decode_gpu_tokens_per_second"),
    *("decode_sequences_that_fit", "decode_cost", "prefill_time_to_first_token", "elapsed_time"),
)
"""Figures that are compared where a plan is varied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionOfPlan:
    """One section in words."""

    name: str
    title: str
    finding: str
    headlines: dict[str, Anything]
    others: dict[str, Anything]
    warnings: tuple[str, ...]


def sections(plan: Plan) -> Iterator[SectionOfPlan]:
    """Yield the sections that a plan has figures for, or a reason why not."""
    answers = {
        "model": _model,
        "training": _training,
        "inference": _inference,
        "attention": _attention,
        "reliability": _reliability,
    }
    for name, figures in plan.sections.items():
        if (name == "attention" and plan.savings is None) or (name == "reliability" and not plan.training.fits):
            continue
        first = MEMORY if name == "training" and not plan.training.fits else HEADLINES[name]
        headlines = {key: figures[key] for key in first if key in figures and figures[key].value}
        others = {key: f for key, f in figures.items() if key not in headlines and f.op != "input"}
        warn = {"training": _training_warnings, "inference": _serving_warnings, "reliability": _failure_warnings}.get(
            name
        )
        yield SectionOfPlan(
            name=name,
            title=TITLES[name],
            finding=answers[name](plan),
            headlines=headlines,
            others=others,
            warnings=tuple(warn(plan)) if warn else (),
        )


def percent(share: Anything) -> str:
    """Return a share in percent, in three digits."""
    return f"{100 * share.value:.3g} %"


def _model(plan: Plan) -> str:
    p, ops = plan.training.model.parameters, plan.training.model.operations
    saved = f", {percent(plan.cache.saving)} less than multi-head attention" if plan.cache.saving.value > 0 else ""
    return (
        f"{in_words(p.parameters_main)} parameters, of which a token meets {in_words(p.parameters_active)}: "
        f"{shown(ops.training_flops)} in training. A token's cache takes {_bytes(plan.cache.per_token)}{saved}."
    )


def _training(plan: Plan) -> str:
    t, time = plan.training, plan.training.time
    one = "This machine takes" if plan.setup.hardware.name == "this" else "One device takes"
    gpus = one if t.layout.gpus == 1 else f"{t.layout.gpus:,} GPUs take"
    cost = f" and {shown(time.cost)}" if time.cost is not None else ""
    fullest = "It" if t.layout.gpus == 1 else "The fullest GPU"
    needs = f"{fullest} needs {shown(t.memory_needed)} of {rounded(plan.setup.hardware.memory)}."
    if not t.fits:
        fix = plan.setup.layout.misfit or "use more GPUs, ZeRO, recomputation, or --search"
        return f"It does not fit: {fix}. {needs}"
    running = shown(plan.reliability.running)
    by = f"by the parts of a step, at an MFU of {shown(t.step.roof_utilization)}"
    if not t.is_slowed:
        by = f"at an MFU of {_assumed(t)}"
    return f"{gpus} {running}{cost} for {in_words(1 * t.workload.tokens)} tokens, {by}. {needs}"


def _inference(plan: Plan) -> str:
    if plan.serving is None:
        return f"Serving is not planned: {plan.setup.unserved}."
    d, p = plan.serving.decode, plan.serving.prefill
    cost = plan.serving.cost
    rent = f", {shown(cost.decode)}" if cost is not None else ""
    return (
        f"A sequence gets {shown(d.tokens_per_second)} and a GPU gives {shown(d.gpu_tokens_per_second)}{rent}. "
        f"The first token of a prompt comes after {shown(p.time_to_first_token)}."
    )


def _attention(plan: Plan) -> str:
    assert plan.savings is not None, "the section is left out without savings"
    s = plan.savings.sparse
    crossover = (
        "costs more operations than it saves at any length"
        if s.crossover is None
        else (f"saves operations from {shown(s.crossover)} on")
    )
    whose = "its" if plan.setup.m.config.attention == "dsa" else "V3.2's"
    return (
        f"At {shown(s.context)} a layer's attention of a token takes {shown(s.index_flops + s.attention_flops)} with "
        f"{whose} indexer, {shown(s.dense_flops)} without. It {crossover}. Its keys make the cache "
        f"{percent(s.cache_ratio - COUNT(1))} larger: {_bytes(s.kv_cache)} a token in FP8."
    )


def _reliability(plan: Plan) -> str:
    r = plan.reliability
    return (
        f"A failure every {shown(r.mean_time)}: {percent(r.share)} of the time trains, with a checkpoint every "
        f"{shown(r.interval)}. The whole run takes {shown(r.elapsed)}."
    )


def _training_warnings(plan: Plan) -> Iterator[str]:
    t, memory = plan.training, 1 * plan.setup.hardware.memory  # computed, so shown in three digits
    if not t.fits:
        return
    if t.memory_free.value < NARROW * memory.value:
        yield f"Memory is a lower bound, and only {shown(t.memory_free)} of {rounded(memory)} are left."
    reached, used = t.step.roof_utilization, ", which days and rent are computed with" if t.is_slowed else ""
    if reached.value < (1 - NARROW) * t.assumptions.utilization.value:
        yield f"The parts of a step reach an MFU of {shown(reached)}{used}, not {_assumed(t)}."


def _assumed(t: TrainingPlan) -> str:
    u = t.assumptions.utilization
    return f"{shown(1 * u)} ({u.source if t.assumptions.stated else 'as in V3'})"


def _failure_warnings(plan: Plan) -> Iterator[str]:
    assumed, node = plan.setup.failures, plan.setup.hardware.gpus_per_node
    if assumed.failures_per_node_day is NODE_FAILURES and node < assumed.gpus_per_node:
        yield "The rate of failures is that of Meta's nodes of eight GPUs; for yours use --failures-per-node-day."


def _serving_warnings(plan: Plan) -> Iterator[str]:
    served = plan.setup.serving
    if served is not None and served.misfit:
        yield f"{served.misfit[0].upper()}{served.misfit[1:]}."


def _bytes(rate: Anything) -> str:
    return shown(rate).partition("/")[0]
