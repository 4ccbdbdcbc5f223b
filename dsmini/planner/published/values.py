"""Published figures, computed: one function for each figure of published.toml.

Every number comes from a config in models/, a hardware file in machines/, or an input of published.toml.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dsmini.planner.hardware import Hardware, load_hardware
from dsmini.planner.model.attention_savings import AttentionSavings, attention_savings
from dsmini.planner.model.compressed_attention import CompressedAttention
from dsmini.planner.model.kv_cache import all_layers, cache_plan, cache_saving, row_numbers
from dsmini.planner.model.parameters import ModelFigures, dense_training_flops, model_figures
from dsmini.planner.model.references import reference
from dsmini.planner.model.sizes_files import renamed
from dsmini.planner.outcome import WRITE_RATE, checkpoint_bytes
from dsmini.planner.published.v3_training import PublishedTraining, published_training
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    COUNT,
    TOKENS,
    Anything,
    BytesPerSecond,
    BytesPerToken,
    Count,
    Seconds,
    Tokens,
    rounded_up,
    total,
)
from dsmini.planner.reliability import (
    FailureInputs,
    best_interval,
    checkpoint_write_time,
    effective_share,
    mean_time_to_failure,
)
from dsmini.planner.serving.deployment import deployment, serving_workload, v3_decode, v3_prefill
from dsmini.planner.serving.exchange import ExchangeLimit, exchange_limit
from dsmini.planner.serving.speculation import accepted_tokens
from dsmini.planner.setup import V3_BATCH, V3_SEQ_LEN, V3_SOURCE, V3_TOKENS, with_reached_links
from dsmini.planner.training.bubbles import ChunkTimes, bubble_seconds
from dsmini.planner.training.layout import Schedule
from dsmini.planner.training.layout_choice import V3_LAYOUT
from dsmini.planner.training.training_plan import LinkLoad, TrainingPlan, training_plan
from dsmini.planner.training.workload import Workload


@dataclass(frozen=True)
class Sources:
    """Models, hardware and plans that the figures are computed from, each made once."""

    given: Mapping[str, Any]
    """Inputs of published.toml by name."""

    @cached_property
    def v3(self) -> ModelInputs:
        return reference("deepseek-v3")

    @cached_property
    def h800(self) -> Hardware:
        return load_hardware("h800")

    @cached_property
    def workload(self) -> Workload:
        return Workload.of(seq_len=V3_SEQ_LEN, batch=V3_BATCH, tokens=V3_TOKENS, source=V3_SOURCE)

    @cached_property
    def printed_run(self) -> PublishedTraining:
        """V3's training from the printed time of a step."""
        return published_training(self.v3, self.h800, self.workload)

    @cached_property
    def plan(self) -> TrainingPlan:
        """V3's training as a plan predicts it."""
        return training_plan(self.v3, with_reached_links(self.h800), V3_LAYOUT, self.workload)

    @property
    def link(self) -> LinkLoad:
        assert self.plan.link is not None, "V3's experts are on several nodes"
        return self.plan.link

    def figures(self, name: str, seq_len: int = V3_SEQ_LEN) -> ModelFigures:
        return model_figures(reference(name), TOKENS(seq_len, "seq_len", "Tokens of a training sequence", V3_SOURCE))

    def limit(self, hardware: str, *, width: bool = True) -> ExchangeLimit:
        """Return the limit of the links in decoding, with INS's rounded width or V3's own."""
        nvlink = hardware != "h800"
        # 72 GPUs of a GB200 hold the experts; how many copies they have does not change what is sent
        made = deployment("decode", expert_parallel=72, micro_batches=2, shared_remote=True) if nvlink else v3_decode()
        model = self.v3
        if width:
            rounded = self.given["ins_width"]
            model = dataclasses.replace(model, dim=COUNT(rounded.value, "dim", rounded.title, rounded.source))
        found = exchange_limit(model, load_hardware(hardware), made, serving_workload(source="INS, 2.3.2").sequences)
        assert found is not None, "experts are on several GPUs"
        return found

    def bubble(self, schedule: Schedule) -> Seconds:
        names = ("forward", "backward", "weights", "both")
        times = ChunkTimes(**{name: self.given[f"bubble_{name}"] for name in names})
        return bubble_seconds(schedule, self.given["bubble_pipeline"], times)

    def mean_time(self, gpus: str) -> Seconds:
        return mean_time_to_failure(self.given[f"kokolis_gpus_{gpus}"], FailureInputs())

    @cached_property
    def million(self) -> AttentionSavings:
        """V3.2, V4 and V4.1 at a million tokens."""
        return self.savings("v4_context")

    def savings(self, context: str) -> AttentionSavings:
        found = attention_savings(self.v3, self.given[context])
        assert found is not None, "DeepSeek-V3 has MLA"
        return found

    def v4(self, name: Literal["pro", "flash"]) -> CompressedAttention:
        found: CompressedAttention | None = getattr(self.million, name)
        assert found is not None, "V4 is compared with DeepSeek-V3"
        return found

    @property
    def v41_cache(self) -> BytesPerToken:
        assert self.million.shared is not None, "V4.1 is compared with DeepSeek-V3"
        return self.million.shared

    def cache(self, name: str) -> Anything:
        return cache_plan(reference(name), "bfloat16").per_token

    def share(self, part: str, whole: str) -> Anything:
        return self.given[part] / self.given[whole]


def _v2_cache_saving(s: Sources) -> Count:
    v2, older = reference("deepseek-v2"), renamed(reference("deepseek-67b"), "older_")
    mine = all_layers(v2, row_numbers(v2) * s.given["v2_cache_number"])
    return cache_saving(mine, cache_plan(older, "bfloat16").per_token)


def _llama_cache_ratio(s: Sources) -> Count:
    llama = renamed(reference("llama-3.1-405b"), "llama_")
    return cache_plan(llama, "bfloat16").per_token / s.cache("deepseek-v3")


def _effective_share(s: Sources) -> Count:
    failures, mean = FailureInputs(), s.mean_time("12k")
    return effective_share(mean, best_interval(failures.write_time, mean), failures)


def _both_ways(hardware: Hardware) -> BytesPerSecond:
    assert hardware.fast_link is not None, "it has NVLink"
    return 2 * hardware.fast_link


def _link_ratio(fast: BytesPerSecond | None, slow: BytesPerSecond | None) -> Count:
    assert fast is not None and slow is not None, "it has both links"
    return fast / slow


def _link_share(s: Sources) -> Count:
    """Return the time of separate rows over the slow link, over that of computing."""
    return s.link.share_unlimited * s.plan.time.step_seconds / s.plan.step.computing


def _mfu(s: Sources, rate: str) -> Count:
    return s.given[rate] / load_hardware("h100").peak("bfloat16")


def _checkpoint(s: Sources) -> Seconds:
    nodes = rounded_up(s.plan.sizes.gpus / s.h800.gpus_per_node)
    return checkpoint_write_time(checkpoint_bytes(s.plan), nodes, WRITE_RATE)


def _cost(s: Sources) -> Anything:
    assert s.printed_run.printed_cost is not None, "an H800 has a price"
    return s.printed_run.printed_cost


def _crossover(s: Sources) -> Tokens:
    found = s.million.sparse.crossover
    assert found is not None, "V3's heads cost more than the indexer's"
    return found


COMPUTED: Mapping[str, Callable[[Sources], Anything]] = {
    # 1. sizes and operations
    "v3_parameters": lambda s: s.figures("deepseek-v3").parameters.parameters_main,
    "v3_active": lambda s: s.figures("deepseek-v3").parameters.parameters_active,
    "v3_active_with_embedding": lambda s: s.figures("deepseek-v3").parameters.parameters_active_with_embedding,
    "v3_mtp": lambda s: s.figures("deepseek-v3").parameters.mtp_parameters_without_projection,
    "v3_mtp_active": lambda s: s.figures("deepseek-v3").parameters.mtp_active_printed,
    "v3_flops": lambda s: s.figures("deepseek-v3").operations.training_flops,
    "v2_flops": lambda s: s.figures("deepseek-v2").operations.training_flops,
    "llama_flops": lambda s: s.figures("llama-3.1-405b", seq_len=2048).operations.training_flops,
    "qwen_flops": lambda s: s.figures("qwen-2.5-72b").operations.training_flops,
    # 2. training
    "v3_flops_per_gpu": lambda s: s.printed_run.utilization.flops_per_gpu,
    "v3_flops_per_gpu_full": lambda s: s.printed_run.utilization.flops_per_gpu_full_square,
    "v3_mfu": lambda s: s.printed_run.utilization.utilization,
    "v3_mfu_full": lambda s: s.printed_run.utilization.utilization_full_square,
    "v3_tokens_per_day": lambda s: s.printed_run.time.tokens_per_day,
    "v3_hours_per_trillion": lambda s: s.printed_run.time.hours_per_trillion,
    "v3_days_per_trillion": lambda s: s.printed_run.time.days_per_trillion,
    "v3_pretraining_hours": lambda s: s.printed_run.time.gpu_hours,
    "v3_hours": lambda s: s.printed_run.printed_hours,
    "v3_cost": _cost,
    "v3_extension_hours": lambda s: s.printed_run.extension_hours,
    "bubble_1f1b": lambda s: s.bubble("1f1b"),
    "bubble_zb1p": lambda s: s.bubble("zb1p"),
    "bubble_dualpipe": lambda s: s.bubble("dualpipe"),
    "v3_bubble": lambda s: s.printed_run.bubble.bubble,
    "v3_data": lambda s: s.plan.sizes.data,
    "v3_expert_nodes": lambda s: s.plan.dispatch.expert_nodes if s.plan.dispatch else COUNT(0),
    "v3_experts_per_gpu": lambda s: s.plan.sizes.experts_per_gpu,
    "v3_communication_share": lambda s: (
        s.plan.assumptions.communication_multiprocessors / s.plan.assumptions.multiprocessors
    ),
    "v3_link_share": _link_share,
    "v3_node_limit": lambda s: s.plan.dispatch.node_limit if s.plan.dispatch else COUNT(0),
    "llama_training": lambda s: dense_training_flops(
        s.figures("llama-3.1-405b").parameters.parameters_main, s.given["llama_tokens"]
    ),
    "llama_mfu_8192": lambda s: _mfu(s, "llama_rate_8192"),
    "llama_mfu_16384": lambda s: _mfu(s, "llama_rate_16384"),
    "llama_mfu_long": lambda s: _mfu(s, "llama_rate_long"),
    # 3. cache and serving
    "v3_cache": lambda s: s.cache("deepseek-v3"),
    "qwen_cache": lambda s: s.cache("qwen-2.5-72b"),
    "llama_cache": lambda s: s.cache("llama-3.1-405b"),
    "llama_cache_ratio": _llama_cache_ratio,
    "v3_gqa_groups": lambda s: cache_plan(s.v3, "bfloat16").groups,
    "v3_cache_heads": lambda s: row_numbers(s.v3) / s.v3.v_head_dim,
    "v2_cache_saving": _v2_cache_saving,
    "h800_block_exchange": lambda s: s.limit("h800").block_time,
    "h800_token_exchange": lambda s: s.limit("h800").token_time,
    "h800_exchange_rate": lambda s: s.limit("h800").tokens_per_second,
    "h800_token_exchange_7168": lambda s: s.limit("h800", width=False).token_time,
    "gb200_block_exchange": lambda s: s.limit("gb200-nvl72").block_time,
    "gb200_token_exchange": lambda s: s.limit("gb200-nvl72").token_time,
    "gb200_exchange_rate": lambda s: s.limit("gb200-nvl72").tokens_per_second,
    "v3_prefill_experts": lambda s: v3_prefill().gpu_experts(s.v3),
    "v3_prefill_data": lambda s: v3_prefill().data_parallel(),
    "v3_decode_experts": lambda s: v3_decode().gpu_experts(s.v3),
    "v3_decode_data": lambda s: v3_decode().data_parallel(),
    "v3_speculation": lambda s: accepted_tokens(serving_workload(source="V3, section 5.4.3")),
    # 4. later attention
    "v32_cache": lambda s: s.million.sparse.kv_cache,
    "v32_crossover": _crossover,
    "v32_flops_ratio": lambda s: s.savings("v32_context").sparse.flops_ratio,
    "v4_pro_parameters": lambda s: s.v4("pro").parameters.total,
    "v4_pro_active": lambda s: s.v4("pro").parameters.active,
    "v4_flash_parameters": lambda s: s.v4("flash").parameters.total,
    "v4_flash_active": lambda s: s.v4("flash").parameters.active,
    "v4_pro_cache_ratio": lambda s: s.v4("pro").cache_ratio,
    "v4_flash_cache_ratio": lambda s: s.v4("flash").cache_ratio,
    "v4_pro_cache_share": lambda s: COUNT(1) / s.v4("pro").cache_ratio,
    "v4_flash_cache_share": lambda s: COUNT(1) / s.v4("flash").cache_ratio,
    "v4_pro_gqa_share": lambda s: s.v4("pro").baseline_share,
    "v4_flash_gqa_share": lambda s: s.v4("flash").baseline_share,
    "v4_pro_flops_ratio": lambda s: s.v4("pro").rounded_ratio,
    "v4_flash_flops_ratio": lambda s: s.v4("flash").rounded_ratio,
    "v4_pro_flops_share": lambda s: COUNT(1) / s.v4("pro").rounded_ratio,
    "v4_flash_flops_share": lambda s: COUNT(1) / s.v4("flash").rounded_ratio,
    "v41_cache": lambda s: s.v41_cache,
    "v41_cache_ratio": lambda s: s.v4("flash").kv_cache / s.v41_cache,
    # 5. machines and their failures
    "h800_nvlink": lambda s: _both_ways(s.h800),
    "h100_nvlink": lambda s: _both_ways(load_hardware("h100")),
    "v3_link_ratio": lambda s: _link_ratio(s.h800.fast_link_effective, s.h800.slow_link),
    "ins_link_ratio": lambda s: _link_ratio(s.h800.fast_link_effective, s.h800.slow_link_effective),
    "llama_interruptions": lambda s: total([s.given["llama_planned"], s.given["llama_unexpected"]]),
    "failure_16k": lambda s: s.mean_time("16k"),
    "failure_131k": lambda s: s.mean_time("131k"),
    "failure_1k": lambda s: s.mean_time("1k"),
    "effective_share_12k": _effective_share,
    "ff_cost_ratio": lambda s: s.share("ff_performance", "ff_price"),
    "ff_energy_saving": lambda s: COUNT(1) - s.share("ff_power", "dgx_power"),
    "ff_nvlink_errors": lambda s: s.share("ff_xid_74", "ff_xid_all"),
    "ff_program_errors": lambda s: s.share("ff_xid_43", "ff_xid_all"),
    "ff_checkpoint": _checkpoint,
}
"""Our value of each figure, by its name in published.toml."""
