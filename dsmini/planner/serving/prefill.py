"""Prefill: time until the first token, and prompt tokens a second.

A prompt of T tokens passes the model at once, so that each weight that is read serves T tokens: compute binds, or
links. MLA runs expanded, attention sees half of the square of queries and keys, and the head is asked for the last
token only:

    FLOPs of a prompt    2 N T + L H (d_qk + d_v) T^2

Worked example, DeepSeek-V3 on 32 H800, two micro-batches of one prompt of 4096 tokens a GPU: 8192 tokens make
583 TFLOP in FP8 and 86 TFLOP in BF16, 381 ms. A GPU sends 8192 * 58 * 3.6 * 3/4 * 21,504 bytes = 27.6 GB between
nodes, which takes 690 ms at 40 GB/s. Links bind, and a GPU reads 11,900 prompt tokens a second at most.

The cache is written, which is left out: 70 KB a token next to gigabytes of weights.

Source: DeepSeek-V3 report, section 3.4.1; dsmini.accounting.step_flops.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.kv_cache import cache_plan
from dsmini.planner.model.matrices import key_width
from dsmini.planner.model.sparse_context import is_sparse, mean_keys, score_products
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import Count, Seconds, TokensPerSecond, number_of
from dsmini.planner.serving.decoding import setting_of
from dsmini.planner.serving.deployment import Deployment, ServingWorkload
from dsmini.planner.serving.memory import ServingMemory, serving_memory
from dsmini.planner.serving.step import Setting, StepTimes, StepWork, main_blocks, step_times


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillPlan(Figures):
    """Prefill of prompts on a deployment."""

    memory: ServingMemory
    """Memory with the cache of the prompts of one step."""
    times: StepTimes
    time_to_first_token: Seconds
    """Time of a step, without waiting for others."""
    gpu_tokens_per_second: TokensPerSecond
    """Prompt tokens of a GPU."""


def prefill_plan(
    model: ModelInputs, hardware: Hardware, workload: ServingWorkload, deployment: Deployment
) -> PrefillPlan:
    """Return how a deployment reads prompts.

    Raises: ValueError for a deployment that does not divide the model, and hardware without a link or units that it
        needs.
    """
    setting = setting_of(model, hardware, deployment)
    stage, source = deployment.stage, "V3, section 3.4.1"
    times = step_times(setting, main_blocks(setting), _work(setting, workload), stage)
    mine = workload.prompts * deployment.micro_batches
    cache = cache_plan(model, deployment.cache_dtype)
    return PrefillPlan(
        memory=serving_memory(setting, cache, mine, workload.prompt),
        times=times,
        time_to_first_token=times.step.named(f"{stage}_time_to_first_token", "Time to the first token", source),
        gpu_tokens_per_second=(mine * workload.prompt / times.step).named(
            f"{stage}_gpu_tokens_per_second", "Prompt tokens/s of a GPU", source
        ),
    )


def _work(setting: Setting, workload: ServingWorkload) -> StepWork:
    tokens = number_of(workload.prompt)
    rows = workload.prompts * tokens
    pairs = mean_keys(setting.model, workload.prompt) * _expanded_products(setting.model)
    if is_sparse(setting.model):
        pairs = pairs + tokens / 2 * score_products(setting.model)
    return StepWork(
        rows=rows,
        logits=workload.prompts,
        pairs=rows * pairs,
        cache=None,
        up=setting.weights.latent_up,
    )


def _expanded_products(model: ModelInputs) -> Count:
    """Return the multiply-adds of a query with one key and its value in a layer, all heads."""
    return (model.n_heads * (key_width(model) + model.v_head_dim)).named(
        "expanded_products", "Multiply-adds of a token with a key and its value, one layer", "INS, table 2"
    )
